"""The ACNet repository's command: `python3 acnet/do_acnet.py [-a sres18] [-b acb|base] [-c fs|continue] [--KEY=VALUE ...]`.

train.py with the recipe that the short name stands for, its data in ./imagenet_data or ./cifar10_data, its runs in ./acnet_exps.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from src.command import run_main
from src.parallel.environment import launched_rank
from src.utils.config import network_recipes, parse_only_flags
from src.utils.errors import UserError
from src.utils.signals import Signals


def main(arguments: list[str], signals: Signals) -> None:
    given = ["-a", "sres18", "-b", "acb", *arguments]
    flags = parse_only_flags(given)
    names = network_recipes()["whole"]
    if flags["network"] not in names and "config_path" not in flags:
        raise UserError(f"{flags['network']} is none of ACNet's names, {', '.join(names)}; train.py trains other networks")
    train.main([f"--output_path=acnet_exps/{flags['network']}_{flags['block']}_train", *given], signals)


if __name__ == "__main__":
    run_main(main, launched_rank(), defers_signals=True)
