"""The table of attributes, int64, that is the first input of every kernel except addition.

The enums ``Attribute`` in source/conv_norm.h and source/pooling.cpp have the same order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

Pair = tuple[int, int]
# Top, bottom, left, right.
Padding = tuple[int, int, int, int]
# Each table begins with the layer's name, for error messages: UTF-8, eight bytes per number.
_NAME = 8


def attribute_table(*values: int) -> np.ndarray:
    """The table of these attributes, for a layer without a name."""
    return np.array([0] * _NAME + list(values), np.int64)


def with_layer_name(attributes: np.ndarray, name: str) -> np.ndarray:
    """A copy of the table for the layer of that name."""
    encoded = name.encode()[: 8 * _NAME - 1].ljust(8 * _NAME, b"\0")
    return np.concatenate([np.frombuffer(encoded, np.int64), attributes[_NAME:]])


class Epilogue(Enum):
    """What a kernel adds to its result, and the ReLU that it ends with."""

    NONE = "x"
    RELU = "relu(x)"
    RELU6 = "min(relu(x), 6)"
    ADD = "x + shortcut"
    ADD_RELU = "relu(x + shortcut)"

    @property
    def relu(self) -> int:
        """0 without a ReLU, 1 for ReLU, 2 for ReLU6, as ``Relu`` in source/arguments.h."""
        if self is Epilogue.RELU6:
            return 2
        return int(self in (Epilogue.RELU, Epilogue.ADD_RELU))

    @property
    def has_shortcut(self) -> bool:
        """Whether a second activation is added."""
        return self in (Epilogue.ADD, Epilogue.ADD_RELU)


@dataclass(frozen=True)
class ConvSpec:
    """What a kernel computes: branches of convolutions of one input, a batch norm, an epilogue.

    Attributes:
        paddings, kernel_sizes: one per branch, the largest kernel first; none for a batch norm
            alone.
        stride, dilation: rows and columns.
        input_gradient: whether the input's gradient is needed. It is zeros otherwise, as for
            images.
        eps: of the batch norms.
        decay: weight of the old running statistics.
    """

    paddings: Sequence[Padding] = ()
    kernel_sizes: Sequence[Pair] = ()
    out_channels: int = 0
    stride: Pair = (1, 1)
    dilation: Pair = (1, 1)
    groups: int = 1
    epilogue: Epilogue = Epilogue.NONE
    input_gradient: bool = True
    eps: float = 0.0
    decay: float = 0.0

    def attributes(self, block: int) -> np.ndarray:
        """The table of attributes for activations in blocks of ``block`` channels."""
        epilogue = self.epilogue
        reals = np.array([self.eps, self.decay], np.float64).view(np.int64)
        flags = (epilogue.relu, epilogue.has_shortcut, self.input_gradient)
        sides = (side for padding in self.paddings for side in padding)
        counts = (len(self.paddings), self.groups)
        return attribute_table(*counts, *self.stride, *self.dilation, *flags, block, *reals, *sides)


class Pooling(Enum):
    """How a window is pooled."""

    MAX = 0
    AVERAGE = 1


def pool_attributes(kernel_size: int, stride: int, padding: int, pooling: Pooling) -> np.ndarray:
    """The attributes of a square pooling window."""
    size, strides, sides = (kernel_size,) * 2, (stride,) * 2, (padding,) * 4
    return attribute_table(*size, *strides, *sides, pooling.value)
