"""Evaluate checkpoints: `python3 eval.py --data_path=DIR --checkpoint_file_path=FILE_OR_FOLDER`.

Network, block, preprocessing and class indices come from each checkpoint; flags win. Under mpirun
the ranks share the images.
"""

from typing import TYPE_CHECKING

from src.cli.run import run

if TYPE_CHECKING:
    from src.cli.command import Command


def main(command: "Command") -> None:
    command.start_mindspore()
    from src.inference.evaluation import evaluate

    evaluate(command)


if __name__ == "__main__":
    run(main, __doc__, distributed=True)
