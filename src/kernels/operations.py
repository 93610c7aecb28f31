"""oneDNN's kernels as MindSpore operations, with their gradients.

Activations are float32 or bfloat16 in blocks of b channels, (N, C / b, H, W, b). The input of a
network's first convolution is plain, (N, C, H, W). Weights, their gradients and batch-norm
statistics are plain float32. Every operation works on the tensors' own memory.

Running statistics: assigning them inside a graph would double its compile time, and MindSpore may
give a kernel a copy to write to. So the forward kernel returns the new running mean and variance as
further outputs, and ``bprop`` returns them instead of the gradients of the old ones. The
training step asks for these "gradients" too (``layers.kernel_statistics``) and assigns them itself.
"""

from collections.abc import Callable
from typing import Any

import mindspore
from mindspore import Tensor, nn, ops

from src.kernels.attributes import ConvSpec, Epilogue, attribute_table
from src.kernels.library import KernelLibrary


def kernel(library: KernelLibrary, name: str, shape: Any, dtype: Any) -> ops.Custom:
    """The kernel ``name``. ``shape`` and ``dtype``: functions of those of the inputs."""
    return ops.Custom(f"{library.path}:{name}", shape, dtype, func_type="aot")


class Convolution(nn.Cell):
    """(x, shortcut, weight, bias) -> [relu](conv(x) + bias [+ shortcut]), by ``spec``.

    The bias has shape (C',), or (1,) for none. Without a shortcut the second input is ignored.
    """

    def __init__(self, library: KernelLibrary, spec: ConvSpec) -> None:
        super().__init__(auto_prefix=False)
        self.attributes = Tensor(spec.attributes(library.block))
        shortcut = self.has_shortcut = spec.epilogue.has_shortcut
        output = _conv_shape(library, spec)

        def output_shape(a: Any, x: Any, *others: Any) -> Any:
            return output(x)

        def output_type(a: Any, x: Any, *others: Any) -> Any:
            return x

        def gradient_shapes(a: Any, x: Any, dy: Any, y: Any, weight: Any, bias: Any) -> Any:
            return x, y if shortcut else (1,), weight, bias

        def gradient_types(a: Any, x: Any, dy: Any, y: Any, weight: Any, bias: Any) -> Any:
            return x, y, weight, bias

        self.inference = kernel(library, "conv_inference", output_shape, output_type)
        self.forward = kernel(library, "conv_forward", output_shape, output_type)
        self.backward = kernel(library, "conv_backward", gradient_shapes, gradient_types)

    def construct(self, x: Tensor, shortcut: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if not self.training:
            return self.inference(self.attributes, x, shortcut, weight, bias)
        return self.forward(self.attributes, x, shortcut, weight, bias)

    def bprop(
        self, x: Tensor, shortcut: Tensor, weight: Tensor, bias: Tensor, y: Tensor, dy: Tensor
    ) -> tuple[Tensor, ...]:
        dx, dshortcut, dweight, dbias = self.backward(self.attributes, x, dy, y, weight, bias)
        if not self.has_shortcut:
            dshortcut = ops.zeros_like(shortcut)
        return dx, dshortcut, dweight, dbias


class ConvolutionNorm(nn.Cell):
    """Batch norms of convolutions of x, added up: [relu](sum of the branches [+ shortcut]).

    Called as (x, shortcut, parameters), where the parameters are [weight, gamma, beta, running
    mean, running variance] of each branch. Returns the output; in training also the statistics, the
    convolution of each branch, and [new running mean, new running variance] of each branch, updated
    as PyTorch does. In inference everything is one convolution.
    """

    def __init__(self, library: KernelLibrary, spec: ConvSpec) -> None:
        super().__init__(auto_prefix=False)
        self.attributes = Tensor(spec.attributes(library.block))
        branches = self.branches = len(spec.paddings)
        shortcut = self.has_shortcut = spec.epilogue.has_shortcut
        out_channels = spec.out_channels
        output = _conv_shape(library, spec)

        def output_shapes(a: Any, x: Any, *others: Any) -> Any:
            running = [(out_channels,)] * (2 * branches)
            return output(x), (branches, 2, out_channels), *[output(x)] * branches, *running

        def output_types(a: Any, x: Any, *others: Any) -> Any:
            return x, mindspore.float32, *[x] * branches, *[mindspore.float32] * (2 * branches)

        def trained(parameters: Any) -> list[Any]:
            """Weight, gamma and beta of each branch."""
            return [
                parameters[5 * branch + part] for branch in range(branches) for part in range(3)
            ]

        def gradient_shapes(a: Any, x: Any, dy: Any, y: Any, statistics: Any, *others: Any) -> Any:
            return (x, y if shortcut else (1,), *trained(others))

        def gradient_types(a: Any, x: Any, dy: Any, y: Any, statistics: Any, *others: Any) -> Any:
            return (x, y, *trained(others))

        self.inference = kernel(
            library, "conv_norm_inference", lambda a, x, *others: output(x), lambda a, x, *others: x
        )
        self.forward = kernel(library, "conv_norm_forward", output_shapes, output_types)
        self.backward = kernel(library, "conv_norm_backward", gradient_shapes, gradient_types)

    def construct(
        self, x: Tensor, shortcut: Tensor, parameters: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        if not self.training:
            return (self.inference(self.attributes, x, shortcut, *parameters),)
        return self.forward(self.attributes, x, shortcut, *parameters)

    def bprop(
        self,
        x: Tensor,
        shortcut: Tensor,
        parameters: tuple[Tensor, ...],
        out: tuple[Tensor, ...],
        dout: tuple[Tensor, ...],
    ) -> tuple[Any, ...]:
        y, statistics, convolved = out[0], out[1], out[2 : 2 + self.branches]
        found = self.backward(self.attributes, x, dout[0], y, statistics, *parameters, *convolved)
        gradients: tuple[Tensor, ...] = ()
        for branch in range(self.branches):
            dweight = 2 + 3 * branch
            running = 2 + self.branches + 2 * branch
            # Instead of gradients of the running statistics: their new values.
            gradients += (found[dweight], found[dweight + 1], found[dweight + 2])
            gradients += (out[running], out[running + 1])
        return found[0], found[1] if self.has_shortcut else ops.zeros_like(shortcut), gradients


class Normalization(nn.Cell):
    """(x, gamma, beta, running mean, running variance) -> [relu](batch norm of x).

    In training also returns (statistics (1, 2, C), new running mean, new running variance).
    """

    def __init__(self, library: KernelLibrary, spec: ConvSpec) -> None:
        super().__init__(auto_prefix=False)
        self.attributes = Tensor(spec.attributes(library.block))
        channels = spec.out_channels

        def output_shapes(a: Any, x: Any, *others: Any) -> Any:
            return x, (1, 2, channels), (channels,), (channels,)

        def output_types(a: Any, x: Any, *others: Any) -> Any:
            return (x, *[mindspore.float32] * 3)

        def gradients(a: Any, dy: Any, x: Any, gamma: Any, beta: Any, *others: Any) -> Any:
            return x, gamma, beta

        def like_x(a: Any, x: Any, *others: Any) -> Any:
            return x

        self.inference = kernel(library, "norm_inference", like_x, like_x)
        self.forward = kernel(library, "norm_forward", output_shapes, output_types)
        self.backward = kernel(library, "norm_backward", gradients, gradients)

    def construct(
        self, x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor
    ) -> tuple[Tensor, ...]:
        if not self.training:
            return (self.inference(self.attributes, x, gamma, beta, mean, variance),)
        return self.forward(self.attributes, x, gamma, beta, mean, variance)

    def bprop(
        self,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        mean: Tensor,
        variance: Tensor,
        out: tuple[Tensor, ...],
        dout: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        dx, dgamma, dbeta = self.backward(
            self.attributes, dout[0], x, gamma, beta, mean, variance, out[1]
        )
        # As in ConvolutionNorm: new running statistics instead of gradients.
        return dx, dgamma, dbeta, out[2], out[3]


class AddScaled(nn.Cell):
    """(branch, shortcut, factors (N,) float32) -> [relu](branch * factor + shortcut)."""

    def __init__(self, library: KernelLibrary, epilogue: Epilogue) -> None:
        super().__init__(auto_prefix=False)
        self.attributes = Tensor(attribute_table(epilogue.relu))

        def like_branch(a: Any, branch: Any, *others: Any) -> Any:
            return branch

        def gradients(a: Any, y: Any, *others: Any) -> Any:
            return y, y

        self.forward = kernel(library, "add_scaled", like_branch, like_branch)
        self.backward = kernel(library, "add_scaled_backward", gradients, gradients)

    def construct(self, branch: Tensor, shortcut: Tensor, factors: Tensor) -> Tensor:
        return self.forward(self.attributes, branch, shortcut, factors)

    def bprop(
        self, branch: Tensor, shortcut: Tensor, factors: Tensor, y: Tensor, dy: Tensor
    ) -> tuple[Tensor, ...]:
        dbranch, dshortcut = self.backward(self.attributes, y, dy, factors)
        return dbranch, dshortcut, ops.zeros_like(factors)


class Dense(nn.Cell):
    """(x (N, I), weight (O, I), bias (O)) -> x weight^T + bias, all plain float32."""

    def __init__(self, library: KernelLibrary) -> None:
        super().__init__(auto_prefix=False)
        self.attributes = Tensor(attribute_table())

        def output_shape(a: Any, x: Any, weight: Any, bias: Any) -> Any:
            return x[0], weight[0]

        def gradient_shapes(a: Any, x: Any, dy: Any, weight: Any) -> Any:
            return x, weight, (weight[0],)

        def gradient_types(a: Any, x: Any, dy: Any, weight: Any) -> Any:
            return x, weight, weight

        self.forward = kernel(library, "dense_forward", output_shape, lambda a, x, w, b: x)
        self.backward = kernel(library, "dense_backward", gradient_shapes, gradient_types)

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.forward(self.attributes, x, weight, bias)

    def bprop(
        self, x: Tensor, weight: Tensor, bias: Tensor, y: Tensor, dy: Tensor
    ) -> tuple[Tensor, ...]:
        dx, dweight, dbias = self.backward(self.attributes, x, dy, weight)
        return dx, dweight, dbias


def _conv_shape(library: KernelLibrary, spec: ConvSpec) -> Callable[[Any], Any]:
    """A function from the shape of a convolution's input to that of its output."""
    top, bottom, left, right = spec.paddings[0]
    rows, columns = (
        dilation * (size - 1) + 1 for dilation, size in zip(spec.dilation, spec.kernel_sizes[0])
    )

    def shape(x: Any) -> Any:
        height = (x[2] + top + bottom - rows) // spec.stride[0] + 1
        width = (x[3] + left + right - columns) // spec.stride[1] + 1
        return x[0], spec.out_channels // library.block, height, width, library.block

    return shape
