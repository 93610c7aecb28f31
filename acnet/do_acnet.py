"""The ACNet repository's command.

`python3 acnet/do_acnet.py [-a sres18] [-b acb|base] [-c fs|continue]`.

Runs train.py with the recipe of the short name. Reads data from ./imagenet_data or ./cifar10_data,
and writes runs to ./acnet_exps. Takes every flag of train.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train  # noqa: E402
from src.cli.flags import parse_only_flags  # noqa: E402
from src.cli.run import run  # noqa: E402
from src.models.networks import NETWORKS  # noqa: E402
from src.utils.errors import UserError  # noqa: E402


def train_arguments(arguments: list[str]) -> list[str]:
    """The command line of train.py for one of do_acnet.py."""
    arguments = ["-a", "sres18", "-b", "acb", *arguments]
    flags = parse_only_flags(arguments)
    names = [alias for network in NETWORKS.values() for alias in network.recipes]
    network = flags["network"]
    if network not in names and "config_path" not in flags:
        raise UserError(
            f"{network} is not one of ACNet's names, {', '.join(names)}; train.py trains other "
            "networks"
        )
    return [f"--output_path=acnet_exps/{network}_{flags['block']}_train", *arguments]


if __name__ == "__main__":
    run(train.main, __doc__, distributed=True, translate=train_arguments)
