"""The table of settings that every kernel but addition takes first, int64; source/runtime.h and operations.cpp read it."""

from collections.abc import Sequence

import numpy as np

Pair = tuple[int, int]
# Top, bottom, left, right.
Padding = tuple[int, int, int, int]
# Every table begins with the layer's name, for errors: UTF-8, eight bytes a number.
_NAME = 8


def table(*values: int) -> np.ndarray:
    """The table of these settings, of a layer that has no name yet."""
    return np.array([0] * _NAME + list(values), np.int64)


def named(settings: np.ndarray, name: str) -> np.ndarray:
    """The same table for the layer of that name."""
    encoded = name.encode()[:8 * _NAME - 1].ljust(8 * _NAME, b"\0")
    return np.concatenate([np.frombuffer(encoded, np.int64), settings[_NAME:]])


def settings_table(paddings: Sequence[Padding], stride: Pair, dilation: Pair, groups: int, block: int, *, relu: bool = False,
                   shortcut: bool = False, input_gradient: bool = True, eps: float = 0.0, momentum: float = 0.0) -> np.ndarray:
    """The table of a convolution or batch norm.

    Args:
        paddings: of each branch.
        block: channels side by side in an activation.
        momentum: weight of the old running statistics.
    """
    reals = np.array([eps, momentum], np.float64).view(np.int64)
    return table(len(paddings), groups, *stride, *dilation, relu, shortcut, input_gradient, block, *reals,
                 *(side for padding in paddings for side in padding))
