"""What trained weights are worth on other classes.

`python3 benchmarks/finetune.py [--seeds=3] [--images=15] [--ranks=2]`.

ResNet-18 at 64 pixels is trained on crops of ten of scikit-image's photographs. Then, for each
seed, the recipe finetune learns the other six from few images a class, once from those weights and
once from random ones. One line for each training with its top-1 by epoch, then one with the epochs
that each needed to the level that the training from random weights has in its last five epochs.
Needs `python3 -m pip install --no-deps scikit-image`.
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

from benchmarks.photographs import PHOTOGRAPHS, write_crops  # noqa: E402
from benchmarks.processes import mpirun_environment, mpirun_words  # noqa: E402
from src.cli.run import run_process  # noqa: E402
from src.utils.errors import UserError  # noqa: E402

_LAST = 5
_OTHERS = ("camera", "clock_motion", "gravel", "ihc", "moon", "motorcycle_left")


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=15, help="training images of each new class")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = write_crops(
            folder / "first",
            [photograph for photograph in PHOTOGRAPHS if photograph not in _OTHERS],
            train=150,
        )
        second = write_crops(folder / "second", _OTHERS, train=options.images, val=40)
        before, run = trained(
            options,
            folder / "pretraining",
            first,
            "--image_size=64",
            "--network=resnet18",
            "--run_eval=1",
            "--per_batch_size=16",
            "--lr=0.05",
            "--max_epoch=15",
            "--crop_scale=0.35,1.0",
        )
        print(
            f"finetune pretraining classes={len(PHOTOGRAPHS) - len(_OTHERS)} "
            f"top1={max(before):.2f}",
            flush=True,
        )
        for seed in range(1, options.seeds + 1):
            same = (
                f"--seed={seed}",
                "--config_path=finetune",
                f"--max_epoch={options.epochs}",
                "--early_stopping=0",
                "--image_size=64",
            )
            pretrained, _ = trained(
                options,
                folder / f"pretrained{seed}",
                second,
                *same,
                f"--pretrained={run}/best.ckpt",
            )
            scratch, _ = trained(
                options,
                folder / f"scratch{seed}",
                second,
                *same,
                "--network=resnet18",
                "--freeze_epochs=0",
                "--backbone_lr_factor=1",
            )
            for start, found in (("pretrained", pretrained), ("scratch", scratch)):
                reached = ",".join(f"{top1:.1f}" for top1 in found)
                print(
                    f"finetune seed={seed} start={start} best={max(found):.2f} top1={reached}",
                    flush=True,
                )
            level = statistics.mean(scratch[-_LAST:])
            last = statistics.mean(pretrained[-_LAST:])
            print(
                f"finetune seed={seed} level={level:.1f} "
                f"epochs_of_pretrained={first_above(pretrained, level)} "
                f"epochs_of_scratch={first_above(scratch, level)} last_of_pretrained={last:.1f}",
                flush=True,
            )


def first_above(found, top1):
    """The first epoch with that accuracy, or "never"."""
    return next((epoch for epoch, reached in enumerate(found, 1) if reached >= top1), "never")


def trained(options, output, data, *flags):
    """(top-1 by epoch, run folder) of one training."""
    words = mpirun_words(
        options.ranks,
        ROOT / "train.py",
        "--run_distribute=1",
        f"--data_path={data}/train",
        f"--output_path={output}",
        *flags,
    )
    finished = subprocess.run(words, stdout=subprocess.DEVNULL, env=mpirun_environment())
    if finished.returncode:
        raise UserError(f"'{' '.join(map(str, words))}' ended with status {finished.returncode}")
    (run,) = output.iterdir()
    return [
        json.loads(line)["top1"] for line in (run / "metrics.jsonl").read_text().splitlines()
    ], run


if __name__ == "__main__":
    run_process(lambda signals: main(sys.argv[1:]))
