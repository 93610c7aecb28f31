"""What each layer's kernels reach in a training step:

    [ONEDNN_MAX_CPU_ISA=AVX2] python3 benchmarks/kernels.py --network=resnet18 --per_batch_size=16

Trains a few steps on one core with oneDNN's own log (ONEDNN_VERBOSE) and prints one line for each
kind of layer and pass: how often it runs in a step, milliseconds, GFLOP/s (multiplications and
additions as computed: small groups merged into wider ones multiply zeros too) and the
implementation that oneDNN picked; then sums. Takes every configuration key as a flag.
"""

import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from src.cli.run import run_process  # noqa: E402

_PASSES = {
    "forward_training": "forward",
    "backward_data": "input_gradient",
    "backward_weights": "weight_gradient",
    "undef": "product",
}


def main(arguments):
    steps = int(
        next((word.partition("=")[2] for word in arguments if word.startswith("--steps=")), 3)
    )
    finished = subprocess.run(
        [
            sys.executable,
            str(ROOT / "benchmarks" / "train_step.py"),
            "--threads=1",
            "--kernels=onednn",
            *arguments,
            *(
                []
                if any(word.startswith("--steps=") for word in arguments)
                else [f"--steps={steps}"]
            ),
        ],
        env={**os.environ, "ONEDNN_VERBOSE": "1"},
        capture_output=True,
        text=True,
    )
    if finished.returncode:
        print(finished.stdout[-2000:], finished.stderr, sep="\n", file=sys.stderr)
        sys.exit(finished.returncode)
    layers = measure(finished.stdout, steps)
    slowest_first = sorted(layers.items(), key=lambda item: -item[1][1])
    for (kind, what, shape, implementation), (count, milliseconds, flops) in slowest_first:
        rate = f" gflops={flops / milliseconds / 1e6:.0f}" if flops else ""
        print(
            f"kernels kind={kind} pass={what} shape={shape} per_step={count:g} "
            f"ms={milliseconds:.2f}{rate} "
            f"implementation={implementation}"
        )
    for kind in sorted({key[0] for key in layers}):
        milliseconds, flops = (
            sum(values[index] for key, values in layers.items() if key[0] == kind)
            for index in (1, 2)
        )
        print(
            f"kernels total kind={kind} ms={milliseconds:.1f}"
            + (f" gflops={flops / milliseconds / 1e6:.0f}" if flops else "")
        )
    print(next(line for line in finished.stdout.splitlines() if line.startswith("train_step")))


def measure(log, steps):
    """What each kernel costs per step, over the last ``steps`` of a log.

    {(kind, pass, shape, implementation): (times, milliseconds, floating-point operations)}.
    """
    lines = [
        line.split(",")
        for line in log.splitlines()
        if line.startswith("onednn_verbose") and ",exec,cpu," in line
    ]
    fields = [(line[line.index("cpu") + 1 :], float(line[-1])) for line in lines]
    # Each step runs the same primitives.
    per_step = len(fields) // (steps + 2)
    found = defaultdict(lambda: [0, 0.0, 0.0])
    for words, milliseconds in fields[-per_step * steps :]:
        kind, implementation, what, shape = (
            words[0],
            words[1],
            _PASSES.get(words[2], words[2]),
            words[-2],
        )
        entry = found[kind, what, shape, implementation]
        entry[0] += 1 / steps
        entry[1] += milliseconds / steps
        entry[2] += (flops_of(shape, words) if kind == "convolution" else 0.0) / steps
    return {key: tuple(entry) for key, entry in found.items()}


def flops_of(shape, words):
    """2 x multiplications of a convolution, from oneDNN's description of it.

    Such as mb16_ic64oc64_ih56oh56kh3sh1dh0ph1_iw56ow56kw3sw1dw0pw1.
    """
    number = {
        name: int(value) for name, value in re.findall(r"(mb|g|ic|oc|oh|ow|kh|kw)(\d+)", shape)
    }
    return (
        2.0
        * number["mb"]
        * number["oc"]
        * number["ic"]
        / number.get("g", 1)
        * number["oh"]
        * number["ow"]
        * number["kh"]
        * number["kw"]
    )


if __name__ == "__main__":
    run_process(lambda signals: main(sys.argv[1:]))
