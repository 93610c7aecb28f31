"""Calls kernels with numpy arrays, as MindSpore calls them with tensors.

For tests, and for the self-test of a new build: `python3 -m src.kernels.testing LIBRARY` exits with
status 0 if a training step of a grouped, strided convolution with batch norm, shortcut and ReLU
agrees with float64.
"""

import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from src.kernels.attributes import ConvSpec, Epilogue
from src.kernels.library import block_size, error_text

_TOLERANCE = 1e-5


class Kernels:
    """The kernels of the library at ``path``.

    Args:
        threads: number of threads to compute with.
        isa: the processor's instructions to use, as oneDNN's dnnl_cpu_isa_t; 0 for all.

    Attributes:
        block: channels side by side in an activation.
    """

    def __init__(self, path: Path, threads: int = 1, isa: int = 0) -> None:
        self._library = ctypes.CDLL(str(path))
        if self._library.acnet_configure(threads, isa):
            raise RuntimeError(error_text(self._library))
        self.isa = self._library.acnet_isa()
        self.block = block_size(self.isa)

    def call(self, name: str, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> None:
        """Run kernel ``name``, which writes ``outputs``. uint16 arrays are taken for bfloat16.

        Raises:
            RuntimeError: with the kernel's error message.
        """
        arrays = [*inputs, *outputs]
        count = len(arrays)
        shapes = [(ctypes.c_int64 * array.ndim)(*array.shape) for array in arrays]
        types = [
            b"bfloat16" if array.dtype == np.uint16 else str(array.dtype).encode()
            for array in arrays
        ]
        failed = self._library[name](
            count,
            (ctypes.c_void_p * count)(*(array.ctypes.data for array in arrays)),
            (ctypes.c_int * count)(*(a.ndim for a in arrays)),
            (ctypes.POINTER(ctypes.c_int64) * count)(
                *(ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64)) for shape in shapes)
            ),
            (ctypes.c_char_p * count)(*types),
            None,
            None,
        )
        if failed:
            raise RuntimeError(error_text(self._library))

    def to_blocks(self, x: np.ndarray) -> np.ndarray:
        """(N, C, H, W) -> (N, C / b, H, W, b)."""
        n, c, h, w = x.shape
        return np.ascontiguousarray(
            x.reshape(n, c // self.block, self.block, h, w).transpose(0, 1, 3, 4, 2)
        )


def from_blocks(x: np.ndarray) -> np.ndarray:
    """(N, C / b, H, W, b) -> (N, C, H, W)."""
    n, blocks, h, w, block = x.shape
    return np.ascontiguousarray(x.transpose(0, 1, 4, 2, 3).reshape(n, blocks * block, h, w))


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 -> the bits of bfloat16, rounded to nearest, ties to even, as uint16."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """The bits of bfloat16 as uint16 -> float32, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def largest_difference(
    kernels: Kernels,
    groups: int = 8,
    channels: int = 32,
    size: int = 9,
    images: int = 3,
    stride: int = 2,
) -> float:
    """Largest difference from float64, over output, gradients and statistics.

    Relative to the largest value of each array.
    """
    rng = np.random.default_rng(0)
    x, weight = (
        rng.normal(size=(images, channels, size, size)),
        rng.normal(size=(channels, channels // groups, 3, 3)),
    )
    gamma, beta = rng.normal(size=channels), rng.normal(size=channels)
    out = (size - 1) // stride + 1
    shortcut, dy = rng.normal(size=(2, images, channels, out, out))

    surrounded: Any = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    sliding_window_view: Any = np.lib.stride_tricks.sliding_window_view
    windows = sliding_window_view(surrounded, (3, 3), (2, 3))
    windows = windows[:, :, ::stride, ::stride].reshape(
        images, groups, channels // groups, out, out, 3, 3
    )
    kernel = weight.reshape(groups, channels // groups, channels // groups, 3, 3)
    convolved = np.einsum("ngihwkl,goikl->ngohw", windows, kernel).reshape(
        images, channels, out, out
    )
    mean, variance = convolved.mean((0, 2, 3)), convolved.var((0, 2, 3))

    def per_channel(values: np.ndarray) -> np.ndarray:
        return values[:, None, None]

    inverse = 1 / np.sqrt(variance + 1e-5)
    normal = (convolved - per_channel(mean)) * per_channel(inverse)
    before = normal * per_channel(gamma) + per_channel(beta) + shortcut
    gradient = dy * (before > 0)
    dgamma, dbeta = (gradient * normal).sum((0, 2, 3)), gradient.sum((0, 2, 3))
    count = images * out * out
    of_convolved = per_channel(gamma * inverse) * (
        gradient - per_channel(dbeta) / count - normal * per_channel(dgamma) / count
    )
    of_convolved = of_convolved.reshape(images, groups, channels // groups, out, out)
    dweight = np.einsum("ngihwkl,ngohw->goikl", windows, of_convolved).reshape(weight.shape)
    padded = np.zeros((images, channels, size + 2, size + 2))
    for row in range(3):
        for column in range(3):
            part = np.einsum("ngohw,goi->ngihw", of_convolved, kernel[..., row, column]).reshape(
                images, channels, out, out
            )
            padded[
                :, :, row : row + stride * out : stride, column : column + stride * out : stride
            ] += part
    dx = padded[:, :, 1:-1, 1:-1]

    def flat(values: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(values, np.float32)

    def blocked(values: np.ndarray) -> np.ndarray:
        return kernels.to_blocks(flat(values))

    spec = ConvSpec(
        [(1, 1, 1, 1)],
        stride=(stride, stride),
        groups=groups,
        epilogue=Epilogue.ADD_RELU,
        eps=1e-5,
        decay=0.9,
    )
    settings = spec.attributes(kernels.block)
    parameters = [
        flat(weight),
        flat(gamma),
        flat(beta),
        np.zeros(channels, np.float32),
        np.ones(channels, np.float32),
    ]
    y, of_branch, statistics = (
        np.empty_like(blocked(dy)),
        np.empty_like(blocked(dy)),
        np.empty((1, 2, channels), np.float32),
    )
    running = [np.empty(channels, np.float32) for _ in range(2)]
    kernels.call(
        "conv_norm_forward",
        [settings, blocked(x), blocked(shortcut), *parameters],
        [y, statistics, of_branch, *running],
    )
    found = [
        np.empty_like(blocked(x)),
        np.empty_like(y),
        *(np.empty_like(parameter) for parameter in parameters[:3]),
    ]
    kernels.call(
        "conv_norm_backward",
        [settings, blocked(x), blocked(dy), y, statistics, *parameters, of_branch],
        found,
    )
    unbiased = variance * count / (count - 1)
    pairs = [
        (from_blocks(y), np.maximum(before, 0)),
        (from_blocks(found[0]), dx),
        (from_blocks(found[1]), gradient),
        (found[2], dweight),
        (found[3], dgamma),
        (found[4], dbeta),
        (running[0], 0.1 * mean),
        (running[1], 0.9 + 0.1 * unbiased),
    ]
    return max(float(np.abs(ours - theirs).max() / np.abs(theirs).max()) for ours, theirs in pairs)


def main(path: str) -> int:
    difference = largest_difference(Kernels(Path(path)))
    if not difference < _TOLERANCE:
        print(f"error: the kernels differ from float64 by {difference:.1e}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
