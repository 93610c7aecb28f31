"""Check and time everything on a GPU, in one command (after `bash scripts/setup.sh --gpu`):

    python3 benchmarks/gpu_check.py [--networks=alexnet,resnet18+acb,resnext50_32x4d]
        [--batches=64,128,256] [--steps=30]

Each network: loss and gradient norms of one step against CPU in float32; images/s of training in
O0, O2 and O3 at the best of the batches, next to PyTorch on the same GPU (float32 and autocast,
channels_last) if a PyTorch with CUDA is installed; the fused ACNet against the plain network in
inference. Each measurement is a process of its own. `--device_target=CPU` shows the program itself
to work if there is no GPU.
"""

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.timing import median_seconds  # noqa: E402
from src.cli.run import run_process  # noqa: E402
from src.utils.errors import PartialFailure  # noqa: E402


def main(arguments):
    options = parse(arguments)
    if options.worker:
        from src.utils.device import prepare_process

        prepare_process(options.device_target)
        print(json.dumps(WORKERS[options.worker](options)))
        return
    if options.device_target == "GPU":
        from src.utils.device import compile_for_new_gpu
        from src.utils.gpu import check_device, prepare_gpu

        prepare_gpu()
        check_device(0)
        compile_for_new_gpu(0)
    failures = []
    for network in options.networks.split(","):
        report(network, options, failures)
    if failures:
        raise PartialFailure(f"{len(failures)} measurements failed, the first: {failures[0]}")


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default="alexnet,resnet18+acb,resnext50_32x4d")
    parser.add_argument("--batches", default="64,128,256")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--device_target", choices=("GPU", "CPU"), default="GPU")
    parser.add_argument("--worker", choices=tuple(WORKERS), default=None, help=argparse.SUPPRESS)
    parser.add_argument("--network", help=argparse.SUPPRESS)
    parser.add_argument("--amp_level", default="O0", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=8, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def report(network, options, failures):
    """Print the lines of one network; what failed is added to ``failures``."""

    def fastest(worker, of=network, **changes):
        """(images/s, batch) at the best of the batches, or None."""
        batches = map(int, options.batches.split(","))
        reports = (
            (measured(worker, options, of, failures, batch=batch, **changes), batch)
            for batch in batches
        )
        return max(
            (
                (report["images_per_second"], batch)
                for report, batch in reports
                if report and report["images_per_second"]
            ),
            default=None,
        )

    device, cpu = (
        measured("gradients", options, network, failures, device_target=target)
        for target in (options.device_target, "CPU")
    )
    if device and cpu:
        norms = [
            abs(device["norms"][name] / norm - 1)
            for name, norm in cpu["norms"].items()
            if norm > 1e-6
        ]
        print(
            f"gpu_check network={network} compared_with=CPU "
            f"loss_difference={abs(device['loss'] / cpu['loss'] - 1):.2e} "
            f"largest_gradient_norm_difference={max(norms):.2e}",
            flush=True,
        )
    levels = ("O0", "O2", "O3") if options.device_target == "GPU" else ("O0",)
    ours = {level: fastest("training", amp_level=level) for level in levels}
    theirs = {level: fastest("pytorch", amp_level=level) for level in levels[:2]}
    for level, found in ours.items():
        if found:
            # PyTorch has one mixed precision.
            other = theirs.get(level, theirs[levels[min(1, len(levels) - 1)]])
            comparison = (
                f" pytorch_images_per_second={other[0]:.1f} pytorch_batch={other[1]} "
                f"ratio={found[0] / other[0]:.2f}"
                if other
                else ""
            )
            print(
                f"gpu_check network={network} amp_level={level} batch={found[1]} "
                f"images_per_second={found[0]:.1f}{comparison}",
                flush=True,
            )
    plain, fused = (fastest("inference", of=name) for name in (network.partition("+")[0], network))
    if plain and fused:
        print(
            f"gpu_check network={network} inference base_images_per_second={plain[0]:.1f} "
            f"fused_images_per_second={fused[0]:.1f}",
            flush=True,
        )


def measured(worker, options, network, failures, **changes):
    """What a worker process reports; None if it failed, whose error is shown."""
    values = {**vars(options), **changes, "worker": worker, "network": network}
    words = [f"--{name}={value}" for name, value in values.items() if value is not None]
    finished = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True)
    if finished.returncode:
        failures.append(
            f"{worker} of {network} with {changes} ended with status {finished.returncode}"
        )
        return None
    return json.loads(finished.stdout.splitlines()[-1])


