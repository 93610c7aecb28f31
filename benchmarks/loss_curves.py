"""Whether trainings in another precision learn the same.

`python3 benchmarks/loss_curves.py [--data=digits,photographs] [--seeds=3]`.

Trains with amp_level=O0 (float32) and O2 (bfloat16 on CPU), the same seeds, and prints one line for
each training with its losses by epoch, then one for each precision with the mean and spread of the
last loss and of the best accuracy over the seeds. `digits` is the recipe of that name;
`photographs` is ResNet-18 with ACB from scratch on crops of 16 photographs, which training and
validation take from different parts of each. The photographs are those that scikit-image ships:
`python3 -m pip install --no-deps scikit-image` (it is not imported).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.photographs import write_crops  # noqa: E402
from benchmarks.processes import mpirun_environment, mpirun_words  # noqa: E402
from src.cli.run import run_process  # noqa: E402
from src.utils.errors import UserError  # noqa: E402

_RECIPES = {
    "digits": ("--config_path=digits",),
    "photographs": (
        "--network=resnet18",
        "--block=acb",
        "--image_size=64",
        "--per_batch_size=16",
        "--lr=0.05",
        "--warmup_epochs=1",
        "--max_epoch=10",
        "--crop_scale=0.5,1.0",
    ),
}


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits,photographs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=0)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        for data in options.data.split(","):
            place = data if data == "digits" else write_crops(Path(folder) / "photographs")
            for level in ("O0", "O2"):
                runs = [
                    trained(options, data, place, level, seed)
                    for seed in range(1, options.seeds + 1)
                ]
                for seed, epochs in enumerate(runs, 1):
                    losses = ",".join(f"{epoch['loss']:.4f}" for epoch in epochs)
                    print(
                        f"loss_curves data={data} amp_level={level} seed={seed} "
                        f"top1={best(epochs):.2f} losses={losses}",
                        flush=True,
                    )
                print(
                    f"loss_curves data={data} amp_level={level} seeds={options.seeds} "
                    f"last_loss={spread([epochs[-1]['loss'] for epochs in runs], 4)} "
                    f"top1={spread([best(epochs) for epochs in runs], 2)}",
                    flush=True,
                )


def best(epochs):
    return max(epoch["top1"] for epoch in epochs)


def spread(values, digits):
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f}+-{deviation:.{digits}f}"


def trained(options, data, place, level, seed):
    """metrics.jsonl of one training, one dictionary per epoch."""
    with tempfile.TemporaryDirectory() as folder:
        own = (
            [f"--data_path={place / 'train'}", f"--eval_data_path={place / 'val'}"]
            if data != "digits"
            else []
        )
        epochs = [f"--max_epoch={options.epochs}"] if options.epochs else []
        words = mpirun_words(
            options.ranks,
            ROOT / "train.py",
            "--run_distribute=1",
            *_RECIPES[data],
            *own,
            *epochs,
            f"--seed={seed}",
            f"--amp_level={level}",
            f"--output_path={folder}",
            "--run_eval=1",
        )
        finished = subprocess.run(words, stdout=subprocess.DEVNULL, env=mpirun_environment())
        if finished.returncode:
            raise UserError(
                f"'{' '.join(map(str, words))}' ended with status {finished.returncode}"
            )
        (metrics,) = Path(folder).glob("*/metrics.jsonl")
        return [json.loads(line) for line in metrics.read_text().splitlines()]


if __name__ == "__main__":
    run_process(lambda signals: main(sys.argv[1:]))
