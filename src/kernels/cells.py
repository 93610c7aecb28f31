"""Layers that compute with the kernels. They take layers of MindSpore for their parameters, names and initial values.

Each takes an activation in blocks (N, C / b, H, W, b) or plain (N, C, H, W), and returns one in blocks.
"""

from collections.abc import Sequence
from typing import Any

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from src.kernels.library import KernelLibrary
from src.kernels.operations import Convolution, ConvolutionNorm, Dense, Normalization, custom
from src.kernels.settings import Padding, named, table

# A first convolution's channels, which no block can hold, are taken as they are.
_FEW_CHANNELS = 4


def updated_statistics(network: nn.Cell) -> list[Parameter]:
    """The running means and variances whose new values come out of a backward pass as if they were gradients.

    Assigning them within the graph would double the time that it compiles; MindSpore may give a kernel a copy to write to.
    """
    return [parameter for _, cell in network.cells_and_names() if isinstance(cell, (ConvNormLayer, NormLayer))
            for parameter in cell.statistics]


def name_layers(network: nn.Cell) -> None:
    """Tell the kernels the names of the layers that they compute, for their errors."""
    for path, cell in network.cells_and_names():
        if isinstance(getattr(cell, "settings", None), Tensor):
            layer = path.removesuffix(".core")
            cell.settings = Tensor(named(cell.settings.asnumpy(), layer))


def takes(library: KernelLibrary, conv: nn.Conv2d) -> bool:
    """Whether the kernels compute this convolution: whole blocks of channels, or an image's few."""
    block, groups = library.block, conv.group
    if conv.out_channels % block or conv.pad_mode != "pad":
        return False
    if groups == 1:
        return conv.in_channels % block == 0 or conv.in_channels <= _FEW_CHANNELS
    inputs, outputs = conv.in_channels // groups, conv.out_channels // groups
    if conv.in_channels % block:
        return False
    if inputs >= block:
        return inputs % block == 0 and outputs % block == 0
    merged = block // inputs
    return block % inputs == 0 and groups % merged == 0 and outputs * merged % block == 0


class Blocked(nn.Cell):
    """Any activation in blocks, of the network's type."""

    def __init__(self, library: KernelLibrary, dtype: Any) -> None:
        super().__init__(auto_prefix=False)
        self.change = _Layout(library, library.block, dtype)

    def construct(self, x: Tensor) -> Tensor:
        return x if x.ndim == 5 else self.change(x)


class Plain(nn.Cell):
    """Any activation as (N, C, H, W) float32."""

    def __init__(self, library: KernelLibrary) -> None:
        super().__init__(auto_prefix=False)
        self.change = _Layout(library, 1, mindspore.float32)

    def construct(self, x: Tensor) -> Tensor:
        return x if x.ndim == 4 else self.change(x)


