"""Layers that compute with the kernels.

Each layer takes its parameters, their names and their initial values from a layer of MindSpore, its
``source``. It accepts an activation in blocks (N, C / b, H, W, b) or plain (N, C, H, W), and
returns one in blocks.
"""

from collections.abc import Sequence
from typing import Any

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from src.kernels.attributes import (
    ConvSpec,
    Epilogue,
    Padding,
    Pooling,
    attribute_table,
    pool_attributes,
    with_layer_name,
)
from src.kernels.library import MAX_BRANCHES, KernelLibrary
from src.kernels.operations import (
    AddScaled,
    Convolution,
    ConvolutionNorm,
    Dense,
    Normalization,
    kernel,
)

# The few input channels of a first convolution are not blocked.
_MAX_PLAIN_CHANNELS = 4


def kernel_statistics(network: nn.Cell) -> list[Parameter]:
    """The running means and variances whose new values come out of the backward pass.

    See ``operations``: they take the place of these parameters' gradients.
    """
    return [
        parameter
        for _, cell in network.cells_and_names()
        if isinstance(cell, (ConvNormLayer, NormLayer))
        for parameter in cell.statistics
    ]


def set_layer_names(network: nn.Cell) -> None:
    """Tell the kernels the names of their layers, for error messages."""
    for path, cell in network.cells_and_names():
        if isinstance(getattr(cell, "attributes", None), Tensor):
            layer = path.removesuffix(".op")
            cell.attributes = Tensor(with_layer_name(cell.attributes.asnumpy(), layer))


def supports(library: KernelLibrary, branches: Sequence[nn.Conv2d]) -> bool:
    """Whether the kernels can compute the sum of these convolutions."""
    return 0 < len(branches) <= MAX_BRANCHES and all(
        _supports_conv(library.block, conv) for conv in branches
    )


def _supports_conv(block: int, conv: nn.Conv2d) -> bool:
    """Whether channels make whole blocks, or are the few channels of an image."""
    groups = conv.group
    if conv.out_channels % block or conv.pad_mode != "pad":
        return False
    if groups == 1:
        return conv.in_channels % block == 0 or conv.in_channels <= _MAX_PLAIN_CHANNELS
    inputs, outputs = conv.in_channels // groups, conv.out_channels // groups
    if conv.in_channels % block:
        return False
    if inputs >= block:
        return inputs % block == 0 and outputs % block == 0
    merged = block // inputs
    return block % inputs == 0 and groups % merged == 0 and outputs * merged % block == 0


class ToBlocked(nn.Cell):
    """Any activation -> blocks, in the network's type."""

    def __init__(self, library: KernelLibrary, dtype: Any) -> None:
        super().__init__(auto_prefix=False)
        self.reorder = _Reorder(library, library.block, dtype)

    def construct(self, x: Tensor) -> Tensor:
        return x if x.ndim == 5 else self.reorder(x)


class ToNchw(nn.Cell):
    """Any activation -> (N, C, H, W) float32."""

    def __init__(self, library: KernelLibrary) -> None:
        super().__init__(auto_prefix=False)
        self.reorder = _Reorder(library, 1, mindspore.float32)

    def construct(self, x: Tensor) -> Tensor:
        return x if x.ndim == 4 and x.dtype == mindspore.float32 else self.reorder(x)


class _ToType(nn.Cell):
    """A plain activation -> the network's type."""

    def __init__(self, library: KernelLibrary, dtype: Any) -> None:
        super().__init__(auto_prefix=False)
        self.dtype, self.reorder = dtype, _Reorder(library, 1, dtype)

    def construct(self, x: Tensor) -> Tensor:
        return x if x.dtype == self.dtype else self.reorder(x)


class _Reorder(nn.Cell):
    def __init__(self, library: KernelLibrary, block: int, dtype: Any) -> None:
        super().__init__(auto_prefix=False)
        self.attributes = Tensor(attribute_table())

        def shape(a: Any, x: Any) -> Any:
            channels = x[1] * x[4] if len(x) == 5 else x[1]
            if block > 1:
                return x[0], channels // block, x[2], x[3], block
            return x[0], channels, x[2], x[3]

        def like_x(a: Any, dy: Any, x: Any) -> Any:
            return x

        self.forward = kernel(library, "change_layout", shape, lambda a, x: dtype)
        self.backward = kernel(library, "change_layout_back", like_x, like_x)

    def construct(self, x: Tensor) -> Tensor:
        return self.forward(self.attributes, x)

    def bprop(self, x: Tensor, y: Tensor, dy: Tensor) -> tuple[Tensor]:
        return (self.backward(self.attributes, dy, x),)


