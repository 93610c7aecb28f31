"""Whether a new build computes what it should: `python3 -m src.kernels.selftest LIBRARY`, status 0 if it does.

A training step of a grouped, strided convolution with batch norm, shortcut and ReLU, in float64 by numpy beside the kernels.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from src.kernels.calls import Kernels, from_blocks
from src.kernels.settings import settings_table

_TOLERANCE = 1e-5


def largest_difference(kernels: Kernels, groups: int = 8, channels: int = 32, size: int = 9, images: int = 3, stride: int = 2) -> float:
    """Of output, gradients and statistics, relative to the largest value of each."""
    random = np.random.default_rng(0)
    x, weight = random.normal(size=(images, channels, size, size)), random.normal(size=(channels, channels // groups, 3, 3))
    gamma, beta = random.normal(size=channels), random.normal(size=channels)
    out = (size - 1) // stride + 1
    shortcut, dy = random.normal(size=(2, images, channels, out, out))

    surrounded: Any = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows: Any = np.lib.stride_tricks.sliding_window_view(surrounded, (3, 3), (2, 3))  # type: ignore[call-overload]
    windows = windows[:, :, ::stride, ::stride].reshape(images, groups, channels // groups, out, out, 3, 3)
    kernel = weight.reshape(groups, channels // groups, channels // groups, 3, 3)
    convolved = np.einsum("ngihwkl,goikl->ngohw", windows, kernel).reshape(images, channels, out, out)
    mean, variance = convolved.mean((0, 2, 3)), convolved.var((0, 2, 3))

    def per_channel(values: np.ndarray) -> np.ndarray:
        return values[:, None, None]
    inverse = 1 / np.sqrt(variance + 1e-5)
    normal = (convolved - per_channel(mean)) * per_channel(inverse)
    before = normal * per_channel(gamma) + per_channel(beta) + shortcut
    gradient = dy * (before > 0)
    dgamma, dbeta = (gradient * normal).sum((0, 2, 3)), gradient.sum((0, 2, 3))
    count = images * out * out
    of_convolved = per_channel(gamma * inverse) * (gradient - per_channel(dbeta) / count - normal * per_channel(dgamma) / count)
    of_convolved = of_convolved.reshape(images, groups, channels // groups, out, out)
    dweight = np.einsum("ngihwkl,ngohw->goikl", windows, of_convolved).reshape(weight.shape)
    padded = np.zeros((images, channels, size + 2, size + 2))
    for row in range(3):
        for column in range(3):
            part = np.einsum("ngohw,goi->ngihw", of_convolved, kernel[..., row, column]).reshape(images, channels, out, out)
            padded[:, :, row:row + stride * out:stride, column:column + stride * out:stride] += part
    dx = padded[:, :, 1:-1, 1:-1]

    def flat(values: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(values, np.float32)

    def blocked(values: np.ndarray) -> np.ndarray:
        return kernels.to_blocks(flat(values))
    settings = settings_table([(1, 1, 1, 1)], (stride, stride), (1, 1), groups, kernels.block, relu=True, shortcut=True, eps=1e-5,
                              momentum=0.9)
    parameters = [flat(weight), flat(gamma), flat(beta), np.zeros(channels, np.float32), np.ones(channels, np.float32)]
    y, of_branch, statistics = np.empty_like(blocked(dy)), np.empty_like(blocked(dy)), np.empty((1, 2, channels), np.float32)
    running = [np.empty(channels, np.float32) for _ in range(2)]
    kernels.call("conv_norm_forward", [settings, blocked(x), blocked(shortcut), *parameters], [y, statistics, of_branch, *running])
    found = [np.empty_like(blocked(x)), np.empty_like(y), *(np.empty_like(parameter) for parameter in parameters[:3])]
    kernels.call("conv_norm_backward", [settings, blocked(x), blocked(dy), y, statistics, *parameters, of_branch], found)
    unbiased = variance * count / (count - 1)
    pairs = [(from_blocks(y), np.maximum(before, 0)), (from_blocks(found[0]), dx), (from_blocks(found[1]), gradient), (found[2], dweight),
             (found[3], dgamma), (found[4], dbeta), (running[0], 0.1 * mean), (running[1], 0.9 + 0.1 * unbiased)]
    return max(float(np.abs(ours - theirs).max() / np.abs(theirs).max()) for ours, theirs in pairs)


def main(path: str) -> int:
    difference = largest_difference(Kernels(Path(path)))
    if not difference < _TOLERANCE:
        print(f"error: they differ from float64 by {difference:.1e}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
