"""Whether the steps of a training run are exactly those of stochastic gradient descent:

    python3 benchmarks/exact_steps.py [--data_path=DIR] [--steps=60] [--every=10] [--epochs=12]

Trains cifar_quick by ACNet's recipe, fitted to `epochs` epochs, with a checkpoint after every step.
Then takes every tenth step again in PyTorch, from the checkpoint before it and with the same batch,
in float64. Prints a line for each: the largest difference of a weight, relative to the largest
change of that parameter in the step; and the same for PyTorch in float32.
"""

import argparse
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.nn import functional

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.pytorch_reference import build  # noqa: E402
from src.cli.recipes import load_config  # noqa: E402
from src.dataset.batches import TrainBatches  # noqa: E402
from src.dataset.sources import open_images  # noqa: E402
from src.models.networks import torch_name  # noqa: E402
from src.models.weight_files import OPTIMIZER_PREFIX, read_weights  # noqa: E402

_NETWORK, _RECIPE = "cifar_quick", "acnet_cifar_quick_cifar10"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", default="digits")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    flags = {
        "config_path": _RECIPE,
        "data_path": options.data_path,
        "max_epoch": options.epochs,
        "seed": options.seed,
        "run_eval": 0,
        "deploy": 0,
    }
    config = load_config(flags)
    batches = TrainBatches(open_images(options.data_path, "train"), config, 0, 1)
    with tempfile.TemporaryDirectory() as folder:
        train(flags, options.steps, folder)
        for step in range(1, options.steps, options.every):
            before, after = (
                weights_after(number, batches.steps_per_epoch, folder)
                for number in (step, step + 1)
            )
            progress = step / (options.epochs * batches.steps_per_epoch)
            exact, rounded = (
                step_of_pytorch(before, batches[step], progress, config, dtype)
                for dtype in (torch.float64, torch.float32)
            )
            print(
                f"exact_steps step={step + 1} ours={difference(after, exact, before):.1e} "
                f"pytorch_float32={difference(rounded, exact, before):.1e}",
                flush=True,
            )


def train(flags, steps, folder):
    """Train for ``steps`` steps with a checkpoint after each."""
    words = [f"--{key}={value}" for key, value in flags.items()]
    words += [f"--output_path={folder}", f"--max_steps={steps}"]
    words += ["--ckpt_interval_steps=1", f"--keep_checkpoint_max={steps}"]
    subprocess.run([sys.executable, ROOT / "train.py", *words], check=True, stdout=sys.stderr)


def weights_after(step, steps_per_epoch, folder):
    """{name: array} of the checkpoint after ``step`` steps."""
    epoch, in_epoch = divmod(step - 1, steps_per_epoch)
    name = f"{_NETWORK}-{epoch + 1}_{in_epoch + 1}.ckpt"
    return read_weights(next(Path(folder).glob(f"*/ckpt_0/{name}")))[0]


def step_of_pytorch(before, batch, progress, config, dtype):
    """{name: weight} after the step from ``before``, computed by PyTorch in ``dtype``.

    Args:
        progress: fraction of the run that is done, which gives the cosine's learning rate.
    """
    network = build(_NETWORK, config.num_classes or 10).to(dtype).train()
    names = {
        torch_name(name, _NETWORK): name
        for name in before
        if not name.startswith(OPTIMIZER_PREFIX) and "moving" not in name
    }
    parameters = dict(network.named_parameters())
    rate = config.lr * (1 + math.cos(math.pi * progress)) / 2
    optimizer = torch.optim.SGD(
        [
            {"params": [value], "lr": rate * (config.bias_lr_factor if is_bias(name) else 1)}
            for name, value in parameters.items()
        ],
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    with torch.no_grad():
        for theirs, ours in names.items():
            parameters[theirs].copy_(torch.from_numpy(before[ours]))
            state = torch.from_numpy(before[f"{OPTIMIZER_PREFIX}momentum.{ours}"])
            optimizer.state[parameters[theirs]]["momentum_buffer"] = state.to(dtype)
    mean, std = (torch.tensor(values, dtype=dtype) for values in (config.mean, config.std))
    images = ((torch.from_numpy(batch.images).to(dtype) / 255 - mean) / std).permute(0, 3, 1, 2)
    functional.cross_entropy(network(images), torch.from_numpy(batch.labels).long()).backward()
    optimizer.step()
    return {ours: parameters[theirs].detach().double().numpy() for theirs, ours in names.items()}


def is_bias(name):
    return name.endswith("bias")


def difference(found, exact, before):
    """Largest difference of a parameter relative to its largest change."""
    return max(
        abs(found[name] - exact[name]).max() / abs(exact[name] - before[name]).max()
        for name in exact
    )


if __name__ == "__main__":
    main()
