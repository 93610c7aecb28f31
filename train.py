"""Train an image classifier: `python3 train.py [--config_path=RECIPE] [--data_path=DIR]`.

Without arguments it trains on the bundled digits. `mpirun -n N python3 train.py --run_distribute=1
...` trains on N ranks.
"""

from typing import TYPE_CHECKING

from src.cli.run import run

if TYPE_CHECKING:
    from src.cli.command import Command


def main(command: "Command") -> None:
    # Bad flags and bad data are reported here, before the seconds that importing MindSpore takes.
    from src.training.resolve import prepare_data, uses_collectives

    data = prepare_data(command)
    command.start_mindspore(uses_collectives(command.config, command.communicator))
    from src.training.job import train

    train(command, data)


if __name__ == "__main__":
    run(main, __doc__, distributed=True)
