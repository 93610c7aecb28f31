"""oneDNN's kernels as operations of MindSpore, with their gradients.

Activations are float32 or bfloat16 in blocks of b channels, (N, C / b, H, W, b); the input of a network's first convolution is plain,
(N, C, H, W). Weights, their gradients and batch-norm statistics are plain float32. Every operation takes the tensors' own memory.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mindspore
from mindspore import Tensor, nn, ops

from src.kernels.library import KernelLibrary
from src.kernels.settings import Padding, Pair, settings_table, table


def custom(library: KernelLibrary, name: str, shape: Any, dtype: Any) -> ops.Custom:
    """The kernel ``name``; ``shape`` and ``dtype`` of its outputs, or functions of the inputs' ones."""
    return ops.Custom(f"{library.path}:{name}", shape, dtype, func_type="aot")


class Convolution(nn.Cell):
    """(x, shortcut, weight, bias (C',) or (1,) for none) -> convolution, plus the shortcut, through ReLU.

    Args:
        kernel_size, stride, dilation: rows and columns.
        relu: False leaves ReLU out.
        shortcut: False leaves the addition out; the tensor in its place is any.
        input_gradient: False gives zeros as the gradient of x, for images, of which nobody asks one.
    """

    def __init__(self, library: KernelLibrary, out_channels: int, kernel_size: Pair, stride: Pair, padding: Padding, dilation: Pair,
                 groups: int, *, relu: bool, shortcut: bool, input_gradient: bool) -> None:
        super().__init__(auto_prefix=False)
        self.settings = Tensor(settings_table([padding], stride, dilation, groups, library.block, relu=relu, shortcut=shortcut,
                                              input_gradient=input_gradient))
        self.has_shortcut = shortcut
        convolved = _convolved(library, out_channels, kernel_size, stride, padding, dilation)
        self.inference = custom(library, "conv_inference", lambda s, x, *others: convolved(x), lambda s, x, *others: x)
        self.forward = custom(library, "conv_forward", lambda s, x, *others: convolved(x), lambda s, x, *others: x)
        self.backward = custom(library, "conv_backward",
                               lambda s, x, dy, y, weight, bias: (x, y if shortcut else (1,), weight, bias),
                               lambda s, x, dy, y, weight, bias: (x, y, weight, bias))

    def construct(self, x: Tensor, shortcut: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if not self.training:
            return self.inference(self.settings, x, shortcut, weight, bias)
        return self.forward(self.settings, x, shortcut, weight, bias)

    def bprop(self, x: Tensor, shortcut: Tensor, weight: Tensor, bias: Tensor, y: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        found = self.backward(self.settings, x, dy, y, weight, bias)
        return found[0], found[1] if self.has_shortcut else ops.zeros_like(shortcut), found[2], found[3]


class ConvolutionNorm(nn.Cell):
    """(x, shortcut, [weight, gamma, beta, running mean, running variance] of each branch) -> batch norms of the convolutions, added up,
    plus the shortcut, through ReLU; in training also (statistics, convolution of each branch, [new running mean, new running variance]
    of each branch), those updated as PyTorch's.

    In inference everything is one convolution.

    Args:
        paddings, kernel_sizes: of each branch; the first has the largest kernel.
        momentum: weight of the old running statistics.
    """

    def __init__(self, library: KernelLibrary, out_channels: int, kernel_sizes: Sequence[Pair], stride: Pair, paddings: Sequence[Padding],
                 dilation: Pair, groups: int, *, relu: bool, shortcut: bool, input_gradient: bool, eps: float, momentum: float) -> None:
        super().__init__(auto_prefix=False)
        branches = self.branches = len(kernel_sizes)
        self.settings = Tensor(settings_table(paddings, stride, dilation, groups, library.block, relu=relu, shortcut=shortcut,
                                              input_gradient=input_gradient, eps=eps, momentum=momentum))
        convolved = _convolved(library, out_channels, kernel_sizes[0], stride, paddings[0], dilation)

        def forward_shape(s: Any, x: Any, *others: Any) -> Any:
            return (convolved(x), (branches, 2, out_channels), *[convolved(x)] * branches, *[(out_channels,)] * (2 * branches))

        def forward_type(s: Any, x: Any, *others: Any) -> Any:
            return (x, mindspore.float32, *[x] * branches, *[mindspore.float32] * (2 * branches))

        def backward(s: Any, x: Any, dy: Any, y: Any, statistics: Any, *others: Any) -> Any:
            kept = [others[5 * branch + part] for branch in range(branches) for part in range(3)]
            return (x, y if shortcut else dy, *kept)

        def backward_shape(s: Any, x: Any, dy: Any, y: Any, statistics: Any, *others: Any) -> Any:
            kept = [others[5 * branch + part] for branch in range(branches) for part in range(3)]
            return (x, y if shortcut else (1,), *kept)

        self.inference = custom(library, "conv_norm_inference", lambda s, x, *others: convolved(x), lambda s, x, *others: x)
        self.forward = custom(library, "conv_norm_forward", forward_shape, forward_type)
        self.backward = custom(library, "conv_norm_backward", backward_shape, backward)
        self.has_shortcut = shortcut

    def construct(self, x: Tensor, shortcut: Tensor, parameters: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not self.training:
            return (self.inference(self.settings, x, shortcut, *parameters),)
        return self.forward(self.settings, x, shortcut, *parameters)

    def bprop(self, x: Tensor, shortcut: Tensor, parameters: tuple[Tensor, ...], out: tuple[Tensor, ...], dout: tuple[Tensor, ...],
              ) -> tuple[Any, ...]:
        found = self.backward(self.settings, x, dout[0], out[0], out[1], *parameters, *out[2:2 + self.branches])
        gradients: tuple[Tensor, ...] = ()
        for branch in range(self.branches):
            running = 2 + self.branches + 2 * branch
            gradients += (found[2 + 3 * branch], found[3 + 3 * branch], found[4 + 3 * branch], out[running], out[running + 1])
        return found[0], found[1] if self.has_shortcut else ops.zeros_like(shortcut), gradients


class Normalization(nn.Cell):
    """(x, gamma, beta, running mean, running variance) -> (batch norm through ReLU, statistics (1, 2, C), new running mean, new
    running variance); in inference the first alone."""

    def __init__(self, library: KernelLibrary, channels: int, relu: bool, eps: float, momentum: float) -> None:
        super().__init__(auto_prefix=False)
        self.settings = Tensor(settings_table([], (1, 1), (1, 1), 1, library.block, relu=relu, eps=eps, momentum=momentum))
        self.inference = custom(library, "norm_inference", lambda s, x, *others: x, lambda s, x, *others: x)
        self.forward = custom(library, "norm_forward", lambda s, x, *others: (x, (1, 2, channels), (channels,), (channels,)),
                              lambda s, x, *others: (x, *[mindspore.float32] * 3))
        self.backward = custom(library, "norm_backward", lambda s, dy, x, gamma, beta, *others: (x, gamma, beta),
                               lambda s, dy, x, gamma, beta, *others: (x, gamma, beta))

    def construct(self, x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, ...]:
        if not self.training:
            return (self.inference(self.settings, x, gamma, beta, mean, variance),)
        return self.forward(self.settings, x, gamma, beta, mean, variance)

    def bprop(self, x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor, out: tuple[Tensor, ...],
              dout: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        dx, dgamma, dbeta = self.backward(self.settings, dout[0], x, gamma, beta, mean, variance, out[1])
        return dx, dgamma, dbeta, out[2], out[3]


class Dense(nn.Cell):
    """(x (N, I), weight (O, I), bias (O)) -> x times the transposed weight, plus the bias, all plain float32."""

    def __init__(self, library: KernelLibrary) -> None:
        super().__init__(auto_prefix=False)
        self.settings = Tensor(table())
        self.forward = custom(library, "dense_forward", lambda s, x, weight, bias: (x[0], weight[0]), lambda s, x, weight, bias: x)
        self.backward = custom(library, "dense_backward", lambda s, x, dy, weight: (x, weight, (weight[0],)),
                               lambda s, x, dy, weight: (x, weight, weight))

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.forward(self.settings, x, weight, bias)

    def bprop(self, x: Tensor, weight: Tensor, bias: Tensor, y: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        dx, dweight, dbias = self.backward(self.settings, x, dy, weight)
        return dx, dweight, dbias


def _convolved(library: KernelLibrary, out_channels: int, kernel_size: Pair, stride: Pair, padding: Padding,
               dilation: Pair) -> Callable[[Any], Any]:
    """(N, ...) of a convolution's input -> the shape of its output."""
    top, bottom, left, right = padding

    def shape(x: Any) -> Any:
        rows = (x[2] + top + bottom - dilation[0] * (kernel_size[0] - 1) - 1) // stride[0] + 1
        columns = (x[3] + left + right - dilation[1] * (kernel_size[1] - 1) - 1) // stride[1] + 1
        return (x[0], out_channels // library.block, rows, columns, library.block)
    return shape
