"""Time the parts of a training step:

    [mpirun -n N] python3 benchmarks/train_step.py --network=resnet18 --per_batch_size=16 --steps=10

Random images, no input pipeline; medians over the steps after two warm-up steps. Takes every
configuration key as a flag; with --freeze_epochs=1, only the classifier is trained. sent_mib is
what rank 0's machine sends to others per step.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.cli.run import run_process  # noqa: E402
from src.cli.start import prepare_rank  # noqa: E402
from src.distributed.launcher import launched_rank  # noqa: E402

_WARMUP = 2


def main(arguments):
    from src.cli.flags import parse_flags
    from src.cli.recipes import load_config
    from src.distributed.communicator import connect
    from src.utils.device import select_device
    from src.utils.machine import peak_bytes

    steps = int(
        next((word.partition("=")[2] for word in arguments if word.startswith("--steps=")), 10)
    )
    flags, _ = parse_flags([word for word in arguments if not word.startswith("--steps=")])
    config = load_config({"data_path": "none", "num_classes": "1000", **flags})
    communicator = connect(config.run_distribute)
    prepare_rank(communicator, config.device_target, config.threads)
    import numpy as np

    from src.dataset.batches import Batch
    from src.kernels.library import choose_kernels
    from src.models.create import create_network
    from src.training.create_step import create_train_step

    select_device(config.device_target, communicator.local_rank)
    kernels = choose_kernels(config)
    step = create_train_step(create_network(config, kernels=kernels.library), config, communicator)
    step.optimizer.backbone_frozen = config.freeze_epochs > 0
    random = np.random.default_rng(communicator.rank)
    size, batch = config.image_size, config.per_batch_size
    images = Batch(
        random.integers(0, 256, (batch, size, size, 3), np.uint8),
        random.integers(0, config.num_classes, batch, np.int32),
    )
    times = []
    sent = 0
    for number in range(steps + _WARMUP):
        communicator.barrier()
        sent -= sent_bytes()
        started = time.perf_counter()
        seconds = step([images], 0.01, number).seconds
        times.append({"step": time.perf_counter() - started, **seconds})
        sent += sent_bytes()
    median = {
        name: statistics.median(entry[name] for entry in times[_WARMUP:]) for name in times[0]
    }
    if communicator.is_root:
        rate = batch * communicator.size / median["step"]
        print(
            f"train_step network={config.network} block={config.block} ranks={communicator.size} "
            f"per_batch_size={batch} "
            f"amp_level={config.precision} kernels={kernels.name.replace(', ', ':')} "
            f"images_per_second={rate:.2f} forward_backward_s={median['forward_backward']:.4f} "
            f"allreduce_s={median['allreduce']:.4f} optimizer_s={median['optimizer']:.4f} "
            f"sent_mib={sent / len(times) / 2**20:.1f} peak_rss_mib={peak_bytes() / 2**20:.0f}"
        )


def sent_bytes():
    """What this machine has sent by its network interfaces so far, to others than itself."""
    lines = [line.partition(":") for line in Path("/proc/net/dev").read_text().splitlines()[2:]]
    return sum(int(numbers.split()[8]) for name, _, numbers in lines if name.strip() != "lo")


if __name__ == "__main__":
    run_process(lambda signals: main(sys.argv[1:]), launched_rank())
