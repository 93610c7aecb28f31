"""Cifar-quick trained by PyTorch, to compare accuracies with this program's:

    python3 benchmarks/pytorch_training.py --data_path=DIR [--epochs=150] [--seed=1]
        [--amp_level=O0] [--threads=1] [--runs=outputs/pytorch_training]
        [--results=docs/pytorch_training]

DIR has the class folders train/ and test/. The recipe is configs/acnet_cifar_quick_cifar10.yaml, on
the same pixels; crops, flips and order are PyTorch's own. --amp_level=O2 computes convolutions and
dense layers in bfloat16. A run that was killed continues from its last epoch when the command is
started again. Prints the test accuracy every five epochs, and writes a JSON file of the result.
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.acnet_table import commit, processor  # noqa: E402
from benchmarks.pytorch_reference import Quick  # noqa: E402
from src.cli.recipes import load_config  # noqa: E402
from src.dataset.sources import open_images  # noqa: E402

_EVERY = 5


class PlainConv(torch.nn.Sequential):
    """A convolution with its batch norm, where ``Quick`` has an ACB."""

    def __init__(self, in_channels, out_channels):
        super().__init__(
            torch.nn.Conv2d(in_channels, out_channels, 5, padding=2, bias=False),
            torch.nn.BatchNorm2d(out_channels),
        )


def main():
    options = parse()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    config = load_config(
        {"config_path": "acnet_cifar_quick_cifar10", "data_path": options.data_path}
    )
    network = Quick(10)
    for name, (inputs, outputs) in {"conv1": (3, 32), "conv2": (32, 32), "conv3": (32, 64)}.items():
        setattr(network, name, PlainConv(inputs, outputs))
    network = network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        [
            {"params": [value], "factor": config.bias_lr_factor if name.endswith("bias") else 1}
            for name, value in network.named_parameters()
        ],
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    train, test = (read(options.data_path, part, config) for part in ("train", "test"))
    name = f"pytorch_base_{options.epochs}_seed{options.seed}_{options.amp_level}"
    kept = Path(options.runs) / f"{name}.pt"
    state = torch.load(kept, weights_only=False) if kept.is_file() else None
    history = {} if state is None else state["history"]
    if state is not None:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
    for epoch in range(1 if state is None else state["epoch"] + 1, options.epochs + 1):
        started = time.perf_counter()
        loss = train_epoch(network, optimizer, train, config, epoch, options)
        seconds = time.perf_counter() - started
        history[epoch] = {"loss": round(loss, 6), "seconds": round(seconds, 1)}
        if epoch % _EVERY == 0 or epoch == options.epochs:
            history[epoch]["top1"] = accuracy(network, test, options)
            print(f"pytorch_training epoch={epoch} {history[epoch]}", flush=True)
        kept.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "network": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "epoch": epoch,
            "history": history,
        }
        torch.save(state, f"{kept}.partial")
        os.replace(f"{kept}.partial", kept)
    result = {
        "framework": f"PyTorch {torch.__version__}",
        "network": "cifar_quick",
        "block": "base",
        "seed": options.seed,
        "epochs": options.epochs,
        "amp_level": options.amp_level,
        "top1": history[options.epochs]["top1"],
        "last_loss": history[options.epochs]["loss"],
        "top1_by_epoch": {epoch: one["top1"] for epoch, one in history.items() if "top1" in one},
        "hours": round(sum(one["seconds"] for one in history.values()) / 3600, 2),
        "machine": processor(),
        "commit": commit(),
    }
    results = Path(options.results)
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{name}.json").write_text(json.dumps(result, indent=1))


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", required=True)
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--amp_level", default="O0", choices=("O0", "O2"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", default="outputs/pytorch_training")
    parser.add_argument("--results", default="docs/pytorch_training")
    return parser.parse_args()


def read(folder, part, config):
    """(images (N, 3, 32, 32) float32, normalised; labels (N,)) of the class folders of ``part``."""
    images = open_images(str(Path(folder) / part), "train")
    pixels = np.stack([images.load(index) for index in range(len(images))])
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (config.mean, config.std))
    scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (scaled - mean) / std, torch.from_numpy(images.labels).long()


def train_epoch(network, optimizer, data, config, epoch, options):
    """Train for one epoch; the mean loss over its steps."""
    images, labels = data
    batch, pad = config.global_batch_size, config.crop_padding
    steps = len(labels) // batch
    order, total = torch.randperm(len(labels)), 0.0
    # Padding is black, as before normalisation.
    black = ((0 - torch.tensor(config.mean)) / torch.tensor(config.std)).reshape(1, 3, 1, 1)
    network.train()
    for step in range(steps):
        progress = ((epoch - 1) * steps + step) / (options.epochs * steps)
        for group in optimizer.param_groups:
            group["lr"] = group["factor"] * config.lr * (1 + math.cos(math.pi * progress)) / 2
        chosen = order[step * batch : (step + 1) * batch]
        side = images.shape[-1]
        padded = black.expand(batch, 3, side + 2 * pad, side + 2 * pad).clone()
        padded[:, :, pad : pad + side, pad : pad + side] = images[chosen]
        tops, lefts = torch.randint(0, 2 * pad + 1, (2, batch))
        rows, columns = (first[:, None] + torch.arange(side) for first in (tops, lefts))
        turned = torch.rand(batch) < 0.5
        columns[turned] = columns[turned].flip(1)
        inputs = padded.permute(0, 2, 3, 1)[
            torch.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]
        ].permute(0, 3, 1, 2)
        loss = functional.cross_entropy(forward(network, inputs, options), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / steps


def forward(network, images, options):
    with torch.autocast("cpu", torch.bfloat16, enabled=options.amp_level == "O2"):
        return network(images).float()


@torch.no_grad()
def accuracy(network, data, options):
    """Top-1 in percent."""
    network.eval()
    images, labels = data
    right = sum(
        int((forward(network, part, options).argmax(1) == target).sum())
        for part, target in zip(images.split(250), labels.split(250))
    )
    return round(100 * right / len(labels), 2)


if __name__ == "__main__":
    main()
