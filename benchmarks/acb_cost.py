"""What asymmetric convolution blocks cost.

In training over the plain network, and after fusion in evaluation (nothing, it should be).

    python3 benchmarks/acb_cost.py [--networks=resnet18] [--batch=16] [--image_size=224] [--steps=5]
        [--rounds=2] [--pytorch=1]

Training as compare_pytorch.py does it, compared with PyTorch. Evaluation: the plain and the
fused network in turn in one process, by each engine; medians.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import compare_pytorch  # noqa: E402
from benchmarks.timing import medians_in_turn  # noqa: E402
from src.cli.run import run_process  # noqa: E402

_SHORTEST_EVALUATION = 15


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default="resnet18")
    for name, default in (
        ("batch", 16),
        ("image_size", 224),
        ("steps", 5),
        ("rounds", 2),
        ("pytorch", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)
    for network in options.networks.split(","):
        train(options, network)
        evaluate(options, network)


def train(options, network):
    """Print images/s of the plain network over those with blocks, ours and PyTorch's."""
    shared = compare_pytorch.parse(
        [f"--{name}={getattr(options, name)}" for name in ("steps", "rounds", "image_size")]
    )
    ours, theirs = {}, {}
    for block in ("base", "acb"):
        if options.pytorch:
            our_best, their_best, _ = compare_pytorch.best_of_both(
                shared, network, block, options.batch
            )
            theirs[block] = their_best["images_per_second"]
        else:
            our_best = compare_pytorch.run_ours(shared, network, block, options.batch)
        ours[block] = our_best["images_per_second"]
    print(
        f"acb_cost mode=train network={network} per_batch_size={options.batch} "
        f"base_images_per_second={ours['base']:.2f} "
        f"acb_images_per_second={ours['acb']:.2f} cost={ours['base'] / ours['acb']:.2f}"
        + (f" pytorch_cost={theirs['base'] / theirs['acb']:.2f}" if theirs else ""),
        flush=True,
    )


def evaluate(options, network):
    """Print images/s of the plain and the fused network by each engine that is installed."""
    from src.cli.recipes import load_config
    from src.utils.device import prepare_process, select_device

    prepare_process()
    import numpy as np

    from src.inference.mindspore_backend import create_backend
    from src.inference.onnx_backend import onnx_is_installed
    from src.kernels.library import KernelChoice
    from src.models.create import create_network
    from src.models.reparam import fuse

    select_device("CPU", 0)
    images = np.random.default_rng(0).integers(
        0, 256, (options.batch, options.image_size, options.image_size, 3), np.uint8
    )
    for name in ("mindspore", *(("onnx",) if onnx_is_installed() else ())):
        engines = {}
        for block in ("base", "acb"):
            config = load_config(
                {
                    "data_path": "none",
                    "network": network,
                    "block": block,
                    "num_classes": "1000",
                    "eval_engine": name,
                    "image_size": str(options.image_size),
                }
            )
            built = create_network(config)
            engines[block] = create_backend(
                fuse(built) if block == "acb" else built, config, KernelChoice()
            )
        seconds = medians_in_turn(
            {block: lambda engine=engine: engine(images) for block, engine in engines.items()},
            max(options.steps, _SHORTEST_EVALUATION),
        )
        print(
            f"acb_cost mode=eval engine={name} network={network} batch={options.batch} "
            f"base_images_per_second={options.batch / seconds['base']:.1f} "
            f"fused_images_per_second={options.batch / seconds['acb']:.1f} "
            f"fused_over_base={seconds['base'] / seconds['acb']:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    run_process(lambda signals: main(sys.argv[1:]))
