"""Step time on many ranks from a model of compute and reduction.

`python3 benchmarks/scaling_model.py`. docs/scaling.md explains it.

step = compute + reduction, reduction = (2 (n - 1) / n) bytes / bandwidth + hops latency, nothing
overlapped. Between nodes the better of ring, hops = 2 (n - 1), and tree, hops = 2 log2 n with every
byte twice over a link. For hosts that train on CPU, what benchmarks/slow_links.py measured on two
of them: the share of the link that the exchange reaches, and how much of a step hides it.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.cli.run import run_process  # noqa: E402

_LATENCY_S = 10e-6
_GPUS = 8
# network: (bytes of float32 gradients, images per step and device, compute seconds of that step)
_SEEDS = {
    "resnext50_32x4d": (4 * 25_028_904, 128, 128 / 109.97),
    "resnet18+acb": (4 * 19_030_000, 32, 1 / 5.78),
    "alexnet": (4 * 61_100_840, 256, 256 / 8500),
}
# A TCP segment: bytes on the wire, and bytes of gradients in it.
_WIRE, _PAYLOAD = 1514, 1448
# Of the link's rate, as measured with two hosts and AlexNet's gradients (slow_links.py
# --cases=exchange).
_REACHED = 0.96
# slow_links.py, two hosts of one core: bytes, images of a host and step, seconds of a step without
# a limit, those after which the first gradients are there.
_ON_CPU = {
    "alexnet": (4 * 61_100_840, 8, 0.69, 0.17),
    "resnext50_32x4d": (4 * 25_028_904, 16, 4.54, 1.4),
    "resnet18+acb": (4 * 19_030_000, 16, 3.05, 0.9),
}
_SLOW_LINKS = {"1gbit": 1e9 / 8, "200mbit": 200e6 / 8}
_LINKS = {"25 Gbit/s": 25e9 / 8, "100 Gbit/s": 100e9 / 8}


def reduction(size, ranks, bandwidth, latency=_LATENCY_S):
    """Seconds to sum ``size`` bytes over ``ranks``, by the better of ring and tree."""
    if ranks == 1:
        return 0.0
    ring = 2 * (ranks - 1) / ranks * size / bandwidth + 2 * (ranks - 1) * latency
    tree = 2 * size / bandwidth + 2 * math.ceil(math.log2(ranks)) * latency
    return min(ring, tree)


def bandwidth_of(size, ranks, seconds):
    """Bytes a second of a ring that takes ``seconds``, latency left out."""
    return 2 * (ranks - 1) / ranks * size / seconds


def exchange(size, hosts, bandwidth):
    """Seconds to all-reduce ``size`` bytes over ``hosts``; links carry ``bandwidth`` bytes/s."""
    return 2 * (hosts - 1) / hosts * size * _WIRE / _PAYLOAD / (bandwidth * _REACHED)


def main(_arguments):
    for link, bandwidth in _SLOW_LINKS.items():
        for network, (size, images, unlimited, first) in _ON_CPU.items():
            for hosts in (2, 3, 8):
                # The exchange begins with the first gradients, and the step ends with the later of
                # the two.
                sending = exchange(size, hosts, bandwidth)
                step = max(unlimited, first + sending)
                print(
                    f"scaling_model {network} hosts={hosts} link={link} exchange_s={sending:.2f} "
                    f"step_s={step:.2f} "
                    f"images_per_second={hosts * images / step:.2f}"
                )
    size, images, compute = _SEEDS["alexnet"]
    eight = _GPUS * images / 20000
    link = bandwidth_of(size, _GPUS, eight - compute)
    print(
        f"scaling_model alexnet devices=8 step_s={eight:.4f} compute_s={compute:.4f} "
        f"left_for_reduction_s={eight - compute:.4f} "
        f"which_is_a_ring_of_gb_per_second={link / 1e9:.1f}"
    )
    for network, (size, images, compute) in _SEEDS.items():
        inside = reduction(size, _GPUS, link)
        print(
            f"scaling_model {network} devices=8 reduction_s={inside:.4f} "
            f"of_step={inside / (compute + inside):.2f}"
        )
        for name, bandwidth in _LINKS.items():
            for nodes in (64, 1024):
                for label, factor in (("float32", 1.0), ("float16", 0.5)):
                    step = compute + factor * inside + reduction(factor * size, nodes, bandwidth)
                    print(
                        f"scaling_model {network} nodes={nodes} link={name.replace(' ', '')} "
                        f"gradients={label} step_s={step:.3f} "
                        f"images_per_second={nodes * _GPUS * images / step:,.0f} "
                        f"efficiency={compute / step:.2f}"
                    )


if __name__ == "__main__":
    run_process(lambda signals: main(sys.argv[1:]))
