"""The CIFAR networks trained on CIFAR-10, in turn with PyTorch, on the same cores:

    python3 benchmarks/compare_cifar.py --data_path=DIR [--networks=cifar_quick,vgg16_cifar]
        [--blocks=base,acb] [--images=2560] [--epochs=3] [--rounds=3] [--ranks=2] [--packed=0]

DIR has the class folders train/. Ours is train.py as a user starts it, with its input pipeline,
from the class folders of the first `--images` pictures or, with --packed=1, from them packed. Its
rate is the median of the epochs after the first, in which the pictures are decoded. PyTorch trains
from pictures that are decoded and normalised in memory, with the same padding, crops, flips, batch
of 128 and recipe; its rate is the median step. Each side runs as one process on all cores and as
`--ranks` processes of one core (DistributedDataParallel over gloo), PyTorch also in both layouts,
and the best of the rounds counts. Needs `bash scripts/setup.sh --parity`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.compare_pytorch import free_port  # noqa: E402
from benchmarks.processes import last_line, mpirun_environment, mpirun_words, take_cores  # noqa: E402
from benchmarks.timing import median_seconds  # noqa: E402
from src.cli.run import run_process  # noqa: E402

_NETWORKS = "cifar_quick,vgg16_cifar,resnet56_cifar,wrn16_8_cifar"
_LAYOUTS = ("nchw", "channels_last")
_BATCH, _PADDING = 128, 4


def main(arguments):
    options = parse(arguments)
    if options.worker:
        train_pytorch(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data = link_images(Path(options.data_path) / "train", folder / "train", options.images)
        source = pack(data, folder / "train.safetensors") if options.packed else data
        for network in options.networks.split(","):
            for block in options.blocks.split(","):
                compare(options, network, block, data, source, folder)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", required=True)
    parser.add_argument("--networks", default=_NETWORKS)
    parser.add_argument("--blocks", default="base,acb")
    parser.add_argument("--images", type=int, default=2560)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--packed", type=int, default=0)
    for hidden in ("--worker", "--port"):
        parser.add_argument(hidden, type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--layout", default="nchw", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def link_images(source, target, count):
    """Class folders of links to the first ``count`` pictures of ``source``, in equal parts."""
    classes = sorted(folder for folder in source.iterdir() if folder.is_dir())
    for folder in classes:
        (target / folder.name).mkdir(parents=True)
        for file in sorted(folder.iterdir())[: count // len(classes)]:
            (target / folder.name / file.name).symlink_to(file.resolve())
    return target


def pack(data, target):
    words = [sys.executable, "scripts/pack_dataset.py", f"--data_path={data}"]
    subprocess.run(
        [*words, f"--result_path={target}"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
    )
    return target


def compare(options, network, block, data, source, folder):
    ours, theirs = {}, {}
    for number in range(options.rounds):
        for ranks in sorted({1, options.ranks}):
            output = folder / f"{network}-{block}-{ranks}-{number}"
            rate = train_ours(network, block, ranks, source, output, options.epochs)
            ours[ranks] = max(ours.get(ranks, 0), rate)
            for layout in _LAYOUTS:
                words = [
                    __file__,
                    "--worker=1",
                    f"--networks={network}",
                    f"--blocks={block}",
                    f"--data_path={data}",
                    f"--epochs={options.epochs}",
                    f"--ranks={ranks}",
                    f"--layout={layout}",
                    f"--port={free_port()}",
                ]
                rate = float(last_line(mpirun_words(ranks, *words)))
                theirs[ranks, layout] = max(theirs.get((ranks, layout), 0), rate)
    our_ranks, their_form = max(ours, key=ours.get), max(theirs, key=theirs.get)
    print(
        f"compare_cifar network={network} block={block} packed={options.packed} "
        f"ranks={our_ranks} images_per_second={ours[our_ranks]:.1f} "
        f"pytorch_ranks={their_form[0]} pytorch_layout={their_form[1]} "
        f"pytorch_images_per_second={theirs[their_form]:.1f} "
        f"ratio={ours[our_ranks] / theirs[their_form]:.2f}",
        flush=True,
    )


def train_ours(network, block, ranks, data, output, epochs):
    """Images per second of train.py, the median of the epochs after the first."""
    words = [
        ROOT / "train.py",
        f"--config_path=acnet_{network}_cifar10",
        f"--block={block}",
        f"--data_path={data}",
        f"--max_epoch={epochs}",
        f"--output_path={output}",
        f"--ckpt_interval={epochs}",
        "--run_eval=0",
        "--deploy=0",
        *(["--run_distribute=1"] if ranks > 1 else []),
    ]
    command = mpirun_words(ranks, *words) if ranks > 1 else [sys.executable, *map(str, words)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=mpirun_environment())
    (metrics,) = output.glob("*/metrics.jsonl")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return statistics.median(row["images_per_second"] for row in rows[1:])


def train_pytorch(options):
    """On each rank: train, and print the images per second of all ranks; rank 0 prints."""
    rank, share = take_cores(options.ranks)
    import torch
    from torch.nn import functional

    from benchmarks.pytorch_cifar import build_cifar

    torch.set_num_threads(share)
    torch.manual_seed(rank)
    images, labels = read_images(options.data_path)
    network = build_cifar(options.networks, options.blocks).train()
    channels_last = options.layout == "channels_last"
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
    parameters = [
        {"params": [value], "lr": 0.02 if name.endswith("bias") else 0.01}
        for name, value in network.named_parameters()
    ]
    optimizer = torch.optim.SGD(parameters, momentum=0.9, weight_decay=1e-4)
    if options.ranks > 1:
        address = f"tcp://127.0.0.1:{options.port}"
        torch.distributed.init_process_group(
            "gloo", init_method=address, rank=rank, world_size=options.ranks
        )
        network = torch.nn.parallel.DistributedDataParallel(network)
    batch = _BATCH // options.ranks

    def step():
        chosen = torch.randint(0, len(labels), (batch,))
        inputs = augment(images[chosen])
        if channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad(set_to_none=True)
        loss = functional.cross_entropy(network(inputs), labels[chosen])
        loss.backward()
        optimizer.step()
        return loss.item()

    steps = (options.epochs - 1) * len(labels) // _BATCH
    seconds = median_seconds(step, steps)
    if rank == 0:
        print(batch * options.ranks / seconds, flush=True)
    if options.ranks > 1:
        torch.distributed.barrier()
    # Without taking gloo down: once a rank aborted there (status 134).
    os._exit(0)


def read_images(folder):
    """(images (N, 3, 32, 32) float32 in -1 to 1, labels (N,)) of class folders."""
    import numpy as np
    import torch

    from src.dataset.sources import open_images

    images = open_images(folder, "train")
    pixels = np.stack([images.load(index) for index in range(len(images))])
    normalised = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    return normalised.contiguous(), torch.from_numpy(images.labels).long()


def augment(images):
    """(B, 3, S, S), padded with black, cropped and flipped at random."""
    import torch

    count, side = len(images), images.shape[-1]
    padded = torch.nn.functional.pad(images, (_PADDING,) * 4, value=-1.0)
    tops, lefts = torch.randint(0, 2 * _PADDING + 1, (2, count))
    rows, columns = (first[:, None] + torch.arange(side) for first in (tops, lefts))
    turned = torch.rand(count) < 0.5
    columns[turned] = columns[turned].flip(1)
    return padded.permute(0, 2, 3, 1)[
        torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]
    ].permute(0, 3, 1, 2)


if __name__ == "__main__":
    run_process(lambda signals: main(sys.argv[1:]))
