"""Training and evaluation rates compared with PyTorch's, in turn, on the same cores:

    python3 benchmarks/compare_pytorch.py [--cases=resnext50_32x4d:16,alexnet:32,resnet18+acb:16]
        [--mode=train|eval]
        [--ranks=2] [--steps=5] [--rounds=2]
        [--precision=float32|bfloat16]

Training: `--ranks` ranks of one core and one thread each, 224x224, the whole step (forward,
backward, mean over ranks, momentum with weight decay). Here: train_step.py under mpirun. PyTorch:
DistributedDataParallel over gloo, the best of eager NCHW, eager channels_last and, with
--compile=1, torch.compile. With --precision=bfloat16 ours trains in it (amp_level=O2), and two
ratios are printed: over PyTorch under autocast in bfloat16, and over PyTorch in float32.
Evaluation: random images through the network on all cores, the engine that eval.py picks and
PyTorch's best of NCHW and channels_last. Best of the rounds on both sides. Needs `bash
scripts/setup.sh --parity`.
"""

import argparse
import json
import os
import re
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.processes import last_line, mpirun_words, take_cores  # noqa: E402
from benchmarks.timing import median_seconds  # noqa: E402
from src.cli.run import run_process  # noqa: E402

_AMP_LEVELS = {"float32": "O0", "bfloat16": "O2"}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main(arguments):
    options = parse(arguments)
    if options.worker:
        WORKERS[options.worker](options)
        return
    for case in options.cases.split(","):
        name, _, batch = case.partition(":")
        network, _, block = name.partition("+")
        compare(options, network, block or "base", int(batch))


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="resnext50_32x4d:16,alexnet:32,resnet18+acb:16")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--mode", choices=("train", "eval"), default="train")
    parser.add_argument("--compile", type=int, default=0)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    for hidden in ("--worker", "--network", "--block", "--layout"):
        parser.add_argument(hidden, default="", help=argparse.SUPPRESS)
    parser.add_argument("--address", default="127.0.0.1", help=argparse.SUPPRESS)
    for hidden in ("--batch", "--port"):
        parser.add_argument(hidden, type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def compare(options, network, block, batch):
    """Run both sides in turn and print the line of one case."""
    ours, theirs, layout, in_float32 = best_of_both(options, network, block, batch)
    over_float32 = (
        f"pytorch_float32_images_per_second={_rate(in_float32):.2f} "
        f"ratio_over_float32={_rate(ours) / _rate(in_float32):.2f} "
        if options.precision != "float32"
        else ""
    )
    print(
        f"compare_pytorch mode={options.mode} precision={options.precision} network={network} "
        f"block={block} "
        f"ranks={options.ranks if options.mode == 'train' else 1} per_batch_size={batch} "
        f"images_per_second={_rate(ours):.2f} "
        f"pytorch_images_per_second={_rate(theirs):.2f} pytorch_layout={layout} "
        f"ratio={_rate(ours) / _rate(theirs):.2f} {over_float32}"
        f"peak_rss_mib={ours['peak_rss_mib']:.0f} "
        f"pytorch_peak_rss_mib={theirs['peak_rss_mib']:.0f}",
        flush=True,
    )


def best_of_both(options, network, block, batch):
    """Run ``options.rounds`` rounds in turn.

    Returns:
        (our result, PyTorch's in the same precision, its best layout, PyTorch's in float32). A
        result is a dictionary.
    """
    layouts = ["nchw", "channels_last"] + (["compile"] if options.compile else [])
    precisions = dict.fromkeys([options.precision, "float32"])
    ours, theirs = [], {}
    for _ in range(options.rounds):
        ours.append(run_ours(options, network, block, batch))
        for precision in precisions:
            for layout in layouts:
                result = run_worker(
                    "pytorch_" + options.mode, options, network, block, batch, layout, precision
                )
                theirs[precision, layout] = max(
                    theirs.get((precision, layout), result), result, key=_rate
                )
    best = {
        precision: max(layouts, key=lambda name: _rate(theirs[precision, name]))
        for precision in precisions
    }
    layout = best[options.precision]
    return (
        max(ours, key=_rate),
        theirs[options.precision, layout],
        layout,
        theirs["float32", best["float32"]],
    )


def _rate(result):
    return result["images_per_second"]


def run_ours(options, network, block, batch):
    if options.mode == "eval":
        return run_worker("our_eval", options, network, block, batch, "", options.precision)
    printed = last_line(
        mpirun_words(
            options.ranks,
            ROOT / "benchmarks" / "train_step.py",
            f"--network={network}",
            f"--block={block}",
            f"--per_batch_size={batch}",
            f"--steps={options.steps}",
            f"--image_size={options.image_size}",
            f"--amp_level={_AMP_LEVELS[options.precision]}",
        )
    )
    found = dict(re.findall(r"(\w+)=(\S+)", printed))
    return {name: float(found[name]) for name in ("images_per_second", "peak_rss_mib")}


def run_worker(worker, options, network, block, batch, layout, precision):
    words = [
        __file__,
        f"--worker={worker}",
        f"--network={network}",
        f"--block={block}",
        f"--batch={batch}",
        f"--layout={layout}",
        f"--steps={options.steps}",
        f"--ranks={options.ranks}",
        f"--image_size={options.image_size}",
        f"--port={free_port()}",
        f"--precision={precision}",
    ]
    return json.loads(
        last_line(
            mpirun_words(options.ranks, *words)
            if worker == "pytorch_train"
            else [sys.executable, *words]
        )
    )


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def pytorch_train(options):
    """On each rank: DistributedDataParallel's step; rank 0 prints."""
    rank, share = take_cores(options.ranks)
    import torch

    from benchmarks.pytorch_reference import build, normalise

    torch.set_num_threads(share)
    torch.manual_seed(0)
    network = build(options.network, 1000, options.block).train()
    if options.layout != "nchw":
        network = network.to(memory_format=torch.channels_last)
    if options.ranks > 1:
        address = f"tcp://{options.address}:{options.port}"
        torch.distributed.init_process_group(
            "gloo", init_method=address, rank=rank, world_size=options.ranks
        )
        network = torch.nn.parallel.DistributedDataParallel(network)
    if options.layout == "compile":
        network = torch.compile(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    images = torch.randint(
        0, 256, (options.batch, options.image_size, options.image_size, 3), dtype=torch.uint8
    )
    labels = torch.randint(0, 1000, (options.batch,))
    loss_function = torch.nn.CrossEntropyLoss(label_smoothing=0.1)

    def step():
        inputs = normalise(images, _MEAN, _STD)
        if options.layout != "nchw":
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bfloat16"):
            loss = loss_function(network(inputs), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    seconds = median_seconds(
        step, options.steps, torch.distributed.barrier if options.ranks > 1 else lambda: None
    )
    if rank == 0:
        print(
            json.dumps(
                {
                    "images_per_second": options.batch * options.ranks / seconds,
                    "peak_rss_mib": peak_rss_mib(),
                }
            ),
            flush=True,
        )
    if options.ranks > 1:
        torch.distributed.barrier()
    # Without taking gloo down: once a rank aborted there (status 134).
    os._exit(0)


def pytorch_eval(options):
    import torch

    from benchmarks.pytorch_reference import build, normalise

    torch.manual_seed(0)
    network = build(options.network, 1000, options.block).eval()
    if options.layout != "nchw":
        network = network.to(memory_format=torch.channels_last)
    images = torch.randint(
        0, 256, (options.batch, options.image_size, options.image_size, 3), dtype=torch.uint8
    )

    def step():
        with torch.inference_mode():
            inputs = normalise(images, _MEAN, _STD)
            if options.layout != "nchw":
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bfloat16"):
                return network(inputs).float().numpy()

    seconds = median_seconds(step, options.steps)
    print(
        json.dumps({"images_per_second": options.batch / seconds, "peak_rss_mib": peak_rss_mib()})
    )


def our_eval(options):
    from src.cli.recipes import load_config
    from src.utils.device import prepare_process, select_device

    config = load_config(
        {
            "data_path": "none",
            "network": options.network,
            "block": options.block,
            "num_classes": "1000",
            "image_size": str(options.image_size),
            "amp_level": _AMP_LEVELS[options.precision],
        }
    )
    prepare_process()
    import numpy as np

    from src.inference.mindspore_backend import create_backend
    from src.kernels.library import choose_kernels
    from src.models.create import create_network

    select_device("CPU", 0)
    kernels = choose_kernels(config)
    backend = create_backend(create_network(config, kernels.library), config, kernels)
    images = np.random.default_rng(0).integers(
        0, 256, (options.batch, options.image_size, options.image_size, 3), np.uint8
    )
    seconds = median_seconds(lambda: backend(images), options.steps)
    print(
        json.dumps({"images_per_second": options.batch / seconds, "peak_rss_mib": peak_rss_mib()})
    )


def peak_rss_mib():
    from src.utils.machine import peak_bytes

    return peak_bytes() / 2**20


WORKERS = {"pytorch_train": pytorch_train, "pytorch_eval": pytorch_eval, "our_eval": our_eval}


if __name__ == "__main__":
    run_process(lambda signals: main(sys.argv[1:]))
