"""Blocks that train with several branches and become one convolution; conversion of networks.

Convolution is linear and batch norm in inference is affine, so any sum of branches made of them is
one convolution (Ding et al., "ACNet", ICCV 2019, section 3.3). Computed in float64.
"""

import copy
from typing import Any

import numpy as np
from mindspore import Tensor, nn


class ReparamConv(nn.Cell):
    """Base class of the blocks: (N, in_channels, H, W) float -> (N, out_channels, H', W').

    A subclass makes its branches in ``__init__`` and adds them in ``construct``, which may be given
    the shortcut of a residual block. It adds the shortcut before the last batch norm: on GPU,
    MindSpore fuses that batch norm with the addition and the ReLU that follow it, and executes
    batch norms in the order of the code (docs/gpu.md). Its ``equivalent_kernel_bias`` returns the
    convolution that computes the same in inference: the kernel (out_channels, in_channels / groups,
    k, k) and the bias (out_channels,), in float64.

    Attributes:
        geometry: arguments of that convolution.
        shift: padding minus ``dilation * (k // 2)``, the reach of the kernel: number of pixels by
            which the input of a 1x1 branch is padded on each side, or cropped if negative, so that
            all windows have the same centre.

    Raises:
        ValueError: for an even kernel, or sizes, groups or dilation that no convolution has.
    """

    adds_shortcut = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.geometry = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "kernel_size": kernel_size,
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
        }
        _check_geometry(type(self).__name__, self.geometry)
        self.shift = padding - dilation * (kernel_size // 2)

    def norm_branches(self) -> tuple[tuple[nn.Conv2d, nn.Cell], ...]:
        """(convolution, batch norm) of each branch, the largest kernel first.

        () unless the block is only the sum of its branches, each convolution reads the block's own
        input, and all windows have the same centre.
        """
        return ()

    def fused(self) -> nn.Conv2d:
        """The plain convolution with bias that computes what this block computes in inference."""
        conv = plain_conv(**self.geometry)
        kernel, bias = self.equivalent_kernel_bias()
        conv.weight.set_data(Tensor(kernel.astype(np.float32)))
        conv.bias.set_data(Tensor(bias.astype(np.float32)))
        return conv

    def conv(self, kernel_size: int | tuple[int, int], **changes: Any) -> nn.Conv2d:
        """A convolution without bias for a branch: ``geometry`` with this size and ``changes``."""
        values = {**self.geometry, **changes, "kernel_size": kernel_size}
        return nn.Conv2d(
            values["in_channels"],
            values["out_channels"],
            kernel_size,
            values["stride"],
            pad_mode="pad",
            padding=values["padding"],
            dilation=values["dilation"],
            group=values["groups"],
            has_bias=False,
        )

    def at_centre(self, kernel: np.ndarray) -> np.ndarray:
        """A kernel (O, I, h, w) with odd h and w up to k, in the centre of zeros (O, I, k, k)."""
        size = self.geometry["kernel_size"]
        rows, columns = ((size - length) // 2 for length in kernel.shape[2:])
        return np.pad(kernel, ((0, 0), (0, 0), (rows, rows), (columns, columns)))

    def identity_kernel(self) -> np.ndarray:
        """The 1x1 kernel (C, C / groups, 1, 1), float64, that leaves its input as it is."""
        in_group = self.geometry["in_channels"] // self.geometry["groups"]
        channels = np.arange(self.geometry["in_channels"])
        kernel = np.zeros((len(channels), in_group, 1, 1))
        kernel[channels, channels % in_group] = 1
        return kernel


def plain_conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> nn.Conv2d:
    """A k x k convolution with bias: what a block is after fusion."""
    return nn.Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride,
        pad_mode="pad",
        padding=padding,
        dilation=dilation,
        group=groups,
        has_bias=True,
    )


def fuse(network: nn.Cell) -> nn.Cell:
    """A copy of ``network``, in inference mode, with every block converted to its convolution.

    Only running statistics count, not the mode of ``network``. Parameters outside the blocks keep
    their values and names; a block ``NAME`` becomes ``NAME.weight`` and ``NAME.bias``.
    """
    # A copy, because MindSpore keeps the compiled graph of a cell, with the blocks in it.
    network = copy.deepcopy(network)
    for _, parent in list(network.cells_and_names()):
        for name, block in list(parent.name_cells().items()):
            if isinstance(block, ReparamConv):
                conv = block.fused()
                _replace_child(parent, name, conv)
                if isinstance(parent, AddRelu):
                    parent.adds_inside = False
                local_name, parameter = next(block.parameters_and_names())
                prefix = parameter.name.removesuffix(f".{local_name}")
                conv.weight.name, conv.bias.name = f"{prefix}.weight", f"{prefix}.bias"
    return network.set_train(False)


def fold_batch_norm(kernel: np.ndarray, batch_norm: nn.Cell) -> tuple[np.ndarray, np.ndarray]:
    """Kernel and bias, float64, of a convolution without bias followed by batch norm in inference.

    Args:
        kernel: (O, I, h, w); ``identity_kernel`` if there is no convolution.
    """
    gamma, beta, mean, variance = (
        parameter.asnumpy().astype(np.float64)
        for parameter in (
            batch_norm.gamma,
            batch_norm.beta,
            batch_norm.moving_mean,
            batch_norm.moving_variance,
        )
    )
    scale = gamma / np.sqrt(variance + batch_norm.eps)
    return kernel * scale[:, None, None, None], beta - mean * scale


def kernel_of(conv: nn.Conv2d) -> np.ndarray:
    """The kernel (O, I / groups, h, w) of a convolution in float64."""
    return conv.weight.asnumpy().astype(np.float64)


def merge_1x1_kxk(
    first: np.ndarray,
    first_bias: np.ndarray,
    second: np.ndarray,
    second_bias: np.ndarray,
    groups: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Kernel and bias of a 1x1 convolution followed by a k x k one, both with ``groups``.

    Ding et al., arXiv:2103.13425, section 3.2, transform III. Exact if the second convolution is
    padded with the first one's response to zeros, its bias.

    Args:
        first: (M, I / groups, 1, 1); first_bias: (M,).
        second: (O, M / groups, k, k); second_bias: (O,).
    """
    first_parts, bias_parts = np.split(first[:, :, 0, 0], groups), np.split(first_bias, groups)
    second_parts = np.split(second, groups)
    kernel = np.concatenate(
        [np.tensordot(after, before, (1, 0)) for before, after in zip(first_parts, second_parts)]
    )
    bias = np.concatenate(
        [after.sum((2, 3)) @ before for before, after in zip(bias_parts, second_parts)]
    )
    return kernel.transpose(0, 3, 1, 2), second_bias + bias


def set_gamma(gamma: float | None, *batch_norms: nn.Cell) -> None:
    """Give batch norms the initial scale ``gamma``; None leaves them as they are."""
    if gamma is not None:
        for batch_norm in batch_norms:
            batch_norm.gamma.set_data(Tensor(np.full(batch_norm.gamma.shape, gamma, np.float32)))


def _check_geometry(what: str, geometry: dict[str, int]) -> None:
    for (name, value), least in zip(geometry.items(), (1, 1, 3, 1, 0, 1, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(
                f"{what}: {name} must be an integer of at least {least}, got {value!r}"
            )
    if geometry["kernel_size"] % 2 == 0:
        raise ValueError(
            f"{what}: kernel_size must be odd (its branches share a centre), got "
            f"{geometry['kernel_size']}"
        )
    groups = geometry["groups"]
    if geometry["in_channels"] % groups or geometry["out_channels"] % groups:
        raise ValueError(
            f"{what}: groups={groups} must divide in_channels={geometry['in_channels']} "
            f"and out_channels={geometry['out_channels']}"
        )


def _replace_child(parent: nn.Cell, name: str, cell: nn.Cell) -> None:
    if isinstance(parent, nn.SequentialCell):
        parent[list(parent.name_cells()).index(name)] = cell
    else:
        setattr(parent, name, cell)


class AddRelu(nn.Cell):
    """(x, shortcut) -> relu(layer(x) + shortcut).

    Attributes:
        source: the layer. If it is a ReparamConv, it takes the shortcut and adds it itself.
    """

    def __init__(self, source: nn.Cell) -> None:
        super().__init__()
        self.source, self.relu = source, nn.ReLU()
        self.adds_inside = getattr(source, "adds_shortcut", False)

    def construct(self, x: Tensor, shortcut: Tensor) -> Tensor:
        if self.adds_inside:
            return self.relu(self.source(x, shortcut))
        return self.relu(self.source(x) + shortcut)


class SplitResidual(nn.Cell):
    """x -> (x, x), the inputs of the two branches of a residual block."""

    def construct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class SplitProjected(SplitResidual):
    """``SplitResidual`` for two branches that both compute: neither is a plain shortcut.

    The sum of the gradients is written as a difference. MindSpore's GPU backend would accumulate a
    sum in place, and in networks of basic blocks it then miscounts the references to that memory
    ("Invalid new ref count", docs/gpu.md).
    """

    def bprop(
        self, x: Tensor, out: tuple[Tensor, Tensor], gradients: tuple[Tensor, Tensor]
    ) -> tuple[Tensor]:
        return (gradients[0] - (-gradients[1]),)