def set_up(options):
    """(network, configuration, batch) on the chosen device."""
    from src.cli.recipes import load_config
    from src.utils.device import select_device

    name, _, block = options.network.partition("+")
    config = load_config(
        {
            "data_path": "none",
            "network": name,
            "block": block or "base",
            "num_classes": "1000",
            "image_size": str(options.image_size),
            "per_batch_size": str(options.batch),
            "dropout": "0",
            "amp_level": options.amp_level,
            "device_target": options.device_target,
        }
    )
    import numpy as np

    from src.dataset.batches import Batch
    from src.models.create import create_network

    select_device(options.device_target, 0)
    random = np.random.default_rng(0)
    images = random.integers(
        0, 256, (options.batch, config.image_size, config.image_size, 3), np.uint8
    )
    return (
        create_network(config),
        config,
        Batch(images, random.integers(0, 1000, options.batch).astype(np.int32)),
    )


def gradients_of_one_step(options):
    import numpy as np
    from mindspore import Tensor

    from src.models.layers import InputNormalizer
    from src.training.cross_entropy import CrossEntropy
    from src.training.step import ForwardBackward, NetworkWithLoss

    network, config, batch = set_up(options)
    parameters = network.trainable_params()
    step = ForwardBackward(
        NetworkWithLoss(
            network, InputNormalizer(config.mean, config.std), CrossEntropy(config.smoothing)
        ),
        parameters,
    )
    loss, gradients = step.set_train(True)(Tensor(batch.images), Tensor(batch.labels))
    return {
        "loss": float(loss.asnumpy()),
        "norms": {
            p.name: float(np.linalg.norm(g.asnumpy())) for p, g in zip(parameters, gradients)
        },
    }


def training_rate(options):
    from src.distributed.communicator import Communicator
    from src.training.step import create_train_step

    network, config, batch = set_up(options)
    step = create_train_step(network, config, Communicator())
    return rate(options, lambda number: step([batch], 0.01, number))


def inference_rate(options):
    from src.inference.backends import MindSporeBackend
    from src.models.reparam import fuse

    network, config, batch = set_up(options)
    engine = MindSporeBackend(fuse(network), config)
    return rate(options, lambda number: engine(batch.images))


def pytorch_rate(options):
    """The same step in PyTorch: momentum SGD, label smoothing, channels_last.

    0 if there is no PyTorch for the device.
    """
    try:
        import torch

        from benchmarks.pytorch_reference import build
    except ImportError:
        return {"images_per_second": 0.0}
    name, _, block = options.network.partition("+")
    if options.device_target == "GPU" and not torch.cuda.is_available():
        return {"images_per_second": 0.0}
    device = "cuda" if options.device_target == "GPU" else "cpu"
    network = build(name, 1000, block or "base", dropout=0.0).to(
        device, memory_format=torch.channels_last
    )
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    images = torch.rand(options.batch, 3, options.image_size, options.image_size, device=device).to(
        memory_format=torch.channels_last
    )
    labels = torch.randint(0, 1000, (options.batch,), device=device)
    scaler = torch.amp.GradScaler(device, enabled=options.amp_level != "O0")

    def step(number):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.float16, enabled=options.amp_level != "O0"):
            loss = torch.nn.functional.cross_entropy(network(images), labels, label_smoothing=0.1)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        loss.item()

    return rate(options, step)


def rate(options, step):
    """{"images_per_second": by the median step after warm-up}."""
    numbers = itertools.count()
    return {
        "images_per_second": options.batch
        / median_seconds(lambda: step(next(numbers)), options.steps)
    }


WORKERS = {
    "gradients": gradients_of_one_step,
    "training": training_rate,
    "inference": inference_rate,
    "pytorch": pytorch_rate,
}


if __name__ == "__main__":
    run_process(lambda signals: main(sys.argv[1:]))
