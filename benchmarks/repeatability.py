"""How far the loss curves of 1, 2 and 4 ranks part over the same global batches:

    python3 benchmarks/repeatability.py [--steps=50] [--networks=alexnet,resnet18] [--ranks=1,2,4]

AlexNet has no batch norm (and trains here without dropout): its curves differ by rounding alone.
Batch norm sees each rank's share of the batch, unless it is synchronised, which CPU does not have.
Prints one line per network and number of ranks.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.processes import last_line, mpirun_words  # noqa: E402
from src.cli.run import run_process  # noqa: E402
from src.cli.start import prepare_rank  # noqa: E402
from src.distributed.launcher import has_launcher, launched_rank  # noqa: E402

_BATCH = 8


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--networks", default="alexnet,resnet18")
    parser.add_argument("--ranks", default="1,2,4")
    options = parser.parse_args(arguments)
    if has_launcher():
        print_losses(options.networks, options.steps)
        return
    for network in options.networks.split(","):
        curves = {
            ranks: measured(ranks, network, options.steps)
            for ranks in map(int, options.ranks.split(","))
        }
        reference = curves[min(curves)]
        for ranks, curve in curves.items():
            difference = max(
                abs(loss - expected) / expected for loss, expected in zip(curve, reference)
            )
            print(
                f"repeatability network={network} ranks={ranks} steps={len(curve)} "
                f"last_loss={curve[-1]:.6f} "
                f"largest_relative_difference={difference:.2e}",
                flush=True,
            )


def measured(ranks, network, steps):
    """Loss of each step on ``ranks`` ranks."""
    return json.loads(
        last_line(mpirun_words(ranks, __file__, f"--networks={network}", f"--steps={steps}"))
    )


def print_losses(network_name, steps):
    """On the ranks: train on the digits and print the list of losses, means over ranks."""
    from src.cli.recipes import load_config
    from src.distributed.communicator import connect
    from src.utils.device import select_device

    config = load_config(
        {
            "config_path": "digits",
            "network": network_name,
            "block": "base",
            "gamma_init": "null",
            "image_size": "64",
            "crop_padding": "2",
            "eval_resize": "64",
            "global_batch_size": str(_BATCH),
            "dropout": "0",
            "lr": "0.02",
            "warmup_epochs": "0",
            "num_classes": "10",
        }
    )
    communicator = connect(True)
    prepare_rank(communicator)
    from src.dataset.batches import TrainBatches
    from src.dataset.sources import open_images
    from src.models.create import create_network
    from src.training.create_step import create_train_step
    from src.training.schedules import create_schedule

    select_device("CPU", 0)
    network = create_network(config)
    communicator.broadcast_([parameter.asnumpy() for parameter in network.get_parameters()])
    batches = TrainBatches(
        open_images("digits", "train"), config, communicator.rank, communicator.size
    )
    step, losses = create_train_step(network, config, communicator), []
    for number in range(steps):
        loss = step(
            [batches[number]], create_schedule(config)(number, batches.steps_per_epoch), number
        ).loss
        losses.append(float(communicator.all_reduce_sum([loss])[0] / communicator.size))
    if communicator.is_root:
        print(json.dumps(losses))


if __name__ == "__main__":
    run_process(lambda signals: main(sys.argv[1:]), launched_rank())
