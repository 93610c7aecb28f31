"""Time writing and reading a checkpoint.

`python3 benchmarks/checkpoint_cost.py --network=resnext50_32x4d`.

Prints its size, the medians of writing it (flushed to disk, checksummed) and of reading it with the
check, next to the step of the same network at --per_batch_size. Takes every configuration key as a
flag.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.timing import median_seconds  # noqa: E402
from src.cli.run import run_process  # noqa: E402

_REPEATS = 5


def main(arguments):
    from src.cli.flags import parse_only_flags
    from src.cli.recipes import load_config
    from src.utils.device import prepare_process, select_device

    config = load_config(
        {
            "data_path": "none",
            "num_classes": "1000",
            "per_batch_size": "16",
            **parse_only_flags(arguments),
        }
    )
    prepare_process(config.device_target)
    import numpy as np

    from src.dataset.batches import Batch
    from src.distributed.communicator import Communicator
    from src.models.create import create_network
    from src.models.weight_files import read_weights
    from src.runs.checkpoint import save_checkpoint
    from src.training.create_step import create_train_step

    select_device(config.device_target, 0)
    network = create_network(config)
    step = create_train_step(network, config, Communicator())
    size, batch = config.image_size, config.per_batch_size
    zeros = Batch(np.zeros((batch, size, size, 3), np.uint8), np.zeros(batch, np.int32))
    step_s = median_seconds(lambda: step([zeros], 0.0, 0), _REPEATS)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        file = Path(folder) / "a.ckpt"
        parameters = [*network.get_parameters(), *step.optimizer.state_parameters]
        save_s = median_seconds(lambda: save_checkpoint(file, parameters, {"epoch": 1}), _REPEATS)
        read_s = median_seconds(lambda: read_weights(file), _REPEATS)
        mib = file.stat().st_size / 2**20
    print(
        f"checkpoint_cost network={config.network} block={config.block} mib={mib:.1f} "
        f"save_s={save_s:.3f} read_s={read_s:.3f} "
        f"step_s={step_s:.3f} steps_between_saves_for_1_percent={100 * save_s / step_s:.0f}"
    )


if __name__ == "__main__":
    run_process(lambda signals: main(sys.argv[1:]))
