"""Check and time training on a GPU in less than 8 minutes (after `bash scripts/setup.sh --gpu`):

    python3 benchmarks/gpu_suite.py [--parts=agreement,rates,two_ranks,digits] [--minutes=8]
        [--networks=resnext50_32x4d,resnet18+acb,alexnet] [--batches=64,256] [--steps=20]

Each part is a process of its own with a time limit, and prints a line of JSON as soon as it has a
number. A part that no time is left for says so.

agreement: the loss, the gradients' norms and the losses of 20 steps in float32, compared with a
    reference from CPU (--reference=FILE), which `--make_reference --device_target=CPU` writes.
rates: images/s in O3, host seconds per step, peak MiB and the seconds of the first step; PyTorch on
    the same GPU (channels_last, autocast float16, cudnn.benchmark, images copied from the host).
two_ranks: two ranks on this GPU with --reducer=mpi: train, SIGTERM, resume, evaluate.
digits: the bundled digits to the end.
"""

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.timing import WARMUP, median_seconds  # noqa: E402
from src.cli.run import run_process  # noqa: E402
from src.utils.errors import PartialFailure  # noqa: E402

# Small pictures: a float32 reference of large ones takes minutes on CPU.
_REFERENCE = {"batch": 8, "image_size": 64, "steps": 20}


def main(arguments):
    options = parse(arguments)
    if options.worker:
        prepare(options)
        print(json.dumps(WORKERS[options.worker](options)))
        return
    if options.make_reference:
        make_reference(options)
        return
    deadline = time.monotonic() + 60 * options.minutes
    failures = []
    for part in options.parts.split(","):
        PARTS[part](Reporter(part, options, deadline, failures))
    if failures:
        raise PartialFailure(f"{len(failures)} measurements failed, the first: {failures[0]}")


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--networks", default="resnext50_32x4d,resnet18+acb,alexnet")
    parser.add_argument("--batches", default="64,256")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--reference", default=str(ROOT / "benchmarks" / "gpu_reference.json"))
    parser.add_argument("--make_reference", action="store_true")
    parser.add_argument("--device_target", choices=("GPU", "CPU"), default="GPU")
    parser.add_argument("--worker", choices=tuple(WORKERS), default=None, help=argparse.SUPPRESS)
    parser.add_argument("--network", help=argparse.SUPPRESS)
    parser.add_argument("--amp_level", default="O0", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=8, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


class Reporter:
    """Runs the measurements of a part, and prints their lines."""

    def __init__(self, part, options, deadline, failures):
        self.part, self.options = part, options
        self._deadline, self._failures = deadline, failures

    def say(self, **values):
        print(json.dumps({"part": self.part, **values}), flush=True)

    def seconds_left(self):
        return self._deadline - time.monotonic()

    def worker(self, name, network, limit, **changes):
        """What a worker reports, or None."""
        values = {**vars(self.options), **changes, "worker": name, "network": network}
        values = {key: value for key, value in values.items() if value not in (None, False)}
        words = [__file__, *(f"--{key}={value}" for key, value in values.items())]
        out = self.run(f"{name} of {network}", words, limit)
        lines = [line for line in (out or "").splitlines() if line.startswith("{")]
        return json.loads(lines[-1]) if lines else None

    def run(self, what, words, limit, ranks=1, stop_after=None):
        """Standard output of a Python script, or None if it failed or no time is left.

        Args:
            limit: seconds.
            stop_after: text after which the script gets SIGTERM.
        """
        limit = min(limit, self.seconds_left())
        if limit < 5:
            self.say(left_out=what, reason="no time is left")
            return None
        launcher = ["mpirun", "--map-by", ":OVERSUBSCRIBE", "-n", str(ranks)] if ranks > 1 else []
        # tests/gpu puts the null GPU around each script.
        wrapper = os.environ.get("GPU_SUITE_WRAPPER", "").split()
        command = [*launcher, sys.executable, *wrapper, *words]
        environment = {
            **os.environ,
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        }
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        )
        killer = threading.Timer(limit, process.kill)
        killer.start()
        lines = []
        for line in process.stdout:
            lines.append(line)
            if stop_after and stop_after in line:
                process.send_signal(signal.SIGTERM)
                stop_after = None
        status = process.wait()
        killer.cancel()
        if status not in (0, 128 + signal.SIGTERM):
            self._failures.append(f"{what}: status {status}")
            self.say(failed=what, status=status, limit_s=round(limit))
            return None
        return "".join(lines)


