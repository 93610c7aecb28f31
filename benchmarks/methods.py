"""What each training method brings on CIFAR-10, at a fixed number of epochs.

    python3 benchmarks/methods.py --data_path=DIR [--methods=none,ema,...] [--seeds=1,2]
        [--network=cifar_quick] [--epochs=20] [--threads=1] [--runs=outputs/methods]
        [--results=docs/methods]

DIR has the class folders train/ and test/. Each run follows the network's ACNet recipe without
blocks, with the schedule fitted to the epochs, and adds one method. A run that was killed continues
when the command is started again, and a run whose result is there is not repeated.

Writes one JSON file per run to --results, and prints a table of all results found there. Speed and
memory compare with the runs without a method, so nothing else should run at the same time if they
are to count.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.acnet_table import commit, last_top1, processor, train  # noqa: E402
from src.cli.run import run_process  # noqa: E402

METHODS = {
    "none": [],
    "ema": ["--ema_decay=0.999"],
    "clip": ["--clip_norm=1"],
    "label_smoothing": ["--label_smooth_factor=0.1"],
    "aug_repeats": ["--aug_repeats=3"],
    "progressive": ["--progressive_size=16"],
    "acb": ["--block=acb"],
}


def main(arguments):
    options = parse(arguments)
    results = Path(options.results)
    results.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds.split(","):
        for method in options.methods.split(","):
            name = f"{options.network}_{method}_{options.epochs}_seed{seed}"
            file = results / f"{name}.json"
            if not file.exists():
                flags = ["--block=base", *METHODS[method]]
                run = train(options.network, flags, seed, options, Path(options.runs) / name)
                file.write_text(json.dumps(measured(run, method, seed, options), indent=1))
    print(table([json.loads(file.read_text()) for file in sorted(results.glob("*.json"))]))


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", required=True)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--network", default="cifar_quick")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", default="outputs/methods")
    parser.add_argument("--results", default="docs/methods")
    return parser.parse_args(arguments)


def measured(run, method, seed, options):
    """The result of the finished run in folder ``run``."""
    epochs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "network": options.network,
        "method": method,
        "flags": METHODS[method],
        "seed": int(seed),
        "epochs": epochs[-1]["epoch"],
        "top1": last_top1((run / "log.txt").read_text(), "trained"),
        "last_loss": epochs[-1]["loss"],
        "images_per_second": statistics.median(epoch["images_per_second"] for epoch in epochs[1:]),
        "machine": processor(),
        "commit": commit(),
    }


def table(results):
    """A row per network, method and number of epochs."""
    rows = {}
    for result in results:
        key = tuple(result[name] for name in ("network", "epochs", "method"))
        rows.setdefault(key, []).append(result)
    lines = [
        "| network | epochs | method | top-1 by seed (%) | last loss by seed | images/s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (network, epochs, method), runs in rows.items():
        flags = " ".join(runs[0]["flags"]) or "none"
        top1 = ", ".join(f"{run['top1']:.2f}" for run in runs)
        loss = ", ".join(f"{run['last_loss']:.3f}" for run in runs)
        speed = statistics.median(run["images_per_second"] for run in runs)
        lines.append(f"| {network} | {epochs} | {flags} | {top1} | {loss} | {speed:,.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_process(lambda signals: main(sys.argv[1:]))