class _Layout(nn.Cell):
    def __init__(self, library: KernelLibrary, block: int, dtype: Any) -> None:
        super().__init__(auto_prefix=False)
        self.settings = Tensor(table())

        def shape(s: Any, x: Any) -> Any:
            channels = x[1] * x[4] if len(x) == 5 else x[1]
            return (x[0], channels // block, x[2], x[3], block) if block > 1 else (x[0], channels, x[2], x[3])
        self.forward = custom(library, "change_layout", shape, lambda s, x: dtype)
        self.backward = custom(library, "change_layout_back", lambda s, dy, x: x, lambda s, dy, x: x)

    def construct(self, x: Tensor) -> Tensor:
        return self.forward(self.settings, x)

    def bprop(self, x: Tensor, y: Tensor, dy: Tensor) -> tuple[Tensor]:
        return (self.backward(self.settings, dy, x),)


class PlainLayer(nn.Cell):
    """A layer of MindSpore among those of the kernels."""

    def __init__(self, library: KernelLibrary, layer: nn.Cell) -> None:
        super().__init__()
        self.plain, self.wrapped = Plain(library), layer

    def construct(self, x: Tensor) -> Tensor:
        return self.wrapped(self.plain(x))


class PlainLayerWithShortcut(nn.Cell):
    """The same with a second activation, which is added."""

    def __init__(self, library: KernelLibrary, layer: nn.Cell) -> None:
        super().__init__()
        self.plain, self.wrapped = Plain(library), layer

    def construct(self, x: Tensor, shortcut: Tensor) -> Tensor:
        return self.wrapped(self.plain(x), self.plain(shortcut))


class ConvLayer(nn.Cell):
    """A convolution with or without bias, plus a shortcut, through ReLU.

    Args:
        shortcut: whether it is called as (x, shortcut).
    """

    def __init__(self, library: KernelLibrary, conv: nn.Conv2d, dtype: Any, relu: bool, shortcut: bool) -> None:
        super().__init__()
        self.wrapped = conv
        self.input, self.other = _input_of(library, conv, dtype), Blocked(library, dtype)
        self.no_bias = Tensor(np.zeros(1, np.float32))
        self.core = Convolution(library, conv.out_channels, conv.kernel_size, conv.stride, _padding(conv), conv.dilation, conv.group,
                                relu=relu, shortcut=shortcut, input_gradient=conv.in_channels > _FEW_CHANNELS)

    def construct(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        bias = self.no_bias if self.wrapped.bias is None else self.wrapped.bias
        added = self.no_bias if shortcut is None else self.other(shortcut)
        return self.core(self.input(x), added, self.wrapped.weight, bias)


class ConvNormLayer(nn.Cell):
    """Convolutions of one input, each through its batch norm, added up, plus a shortcut, through ReLU.

    Args:
        layer: the cell that holds the parameters.
        branches: its (convolution, batch norm) pairs, that with the largest kernel first.
    """

    def __init__(self, library: KernelLibrary, layer: nn.Cell, branches: Sequence[tuple[nn.Conv2d, nn.BatchNorm2d]], dtype: Any, relu: bool,
                 shortcut: bool) -> None:
        super().__init__()
        self.wrapped = layer
        conv, norm = branches[0]
        self.input, self.other = _input_of(library, conv, dtype), Blocked(library, dtype)
        self.parameters = tuple(parameter for conv, norm in branches for parameter in (
            conv.weight, norm.gamma, norm.beta, norm.moving_mean, norm.moving_variance))
        self.statistics = tuple(parameter for _, norm in branches for parameter in (norm.moving_mean, norm.moving_variance))
        self.nothing = Tensor(np.zeros(1, np.float32))
        self.core = ConvolutionNorm(library, conv.out_channels, [conv.kernel_size for conv, _ in branches], conv.stride,
                                    [_padding(conv) for conv, _ in branches], conv.dilation, conv.group, relu=relu, shortcut=shortcut,
                                    input_gradient=conv.in_channels > _FEW_CHANNELS, eps=norm.eps, momentum=_momentum(norm))

    def construct(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        added = self.nothing if shortcut is None else self.other(shortcut)
        return self.core(self.input(x), added, self.parameters)[0]


class NormLayer(nn.Cell):
    """Batch norm, through ReLU."""

    def __init__(self, library: KernelLibrary, norm: nn.BatchNorm2d, dtype: Any, relu: bool) -> None:
        super().__init__()
        self.wrapped, self.input = norm, Blocked(library, dtype)
        self.statistics = (norm.moving_mean, norm.moving_variance)
        self.core = Normalization(library, norm.num_features, relu, norm.eps, _momentum(norm))

    def construct(self, x: Tensor) -> Tensor:
        norm = self.wrapped
        return self.core(self.input(x), norm.gamma, norm.beta, norm.moving_mean, norm.moving_variance)[0]


class DenseLayer(nn.Cell):
    """A dense layer with bias."""

    def __init__(self, library: KernelLibrary, dense: nn.Dense) -> None:
        super().__init__()
        self.wrapped, self.core = dense, Dense(library)

    def construct(self, x: Tensor) -> Tensor:
        return self.core(x, self.wrapped.weight, self.wrapped.bias)


class Fork(nn.Cell):
    """x -> (x, x)."""

    def __init__(self, library: KernelLibrary) -> None:
        super().__init__(auto_prefix=False)
        self.core = _add(library)

    def construct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x

    def bprop(self, x: Tensor, out: tuple[Tensor, Tensor], dout: tuple[Tensor, Tensor]) -> tuple[Tensor]:
        return (self.core(*dout),)


class Sum(nn.Cell):
    """(a, b) -> a + b, in blocks."""

    def __init__(self, library: KernelLibrary, dtype: Any) -> None:
        super().__init__(auto_prefix=False)
        self.blocked, self.core = Blocked(library, dtype), _Sum(library)

    def construct(self, a: Tensor, b: Tensor) -> Tensor:
        return self.core(self.blocked(a), self.blocked(b))


class _Sum(nn.Cell):
    def __init__(self, library: KernelLibrary) -> None:
        super().__init__(auto_prefix=False)
        self.core = _add(library)

    def construct(self, a: Tensor, b: Tensor) -> Tensor:
        return self.core(a, b)

    def bprop(self, a: Tensor, b: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        return dout, dout


def _add(library: KernelLibrary) -> ops.Custom:
    return custom(library, "add", lambda a, b: a, lambda a, b: a)


class Pool(nn.Cell):
    """Max or average pooling over windows; ``layer`` does so for plain activations."""

    def __init__(self, library: KernelLibrary, layer: nn.Cell, kernel_size: int, stride: int, padding: int, average: bool) -> None:
        super().__init__(auto_prefix=False)
        self.wrapped = layer
        self.core = _BlockedPool(library, kernel_size, stride, padding, average)

    def construct(self, x: Tensor) -> Tensor:
        return self.core(x)[0] if x.ndim == 5 else self.wrapped(x)


class _BlockedPool(nn.Cell):
    def __init__(self, library: KernelLibrary, kernel_size: int, stride: int, padding: int, average: bool) -> None:
        super().__init__(auto_prefix=False)
        self.settings = Tensor(table(kernel_size, kernel_size, stride, stride, padding, padding, padding, padding, average))

        def pooled(x: Any) -> Any:
            return (x[0], x[1], (x[2] + 2 * padding - kernel_size) // stride + 1, (x[3] + 2 * padding - kernel_size) // stride + 1, x[4])
        self.inference = custom(library, "pool_inference", lambda s, x: pooled(x), lambda s, x: x)
        self.forward = custom(library, "pool_forward", lambda s, x: (pooled(x), (1,) if average else pooled(x)),
                              lambda s, x: (x, mindspore.uint8))
        self.backward = custom(library, "pool_backward", lambda s, x, dy, places: x, lambda s, x, dy, places: dy)

    def construct(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.forward(self.settings, x) if self.training else (self.inference(self.settings, x),)

    def bprop(self, x: Tensor, out: tuple[Tensor, ...], dout: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (self.backward(self.settings, x, dout[0], out[1]),)


class GlobalAverage(nn.Cell):
    """(N, C / b, H, W, b) or (N, C, H, W) -> (N, C) float32."""

    def __init__(self, library: KernelLibrary, layer: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.wrapped, self.core = layer, _BlockedGlobalAverage(library)

    def construct(self, x: Tensor) -> Tensor:
        return self.core(x) if x.ndim == 5 else self.wrapped(x)


class _BlockedGlobalAverage(nn.Cell):
    def __init__(self, library: KernelLibrary) -> None:
        super().__init__(auto_prefix=False)
        self.settings = Tensor(table())
        self.forward = custom(library, "global_average_forward", lambda s, x: (x[0], x[1] * x[4]), lambda s, x: mindspore.float32)
        self.backward = custom(library, "global_average_backward", lambda s, x, dy: x, lambda s, x, dy: x)

    def construct(self, x: Tensor) -> Tensor:
        return self.forward(self.settings, x)

    def bprop(self, x: Tensor, y: Tensor, dy: Tensor) -> tuple[Tensor]:
        return (self.backward(self.settings, x, dy),)


class ImageNormalizer(nn.Cell):
    """(N, H, W, 3) uint8 -> (N, 3, H, W) of the network's type, value * scale + offset.

    Args:
        scale, offset: (3,) float32.
    """

    def __init__(self, library: KernelLibrary, scale: np.ndarray, offset: np.ndarray, dtype: Any) -> None:
        super().__init__(auto_prefix=False)
        self.settings, self.scale, self.offset = Tensor(table()), Tensor(scale), Tensor(offset)
        self.core = custom(library, "normalize_images", lambda s, x, a, b: (x[0], x[3], x[1], x[2]), lambda s, x, a, b: dtype)

    def construct(self, images: Tensor) -> Tensor:
        return self.core(self.settings, images, self.scale, self.offset)

    def bprop(self, images: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        return (ops.zeros_like(images),)


def _input_of(library: KernelLibrary, conv: nn.Conv2d, dtype: Any) -> nn.Cell:
    """What brings the input of ``conv`` into its layout."""
    return _OfType(library, dtype) if conv.in_channels <= _FEW_CHANNELS else Blocked(library, dtype)


class _OfType(nn.Cell):
    """A plain activation in the network's type."""

    def __init__(self, library: KernelLibrary, dtype: Any) -> None:
        super().__init__(auto_prefix=False)
        self.dtype, self.change = dtype, _Layout(library, 1, dtype)

    def construct(self, x: Tensor) -> Tensor:
        return x if x.dtype == self.dtype else self.change(x)


def _padding(conv: nn.Conv2d) -> Padding:
    padding = conv.padding
    return (padding,) * 4 if isinstance(padding, int) else tuple(padding)


def _momentum(norm: nn.BatchNorm2d) -> float:
    """Weight of the old running statistics; MindSpore keeps that of the new ones."""
    return 1 - norm.momentum
