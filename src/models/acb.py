"""Asymmetric convolution block (ACB) and its conversion into one plain convolution.

Source: Ding et al., "ACNet: Strengthening the Kernel Skeletons for Powerful CNN via Asymmetric Convolution Blocks",
ICCV 2019, sections 3.2 (the block) and 3.3 (fusion of batch norm and of the branches).
"""

import copy

import numpy as np
from mindspore import Tensor, nn


class AsymmetricConvBlock(nn.Cell):
    """Sum of a k x k, a 1 x k and a k x 1 convolution, each followed by its own batch norm.

    Input (N, in_channels, H, W) and output (N, out_channels, H', W') are float tensors; H' and W' are those of the
    k x k convolution. A padding smaller than the reach of the kernel, ``dilation * (k // 2)``, is met by cropping the
    input of the asymmetric branches, so that all three windows stay centred on the same pixel.

    Args:
        kernel_size: odd, 3 or more.
        norm: makes the batch norm of a branch from its number of channels.
        gamma_init: initial scale of all three batch norms (the paper's code: 1/3 on CIFAR, 1 on ImageNet).

    Raises:
        ValueError: for an even kernel, or sizes, groups or dilation with which no such convolution exists.
    """

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1,
                 norm=nn.BatchNorm2d, gamma_init=None):
        super().__init__()
        _check_geometry(in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        self.geometry = {"in_channels": in_channels, "out_channels": out_channels, "kernel_size": kernel_size,
                         "stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        reach = dilation * (kernel_size // 2)
        self.crop = max(reach - padding, 0)
        across = max(padding - reach, 0)

        def conv(kernel, vertical_padding, horizontal_padding):
            return nn.Conv2d(in_channels, out_channels, kernel, stride, pad_mode="pad",
                             padding=(vertical_padding,) * 2 + (horizontal_padding,) * 2,
                             dilation=dilation, group=groups, has_bias=False)

        self.square_conv = conv((kernel_size, kernel_size), padding, padding)
        self.hor_conv = conv((1, kernel_size), across, padding)
        self.ver_conv = conv((kernel_size, 1), padding, across)
        self.square_bn, self.hor_bn, self.ver_bn = norm(out_channels), norm(out_channels), norm(out_channels)
        if gamma_init is not None:
            for batch_norm in (self.square_bn, self.hor_bn, self.ver_bn):
                batch_norm.gamma.set_data(Tensor(np.full(out_channels, gamma_init, np.float32)))

    def construct(self, x):
        hor_input, ver_input = x, x
        if self.crop > 0:
            hor_input = x[:, :, self.crop:-self.crop, :]
            ver_input = x[:, :, :, self.crop:-self.crop]
        return (self.square_bn(self.square_conv(x)) + self.hor_bn(self.hor_conv(hor_input))
                + self.ver_bn(self.ver_conv(ver_input)))

    def equivalent_kernel_bias(self):
        """Kernel (out, in / groups, k, k) and bias (out,) in float64 of the convolution that computes the same in inference."""
        square, square_bias = _fold_batch_norm(self.square_conv, self.square_bn)
        hor, hor_bias = _fold_batch_norm(self.hor_conv, self.hor_bn)
        ver, ver_bias = _fold_batch_norm(self.ver_conv, self.ver_bn)
        centre = square.shape[2] // 2
        square[:, :, centre:centre + 1, :] += hor
        square[:, :, :, centre:centre + 1] += ver
        return square, square_bias + hor_bias + ver_bias

    def fused(self):
        """The plain convolution with bias that computes what this block computes in inference."""
        conv = plain_convolution(**self.geometry)
        kernel, bias = self.equivalent_kernel_bias()
        conv.weight.set_data(Tensor(kernel.astype(np.float32)))
        conv.bias.set_data(Tensor(bias.astype(np.float32)))
        return conv


def plain_convolution(in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1):
    """A k x k convolution with bias: what a block is after fusion."""
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, pad_mode="pad", padding=padding,
                     dilation=dilation, group=groups, has_bias=True)


def fuse(network):
    """A copy of ``network``, in inference mode, with every ACB converted into its plain convolution.

    Running statistics are what counts, so the mode that the network is in does not matter. Everything but the blocks
    keeps its parameters' values and names; a block ``NAME`` leaves ``NAME.weight`` and ``NAME.bias``.
    """
    # A copy also because MindSpore keeps the graph that it compiled for a cell: the blocks would live on in it.
    network = copy.deepcopy(network)
    for parent_name, parent in list(network.cells_and_names()):
        for name, block in list(parent.name_cells().items()):
            if isinstance(block, AsymmetricConvBlock):
                conv = block.fused()
                _replace_child(parent, name, conv)
                prefix = f"{parent_name}.{name}" if parent_name else name
                conv.weight.name, conv.bias.name = f"{prefix}.weight", f"{prefix}.bias"
    return network.set_train(False)


def _check_geometry(in_channels, out_channels, kernel_size, stride, padding, dilation, groups):
    for name, value, least in (("in_channels", in_channels, 1), ("out_channels", out_channels, 1),
                               ("kernel_size", kernel_size, 3), ("stride", stride, 1), ("padding", padding, 0),
                               ("dilation", dilation, 1), ("groups", groups, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"AsymmetricConvBlock: {name} must be an integer of at least {least}, got {value!r}")
    if kernel_size % 2 == 0:
        raise ValueError(f"AsymmetricConvBlock: kernel_size must be odd (a skeleton needs a centre), got {kernel_size}")
    if in_channels % groups or out_channels % groups:
        raise ValueError(f"AsymmetricConvBlock: groups={groups} must divide in_channels={in_channels} "
                         f"and out_channels={out_channels}")


def _fold_batch_norm(conv, batch_norm):
    """Kernel and bias (float64) of a bias-free convolution followed by batch norm in inference."""
    gamma, beta, mean, variance = (parameter.asnumpy().astype(np.float64) for parameter in (
        batch_norm.gamma, batch_norm.beta, batch_norm.moving_mean, batch_norm.moving_variance))
    scale = gamma / np.sqrt(variance + batch_norm.eps)
    return conv.weight.asnumpy().astype(np.float64) * scale[:, None, None, None], beta - mean * scale


def _replace_child(parent, name, cell):
    if isinstance(parent, nn.SequentialCell):
        parent[list(parent.name_cells()).index(name)] = cell
    else:
        setattr(parent, name, cell)