def report_agreement(reporter):
    reference = json.loads(Path(reporter.options.reference).read_text())
    for network in reporter.options.networks.split(","):
        found = reporter.worker("reference", network, 120, **_REFERENCE)
        if found and network in reference:
            expected = reference[network]
            norms = [
                abs(found["norms"][name] / norm - 1)
                for name, norm in expected["norms"].items()
                if norm > 1e-6
            ]
            losses = zip(found["losses"], expected["losses"])
            reporter.say(
                network=network,
                loss_difference=abs(found["losses"][0] / expected["losses"][0] - 1),
                largest_gradient_norm_difference=max(norms),
                largest_loss_difference_in_20_steps=max(abs(a - b) for a, b in losses),
            )


def report_rates(reporter):
    for network, batch in itertools.product(
        reporter.options.networks.split(","), map(int, reporter.options.batches.split(","))
    ):
        ours = reporter.worker("training", network, 120, batch=batch, amp_level="O3")
        if ours:
            reporter.say(network=network, batch=batch, **ours)
        theirs = reporter.worker("pytorch", network, 60, batch=batch, amp_level="O3")
        if theirs and "images_per_second" in theirs:
            reporter.say(network=network, batch=batch, pytorch=theirs)
        if ours and theirs and "images_per_second" in theirs:
            ratio = ours["images_per_second"] / theirs["images_per_second"]
            reporter.say(network=network, batch=batch, ratio_to_pytorch=round(ratio, 3))


def report_two_ranks(reporter):
    with tempfile.TemporaryDirectory() as folder:
        target = f"--device_target={reporter.options.device_target}"
        reducer = ["--device_id=0", "--reducer=mpi"] if target.endswith("GPU") else []
        words = ["train.py", "--config_path=digits", "--run_distribute=1", "--run_eval=1", target]
        words += [*reducer, f"--output_path={folder}", "--max_epoch=8"]
        stopped = reporter.run("two ranks, stopped", words, 120, 2, stop_after="epoch 1/8 loss")
        resumed = reporter.run("two ranks, resumed", [*words, "--resume=auto"], 120, 2)
        if stopped and resumed:
            last = [line for line in resumed.splitlines() if line.startswith("epoch 8/8 loss")]
            reporter.say(resumed="resuming from" in resumed, last_epoch="".join(last))


def report_digits(reporter):
    with tempfile.TemporaryDirectory() as folder:
        target = f"--device_target={reporter.options.device_target}"
        words = ["train.py", "--config_path=digits", target, f"--output_path={folder}"]
        out = reporter.run("digits", [*words, "--run_eval=1"], 120)
        if out:
            last = [line for line in out.splitlines() if "TOP1" in line]
            reporter.say(last_epoch=last[-1])


def make_reference(options):
    """Write what ``agreement`` compares with. Takes a minute per network on two cores."""
    reporter = Reporter("reference", options, time.monotonic() + 3600, [])
    found = {
        network: reporter.worker("reference", network, 1200, make_reference=False, **_REFERENCE)
        for network in options.networks.split(",")
    }
    Path(options.reference).write_text(json.dumps(found) + "\n")


def prepare(options):
    from src.utils.device import compile_for_new_gpu, prepare_process

    prepare_process(options.device_target)
    if options.device_target == "GPU":
        compile_for_new_gpu(0)


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
            "dropout": "0.5" if options.worker == "training" else "0",
            "amp_level": options.amp_level if options.device_target == "GPU" else "O0",
            "device_target": options.device_target,
        }
    )
    import numpy as np

    from src.dataset.batches import Batch
    from src.models.create import create_network

    select_device(options.device_target, 0)
    random = np.random.default_rng(0)
    size = config.image_size
    images = random.integers(0, 256, (options.batch, size, size, 3), np.uint8)
    labels = random.integers(0, 1000, options.batch).astype(np.int32)
    return create_network(config), config, Batch(images, labels)


