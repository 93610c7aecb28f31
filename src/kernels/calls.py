"""Calling a kernel with numpy arrays, as MindSpore calls it with tensors: for tests and the self-test of a new build."""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np


class Kernels:
    """The kernels of the library at ``path``, computing with ``threads`` and the instructions ``isa`` (oneDNN's dnnl_cpu_isa_t, 0 for all).

    Attributes:
        block: channels side by side in an activation.
    """

    def __init__(self, path: Path, threads: int = 1, isa: int = 0) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.acnet_last_error.restype = ctypes.c_char_p
        if self._library.acnet_configure(threads, isa):
            raise RuntimeError(self._library.acnet_last_error().decode())
        self.isa = self._library.acnet_isa()
        self.block = 16 if self.isa & 0x27 == 0x27 else 8

    def call(self, name: str, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> None:
        """Run kernel ``name``, which writes ``outputs``. uint16 arrays are bfloat16. Raises RuntimeError with what the kernel says."""
        arrays = [*inputs, *outputs]
        count = len(arrays)
        shapes = [(ctypes.c_int64 * array.ndim)(*array.shape) for array in arrays]
        types = [b"bfloat16" if array.dtype == np.uint16 else str(array.dtype).encode() for array in arrays]
        failed = self._library[name](
            count, (ctypes.c_void_p * count)(*(array.ctypes.data for array in arrays)), (ctypes.c_int * count)(*(a.ndim for a in arrays)),
            (ctypes.POINTER(ctypes.c_int64) * count)(*(ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64)) for shape in shapes)),
            (ctypes.c_char_p * count)(*types), None, None)
        if failed:
            raise RuntimeError(self._library.acnet_last_error().decode())

    def to_blocks(self, x: np.ndarray) -> np.ndarray:
        """(N, C, H, W) -> (N, C / b, H, W, b)."""
        n, c, h, w = x.shape
        return np.ascontiguousarray(x.reshape(n, c // self.block, self.block, h, w).transpose(0, 1, 3, 4, 2))


def from_blocks(x: np.ndarray) -> np.ndarray:
    """(N, C / b, H, W, b) -> (N, C, H, W)."""
    n, blocks, h, w, block = x.shape
    return np.ascontiguousarray(x.transpose(0, 1, 4, 2, 3).reshape(n, blocks * block, h, w))


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 -> the bits of bfloat16, rounded to nearest, ties to even, as uint16."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """The inverse, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
