"""The table of ACNet's repository on CIFAR-10, measured with this program.

    python3 benchmarks/acnet_table.py --data_path=DIR [--networks=cifar_quick] [--blocks=base,acb]
        [--seeds=1,2] [--epochs=0] [--amp_level=O2] [--threads=1] [--runs=outputs/acnet_table]
        [--results=docs/acnet_table]

DIR has the class folders train/ and test/. --epochs=0 trains as long as the recipe says (150 or 400
epochs); with another number the schedule is fitted to it. A run that was killed continues when the
command is started again, and a run whose result is there is not repeated. Two such commands may
run side by side, one per core, on different blocks or seeds.

Writes one JSON file per run to --results, and prints a table of all results found there. The
published figures: README of the ACNet repository (DingXiaoH/ACNet), commit 748fb0c.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from src.cli.run import run_process  # noqa: E402
from src.models.weight_files import read_weights  # noqa: E402
from src.utils.errors import UserError  # noqa: E402

PUBLISHED = {
    ("cifar_quick", "base"): 86.20,
    ("cifar_quick", "acb"): 86.87,
    ("vgg16_cifar", "base"): 93.99,
    ("vgg16_cifar", "acb"): 94.54,
    ("resnet56_cifar", "base"): 94.55,
    ("resnet56_cifar", "acb"): 95.06,
    ("wrn16_8_cifar", "base"): 95.89,
    ("wrn16_8_cifar", "acb"): 96.33,
}


def main(arguments):
    options = parse(arguments)
    results = Path(options.results)
    results.mkdir(parents=True, exist_ok=True)
    for network in options.networks.split(","):
        for seed in options.seeds.split(","):
            for block in options.blocks.split(","):
                name = f"{network}_{block}_{options.epochs or 'all'}_seed{seed}_{options.amp_level}"
                file = results / f"{name}.json"
                if not file.exists():
                    flags = [f"--block={block}", f"--amp_level={options.amp_level}"]
                    run = train(network, flags, seed, options, Path(options.runs) / name)
                    file.write_text(json.dumps(measured(run, network, block, seed), indent=1))
    print(table([json.loads(file.read_text()) for file in sorted(results.glob("*.json"))]))


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", required=True)
    parser.add_argument("--networks", default="cifar_quick")
    parser.add_argument("--blocks", default="base,acb")
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--epochs", type=int, default=0)
    parser.add_argument("--amp_level", default="O2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", default="outputs/acnet_table")
    parser.add_argument("--results", default="docs/acnet_table")
    return parser.parse_args(arguments)


def train(network, flags, seed, options, output):
    """Train by ACNet's recipe with these flags, or continue to the end; the run's folder."""
    words = [
        sys.executable,
        str(ROOT / "train.py"),
        f"--config_path=acnet_{network}_cifar10",
        f"--data_path={options.data_path}/train",
        f"--eval_data_path={options.data_path}/test",
        f"--seed={seed}",
        f"--threads={options.threads}",
        f"--output_path={output}",
        "--log_interval=390",
        *flags,
        *([f"--max_epoch={options.epochs}"] if options.epochs else []),
        *(["--resume=auto"] if list(output.glob("*/latest.ckpt")) else []),
    ]
    if subprocess.run(words).returncode:
        raise UserError(f"'{' '.join(words)}' failed; start the same command again to continue")
    (run,) = output.glob("*/latest.ckpt")
    return run.parent


def measured(run, network, block, seed):
    """The result of the finished run in folder ``run``."""
    log = (run / "log.txt").read_text()
    epochs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    environment = json.loads((run / "environment.json").read_text())
    config = (run / "config.yaml").read_text()
    return {
        "network": network,
        "block": block,
        "seed": int(seed),
        "epochs": epochs[-1]["epoch"],
        "recipe_epochs": recipe_epochs(network),
        "amp_level": re.search(r"^amp_level: (\S+)", config, re.M)[1],
        "top1": last_top1(log, "trained"),
        "fused_top1": last_top1(log, "fused"),
        "last_loss": epochs[-1]["loss"],
        "top1_by_epoch": {epoch["epoch"]: epoch["top1"] for epoch in epochs if "top1" in epoch},
        # Of a run that was killed, the part of an epoch before that is not counted.
        "hours": round(sum(sum(epoch["rank_seconds"][0]) for epoch in epochs) / 3600, 2),
        "kernel_magnitudes": kernel_magnitudes(run, block),
        "machine": processor(),
        "kernels": environment["kernels"],
        "commit": commit(),
    }


def processor():
    found = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M)
    return found[1] if found else "unknown"


def commit():
    """The commit of this checkout, or "unknown" without git."""
    words = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(words, capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else "unknown"


def recipe_epochs(network):
    recipe = (ROOT / f"configs/acnet_{network}_cifar10.yaml").read_text()
    return int(re.search(r"^max_epoch: (\d+)", recipe, re.M)[1])


def last_top1(log, form):
    """The top-1 accuracy (%) that ``log`` states last for this form; None if it states none."""
    found = re.findall(rf" {form}: top1=([\d.]+)", log)
    return float(found[-1]) if found else None


def kernel_magnitudes(run, block):
    """{size: mean absolute weight at each position} over the 3x3 and 5x5 kernels.

    Each layer is scaled to a largest mean of 1, as in figure 6 of the paper.
    """
    file = run / "latest.ckpt" if block == "base" else run / "fused.ckpt"
    found = {}
    for array in read_weights(file)[0].values():
        if array.ndim == 4 and array.shape[2:] in ((3, 3), (5, 5)):
            magnitude = abs(array).mean(axis=(0, 1))
            found.setdefault(str(array.shape[2]), []).append(magnitude / magnitude.max())
    return {
        size: (sum(layers) / len(layers)).astype(float).round(4).tolist()
        for size, layers in found.items()
    }


def table(results):
    """A row per network, block, number of epochs and precision."""
    rows = {}
    for result in results:
        key = tuple(result[name] for name in ("network", "block", "epochs", "amp_level"))
        rows.setdefault(key, []).append(result)
    lines = [
        "| network | block | epochs | published | measured by seed | fused | amp_level | hours |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (network, block, epochs, amp_level), runs in rows.items():
        whole = epochs == runs[0]["recipe_epochs"]
        published = (
            f"{PUBLISHED[network, block]:.2f}" if whole and (network, block) in PUBLISHED else ""
        )
        hours = statistics.mean(run["hours"] for run in runs)
        lines.append(
            f"| {network} | {block} | {epochs} | {published} | {listed(runs, 'top1')} | "
            f"{listed(runs, 'fused_top1')} | {amp_level} | {hours:.1f} |"
        )
    return "\n".join(lines)


def listed(runs, name):
    return ", ".join(f"{run[name]:.2f}" for run in runs if run[name] is not None)


if __name__ == "__main__":
    run_process(lambda signals: main(sys.argv[1:]))
