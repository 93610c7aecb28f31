"""What the ACNet paper says of trained kernels, measured on checkpoints:

    python3 benchmarks/acnet_claims.py --data_path=DIR --checkpoints=FILE[,FILE...]
        [--ratios=0.1,0.2,0.3] [--seeds=3] [--results=docs/acnet_claims]

DIR has class folders to evaluate on, such as CIFAR-10's test/. Give one checkpoint without blocks
and one with acb, before or after fusion. For each it prints, and writes to a JSON file:

- top-1 on the images turned by 0 to 180 degrees (section 4.4 of the paper, robustness to rotation);
- top-1 after that part of all weights of the k x k kernels was set to 0, drawn at random among
  those of the skeleton (the central row and column), of the corners, or of all (section 4.5).
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.acnet_study import rotated  # noqa: E402
from benchmarks.acnet_table import commit, processor  # noqa: E402
from src.cli.run import run_process  # noqa: E402
from src.utils.device import prepare_process  # noqa: E402
from src.utils.errors import UserError  # noqa: E402

ANGLES = (0, 15, 30, 45, 90, 135, 180)
POSITIONS = ("skeleton", "corners", "all")


def main(arguments):
    options = parse(arguments)
    prepare_process()
    from src.utils.device import select_device

    select_device("CPU", 0)
    results = Path(options.results)
    results.mkdir(parents=True, exist_ok=True)
    for path in map(Path, options.checkpoints.split(",")):
        found = claims(path, options)
        print(f"{found['network']} {found['block']} ({path})")
        print("  turned by " + ", ".join(f"{a}: {top1:.2f}" for a, top1 in found["turned"].items()))
        for name, by_ratio in found["pruned"].items():
            runs = (f"{r}: {', '.join(f'{top1:.2f}' for top1 in by_ratio[r])}" for r in by_ratio)
            print(f"  {name} pruned by " + "; ".join(runs))
        name = f"{found['network']}_{found['block']}_seed{found['seed']}.json"
        (results / name).write_text(json.dumps(found, indent=1))


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", required=True)
    parser.add_argument("--checkpoints", required=True)
    parser.add_argument("--ratios", default="0.1,0.2,0.3")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", default="docs/acnet_claims")
    return parser.parse_args(arguments)


def claims(path, options):
    """All figures of one checkpoint."""
    from src.cli.recipes import load_config
    from src.dataset.sources import open_images
    from src.distributed.communicator import Communicator
    from src.inference.backends import open_backend
    from src.inference.evaluation import Evaluator
    from src.inference.mindspore_backend import MindSporeBackend
    from src.kernels.library import choose_kernels
    from src.models.create import create_network
    from src.models.reparam import fuse
    from src.models.weights import copy_weights

    kernels = choose_kernels(load_config({"data_path": options.data_path}))
    opened = open_backend(path, {}, kernels)
    config = opened.model.config
    images = open_images(options.data_path, "val")
    network = opened.backend.network
    if opened.model.has_branches:
        plain = create_network(config, fused=opened.model.fused)
        copy_weights(network, plain)
        network = create_network(config, kernels.library, fused=True)
        copy_weights(fuse(plain), network)
    backend = MindSporeBackend(network.set_train(False), config)

    def top1(of_images):
        return round(Evaluator(of_images, config, Communicator())(backend).top1, 2)

    turned = {angle: top1(rotated(images, config, angle)) for angle in ANGLES}
    upright = rotated(images, config, 0)
    pruned = {
        name: {
            ratio: [
                pruned_top1(network, name, float(ratio), seed, lambda: top1(upright))
                for seed in range(options.seeds)
            ]
            for ratio in options.ratios.split(",")
        }
        for name in POSITIONS
    }
    return {
        "network": config.network,
        "block": config.block,
        "seed": opened.metadata.get("config", {}).get("seed"),
        "images": len(images),
        "turned": turned,
        "pruned": pruned,
        "machine": processor(),
        "commit": commit(),
    }


def pruned_top1(network, name, ratio, seed, top1):
    """Top-1 without ``ratio`` of the weights of each k x k kernel, all of them at ``name``."""
    import numpy as np
    from mindspore import Tensor, nn

    random, kept = np.random.default_rng(seed), []
    for _, cell in network.cells_and_names():
        if isinstance(cell, nn.Conv2d) and cell.kernel_size in ((3, 3), (5, 5)):
            weight = cell.weight.asnumpy().copy()
            kept.append((cell.weight, weight))
            size, middle = weight.shape[2], weight.shape[2] // 2
            skeleton = np.zeros((size, size), bool)
            skeleton[middle], skeleton[:, middle] = True, True
            chosen = {"skeleton": skeleton, "corners": ~skeleton, "all": skeleton | True}[name]
            places = np.flatnonzero(np.broadcast_to(chosen, weight.shape))
            count = round(ratio * weight.size)
            if count > len(places):
                raise UserError(f"{ratio:g} of the weights are more than there are at '{name}'")
            removed = random.choice(places, count, replace=False)
            pruned = weight.copy()
            pruned.reshape(-1)[removed] = 0
            cell.weight.set_data(Tensor(pruned))
    result = top1()
    for parameter, weight in kept:
        parameter.set_data(Tensor(weight))
    return result


if __name__ == "__main__":
    run_process(lambda signals: main(sys.argv[1:]))
