"""What sending gradients in sixteen bits does to the loss curve.

`python3 benchmarks/gradient_compression.py [--epochs=12] [--ranks=2]`.

The digits recipe with --gradient_compression=none, float16 and bfloat16; each form's losses by
epoch next to those without (relative differences), and the same with another seed as a measure of
what such differences mean. Prints one line per form.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.processes import mpirun_environment, mpirun_words  # noqa: E402
from src.cli.run import run_process  # noqa: E402
from src.utils.errors import UserError  # noqa: E402


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--cases",
        default="none:1,float16:1,bfloat16:1,none:2",
        help="FORM:SEED,...; the others are compared with the first",
    )
    options = parser.parse_args(arguments)
    reference = None
    for case in options.cases.split(","):
        form, seed = case.split(":")
        epochs = trained(options, form, seed)
        losses = [epoch["loss"] for epoch in epochs]
        reference = reference or losses
        differences = [abs(loss - expected) / expected for loss, expected in zip(losses, reference)]
        print(
            f"gradient_compression form={form} seed={seed} ranks={options.ranks} "
            f"epochs={len(losses)} "
            f"first_difference={differences[0]:.2e} largest_difference={max(differences):.2e} "
            f"last_loss={losses[-1]:.6f} "
            f"top1={epochs[-1]['top1']:.2f}",
            flush=True,
        )


def trained(options, form, seed):
    """metrics.jsonl of one training, one dictionary per epoch."""
    with tempfile.TemporaryDirectory() as folder:
        words = mpirun_words(
            options.ranks,
            ROOT / "train.py",
            "--run_distribute=1",
            "--config_path=digits",
            f"--output_path={folder}",
            f"--gradient_compression={form}",
            f"--seed={seed}",
            f"--max_epoch={options.epochs}",
            "--run_eval=1",
        )
        finished = subprocess.run(words, stdout=subprocess.DEVNULL, env=mpirun_environment())
        if finished.returncode:
            raise UserError(f"'{' '.join(words)}' ended with status {finished.returncode}")
        (metrics,) = Path(folder).glob("*/metrics.jsonl")
        return [json.loads(line) for line in metrics.read_text().splitlines()]


if __name__ == "__main__":
    run_process(lambda signals: main(sys.argv[1:]))