class NchwFallback(nn.Cell):
    """A layer of MindSpore between layers of the kernels."""

    def __init__(self, library: KernelLibrary, source: nn.Cell) -> None:
        super().__init__()
        self.to_nchw, self.source = ToNchw(library), source

    def construct(self, x: Tensor) -> Tensor:
        return self.source(self.to_nchw(x))


class NchwFallbackWithShortcut(nn.Cell):
    """A layer of MindSpore with two activations, x and the shortcut, and perhaps other inputs."""

    def __init__(self, library: KernelLibrary, source: nn.Cell) -> None:
        super().__init__()
        self.to_nchw, self.source = ToNchw(library), source

    def construct(self, x: Tensor, shortcut: Tensor, *others: Tensor) -> Tensor:
        return self.source(self.to_nchw(x), self.to_nchw(shortcut), *others)


class ConvLayer(nn.Cell):
    """x -> [relu](conv(x) [+ bias]), or (x, shortcut) -> relu(conv(x) + shortcut)."""

    def __init__(
        self, library: KernelLibrary, source: nn.Conv2d, dtype: Any, epilogue: Epilogue
    ) -> None:
        super().__init__()
        self.source = source
        self.input_layout = _input_layout(library, source, dtype)
        self.shortcut_layout = ToBlocked(library, dtype)
        self.dummy = Tensor(np.zeros(1, np.float32))
        self.op = Convolution(library, _conv_spec([source], epilogue))

    def construct(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        bias = self.dummy if self.source.bias is None else self.source.bias
        added = self.dummy if shortcut is None else self.shortcut_layout(shortcut)
        return self.op(self.input_layout(x), added, self.source.weight, bias)


class ConvNormLayer(nn.Cell):
    """Convolutions of x, each with its batch norm, added up; called like a ConvLayer.

    Args:
        source: the cell that holds the parameters.
        branches: its (convolution, batch norm) pairs; the first has the largest kernel.
    """

    def __init__(
        self,
        library: KernelLibrary,
        source: nn.Cell,
        branches: Sequence[tuple[nn.Conv2d, nn.BatchNorm2d]],
        dtype: Any,
        epilogue: Epilogue,
    ) -> None:
        super().__init__()
        self.source = source
        conv, norm = branches[0]
        self.input_layout = _input_layout(library, conv, dtype)
        self.shortcut_layout = ToBlocked(library, dtype)
        self.parameters = tuple(
            parameter
            for conv, norm in branches
            for parameter in (
                conv.weight,
                norm.gamma,
                norm.beta,
                norm.moving_mean,
                norm.moving_variance,
            )
        )
        self.statistics = tuple(
            parameter
            for _, norm in branches
            for parameter in (norm.moving_mean, norm.moving_variance)
        )
        self.dummy = Tensor(np.zeros(1, np.float32))
        convs = [conv for conv, _ in branches]
        self.op = ConvolutionNorm(library, _conv_spec(convs, epilogue, norm))

    def construct(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        added = self.dummy if shortcut is None else self.shortcut_layout(shortcut)
        return self.op(self.input_layout(x), added, self.parameters)[0]


class NormLayer(nn.Cell):
    """x -> [relu](batch norm of x)."""

    def __init__(
        self, library: KernelLibrary, source: nn.BatchNorm2d, dtype: Any, epilogue: Epilogue
    ) -> None:
        super().__init__()
        self.source, self.input_layout = source, ToBlocked(library, dtype)
        self.statistics = (source.moving_mean, source.moving_variance)
        spec = ConvSpec(
            out_channels=source.num_features,
            epilogue=epilogue,
            eps=source.eps,
            decay=_decay(source),
        )
        self.op = Normalization(library, spec)

    def construct(self, x: Tensor) -> Tensor:
        norm = self.source
        x = self.input_layout(x)
        return self.op(x, norm.gamma, norm.beta, norm.moving_mean, norm.moving_variance)[0]


class DenseLayer(nn.Cell):
    """A dense layer with bias."""

    def __init__(self, library: KernelLibrary, source: nn.Dense) -> None:
        super().__init__()
        self.source, self.op = source, Dense(library)

    def construct(self, x: Tensor) -> Tensor:
        return self.op(x, self.source.weight, self.source.bias)


class SplitResidual(nn.Cell):
    """x -> (x, x), the inputs of the two branches of a residual block."""

    def __init__(self, library: KernelLibrary) -> None:
        super().__init__(auto_prefix=False)
        self.op = _add_kernel(library)

    def construct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x

    def bprop(
        self, x: Tensor, out: tuple[Tensor, Tensor], dout: tuple[Tensor, Tensor]
    ) -> tuple[Tensor]:
        return (self.op(*dout),)


class Add(nn.Cell):
    """(a, b) -> a + b, in blocks."""

    def __init__(self, library: KernelLibrary, dtype: Any) -> None:
        super().__init__(auto_prefix=False)
        self.to_blocked, self.op = ToBlocked(library, dtype), _Add(library)

    def construct(self, a: Tensor, b: Tensor) -> Tensor:
        if a.ndim == 4 and b.ndim == 4:
            return self.op(a, b)
        return self.op(self.to_blocked(a), self.to_blocked(b))


class StochasticAdd(nn.Cell):
    """(branch, shortcut, factors (N,) float32) -> [relu](branch * factor + shortcut), in blocks.

    Without factors they are 1.
    """

    def __init__(self, library: KernelLibrary, dtype: Any, epilogue: Epilogue) -> None:
        super().__init__(auto_prefix=False)
        self.to_blocked, self.op = ToBlocked(library, dtype), AddScaled(library, epilogue)

    def construct(self, branch: Tensor, shortcut: Tensor, factors: Tensor | None = None) -> Tensor:
        if factors is None:
            factors = ops.ones((branch.shape[0],), mindspore.float32)
        return self.op(self.to_blocked(branch), self.to_blocked(shortcut), factors)


class Concat(nn.Cell):
    """Two activations, one after the other along the channels.

    ``source`` joins plain ones; a blocked one meets a plain one as plain.
    """

    def __init__(self, library: KernelLibrary, source: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.to_nchw, self.source = ToNchw(library), source

    def construct(self, a: Tensor, b: Tensor) -> Tensor:
        if a.ndim == 5 and b.ndim == 5:
            return self.source(a, b)
        return self.source(self.to_nchw(a), self.to_nchw(b))


class _Add(nn.Cell):
    def __init__(self, library: KernelLibrary) -> None:
        super().__init__(auto_prefix=False)
        self.op = _add_kernel(library)

    def construct(self, a: Tensor, b: Tensor) -> Tensor:
        return self.op(a, b)

    def bprop(self, a: Tensor, b: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        return dout, dout


def _add_kernel(library: KernelLibrary) -> ops.Custom:
    return kernel(library, "add", lambda a, b: a, lambda a, b: a)


class Pool(nn.Cell):
    """Max or average pooling over windows. ``source`` pools plain activations."""

    def __init__(
        self,
        library: KernelLibrary,
        source: nn.Cell,
        kernel_size: int,
        stride: int,
        padding: int,
        pooling: Pooling,
    ) -> None:
        super().__init__(auto_prefix=False)
        self.source = source
        self.op = _BlockedPool(library, kernel_size, stride, padding, pooling)

    def construct(self, x: Tensor) -> Tensor:
        return self.op(x)[0] if x.ndim == 5 else self.source(x)


class _BlockedPool(nn.Cell):
    def __init__(
        self, library: KernelLibrary, kernel_size: int, stride: int, padding: int, pooling: Pooling
    ) -> None:
        super().__init__(auto_prefix=False)
        self.attributes = Tensor(pool_attributes(kernel_size, stride, padding, pooling))

        def pooled(a: Any, x: Any) -> Any:
            rows, columns = ((x[i] + 2 * padding - kernel_size) // stride + 1 for i in (2, 3))
            return x[0], x[1], rows, columns, x[4]

        def forward_shapes(a: Any, x: Any) -> Any:
            return pooled(a, x), pooled(a, x) if pooling is Pooling.MAX else (1,)

        self.inference = kernel(library, "pool_inference", pooled, lambda a, x: x)
        self.forward = kernel(
            library, "pool_forward", forward_shapes, lambda a, x: (x, mindspore.uint8)
        )
        self.backward = kernel(
            library, "pool_backward", lambda a, x, dy, argmax: x, lambda a, x, dy, argmax: dy
        )

    def construct(self, x: Tensor) -> tuple[Tensor, ...]:
        if not self.training:
            return (self.inference(self.attributes, x),)
        return self.forward(self.attributes, x)

    def bprop(self, x: Tensor, out: tuple[Tensor, ...], dout: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (self.backward(self.attributes, x, dout[0], out[1]),)


class GlobalAverage(nn.Cell):
    """(N, C / b, H, W, b) or (N, C, H, W) -> (N, C) float32."""

    def __init__(self, library: KernelLibrary, source: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.source, self.op = source, _BlockedGlobalAverage(library)

    def construct(self, x: Tensor) -> Tensor:
        return self.op(x) if x.ndim == 5 else self.source(x)


class _BlockedGlobalAverage(nn.Cell):
    def __init__(self, library: KernelLibrary) -> None:
        super().__init__(auto_prefix=False)
        self.attributes = Tensor(attribute_table())
        self.forward = kernel(
            library,
            "global_average_forward",
            lambda a, x: (x[0], x[1] * x[4]),
            lambda a, x: mindspore.float32,
        )
        self.backward = kernel(
            library, "global_average_backward", lambda a, x, dy: x, lambda a, x, dy: x
        )

    def construct(self, x: Tensor) -> Tensor:
        return self.forward(self.attributes, x)

    def bprop(self, x: Tensor, y: Tensor, dy: Tensor) -> tuple[Tensor]:
        return (self.backward(self.attributes, x, dy),)


class ImageNormalizer(nn.Cell):
    """(N, H, W, 3) uint8 -> (N, 3, H, W) in the network's type, value * scale + offset.

    Args:
        scale, offset: (3,) float32.
    """

    def __init__(
        self, library: KernelLibrary, scale: np.ndarray, offset: np.ndarray, dtype: Any
    ) -> None:
        super().__init__(auto_prefix=False)
        self.attributes = Tensor(attribute_table())
        self.scale, self.offset = Tensor(scale), Tensor(offset)
        self.op = kernel(
            library,
            "normalize_images",
            lambda a, x, scale, offset: (x[0], x[3], x[1], x[2]),
            lambda a, x, scale, offset: dtype,
        )

    def construct(self, images: Tensor) -> Tensor:
        return self.op(self.attributes, images, self.scale, self.offset)

    def bprop(self, images: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        return (ops.zeros_like(images),)


def _input_layout(library: KernelLibrary, conv: nn.Conv2d, dtype: Any) -> nn.Cell:
    """The Cell that brings the input of ``conv`` into the layout of its kernel."""
    if conv.in_channels <= _MAX_PLAIN_CHANNELS:
        return _ToType(library, dtype)
    return ToBlocked(library, dtype)


def _conv_spec(
    branches: Sequence[nn.Conv2d], epilogue: Epilogue, norm: nn.BatchNorm2d | None = None
) -> ConvSpec:
    """The ConvSpec of convolutions of the same input, with batch norms like ``norm``."""
    conv = branches[0]
    return ConvSpec(
        paddings=[conv_padding(branch) for branch in branches],
        kernel_sizes=[branch.kernel_size for branch in branches],
        out_channels=conv.out_channels,
        stride=conv.stride,
        dilation=conv.dilation,
        groups=conv.group,
        epilogue=epilogue,
        input_gradient=conv.in_channels > _MAX_PLAIN_CHANNELS,
        eps=0.0 if norm is None else norm.eps,
        decay=0.0 if norm is None else _decay(norm),
    )


def conv_padding(conv: nn.Conv2d) -> Padding:
    """(top, bottom, left, right) of a convolution."""
    padding = conv.padding
    return (padding,) * 4 if isinstance(padding, int) else tuple(padding)


def _decay(norm: nn.BatchNorm2d) -> float:
    """The weight of the OLD running statistics in an update.

    ``nn.BatchNorm2d`` takes that weight as its argument ``momentum``, but stores the weight of the
    new statistics in its attribute ``momentum``.
    """
    return 1 - norm.momentum
