"""Report on runs: `python3 report.py RUN_FOLDER... [--result_path=FILE.html] [--data_path=DIR]`.

Writes one self-contained HTML file, by default report.html in the first folder: configuration and
differences between the runs, curves, per-class accuracy, confusion matrix, the worst mistakes of
best.ckpt, augmented images, where the time went. The page works offline and without JavaScript.
"""

from typing import TYPE_CHECKING

from src.cli.run import run

if TYPE_CHECKING:
    from src.cli.command import Command


def main(command: "Command") -> None:
    command.start_mindspore()
    from src.inference.report import report

    report(command)


if __name__ == "__main__":
    run(main, __doc__, positional="RUN_FOLDER")