def reference(options):
    """{"losses": of the steps, "norms": {parameter: norm of its first gradient}}."""
    import mindspore
    import numpy as np
    from mindspore import Tensor

    from src.distributed.communicator import Communicator
    from src.models.layers import InputNormalizer
    from src.training.create_step import create_train_step
    from src.training.losses import create_loss
    from src.training.step import ForwardBackward, NetworkWithLoss

    network, config, batch = set_up(options)
    # The same weights on every device.
    random = np.random.default_rng(1)
    for parameter in network.trainable_params():
        if parameter.ndim > 1:
            scale = np.sqrt(1 / np.prod(parameter.shape[1:]))
            values = scale * random.standard_normal(parameter.shape)
            parameter.set_data(Tensor(values.astype(np.float32)))
    parameters = network.trainable_params()
    with_loss = NetworkWithLoss(
        network, InputNormalizer(config.mean, config.std), create_loss(config)
    )
    pass_ = ForwardBackward(with_loss, parameters).set_train(True)
    statistics = [p.asnumpy().copy() for p in network.get_parameters()]
    _, gradients = pass_(Tensor(batch.images), Tensor(batch.labels))
    norms = [float(np.linalg.norm(gradient.asnumpy())) for gradient in gradients]
    for parameter, value in zip(network.get_parameters(), statistics):
        parameter.set_data(Tensor(value, mindspore.float32))
    step = create_train_step(network, config, Communicator())
    losses = [step([batch], 0.01, number).loss for number in range(options.steps)]
    return {"losses": losses, "norms": dict(zip((p.name for p in parameters), norms))}


def training_rate(options):
    from src.distributed.communicator import Communicator
    from src.training.create_step import create_train_step

    network, config, batch = set_up(options)
    step = create_train_step(network, config, Communicator())
    return rate(options, lambda number: step([batch], 0.01, number), our_peak_mib)


def our_peak_mib():
    import mindspore

    return mindspore.runtime.max_memory_allocated() / 2**20


def pytorch_rate(options):
    """The same step in PyTorch; {} without a PyTorch for the device."""
    try:
        import torch

        from benchmarks.pytorch_reference import build
    except ImportError:
        return {}
    name, _, block = options.network.partition("+")
    if options.device_target == "GPU" and not torch.cuda.is_available():
        return {}
    device = "cuda" if options.device_target == "GPU" else "cpu"
    torch.backends.cudnn.benchmark = True
    network = build(name, 1000, block or "base", dropout=0.5).to(
        device, memory_format=torch.channels_last
    )
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    size = options.image_size
    images = torch.randint(0, 256, (options.batch, size, size, 3), dtype=torch.uint8)
    labels = torch.randint(0, 1000, (options.batch,))
    half = device == "cuda" and options.amp_level != "O0"
    scaler = torch.amp.GradScaler(device, enabled=half)

    def step(number):
        inputs = images.to(device, non_blocking=True).permute(0, 3, 1, 2).float().div(255).sub(0.5)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.float16, enabled=half):
            logits = network(inputs)
        loss = torch.nn.functional.cross_entropy(
            logits.float(), labels.to(device), label_smoothing=0.1
        )
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        loss.item()

    def peak_mib():
        return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else 0.0

    return rate(options, step, peak_mib)


def rate(options, step, peak_mib):
    """Images/s by the median step after warm-up, and what a step and the first one took."""
    started = time.perf_counter()
    step(0)
    first = time.perf_counter() - started
    numbers = itertools.count(1)
    cpu = time.process_time()
    seconds = median_seconds(lambda: step(next(numbers)), options.steps)
    host = (time.process_time() - cpu) / (WARMUP + options.steps)
    return {
        "images_per_second": round(options.batch / seconds, 1),
        "step_s": round(seconds, 4),
        "host_s": round(host, 4),
        "first_step_s": round(first, 1),
        "peak_mib": round(peak_mib()),
    }


PARTS = {
    "agreement": report_agreement,
    "rates": report_rates,
    "two_ranks": report_two_ranks,
    "digits": report_digits,
}
WORKERS = {"reference": reference, "training": training_rate, "pytorch": pytorch_rate}


if __name__ == "__main__":
    run_process(lambda signals: main(sys.argv[1:]))
