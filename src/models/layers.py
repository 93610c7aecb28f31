"""Factories that networks take instead of layers, so that ACB and SyncBN are choices made once, outside networks."""

from dataclasses import dataclass
from functools import partial

import numpy as np
from mindspore import Tensor, nn, ops

from src.models.acb import AsymmetricConvBlock, plain_convolution

ACB_KERNELS = (3, 5)


class ConvNorm(nn.Cell):
    """Convolution without bias, then batch norm. (N, C, H, W) -> (N, C', H', W')."""

    def __init__(self, conv, norm):
        super().__init__()
        self.conv = conv
        self.norm = norm

    def construct(self, x):
        return self.norm(self.conv(x))


@dataclass(frozen=True)
class LayerFactory:
    """Makes a network's convolutions and norms: plain, as ACB, or as the fused form of an ACB.

    ACB stands for square convolutions with kernel 3 or 5 together with the batch norm behind them, as in the paper's
    code; 1x1 and large kernels stay plain.

    Attributes:
        block: "base" or "acb".
        fused: with block "acb", the plain convolutions with bias that ``fuse`` leaves.
        gamma_init: initial scale of the batch norms inside ACBs; None keeps 1.
        sync_bn: batch statistics over all ranks (where the device has it).
        weight_init: initialiser of plain convolutions; None keeps the framework's, which is PyTorch's
            Kaiming-uniform with a = sqrt(5).
    """

    block: str = "base"
    fused: bool = False
    gamma_init: float | None = None
    sync_bn: bool = False
    weight_init: object = None

    def norm(self, channels):
        """Batch norm over (N, channels, H, W), PyTorch's eps and momentum.

        MindSpore's momentum weighs the old statistics: its 0.9 is PyTorch's 0.1.
        """
        return (nn.SyncBatchNorm if self.sync_bn else nn.BatchNorm2d)(channels, eps=1e-5, momentum=0.9)

    def conv(self, in_channels, out_channels, kernel_size, stride=1, padding=0, groups=1, bias=False):
        """A convolution, or an ACB in its place."""
        if self.block == "acb" and kernel_size in ACB_KERNELS:
            return self._acb(in_channels, out_channels, kernel_size, stride, padding, groups)
        init = {} if self.weight_init is None else {"weight_init": self.weight_init}
        return nn.Conv2d(in_channels, out_channels, kernel_size, stride, pad_mode="pad", padding=padding, group=groups,
                         has_bias=bias, **init)

    def conv_norm(self, in_channels, out_channels, kernel_size, stride=1, padding=0, groups=1):
        """A convolution and its batch norm, or an ACB in place of both."""
        conv = self.conv(in_channels, out_channels, kernel_size, stride, padding, groups)
        if self.block == "acb" and kernel_size in ACB_KERNELS:
            return conv
        return ConvNorm(conv, self.norm(out_channels))

    def _acb(self, in_channels, out_channels, kernel_size, stride, padding, groups):
        make = plain_convolution if self.fused else partial(
            AsymmetricConvBlock, norm=self.norm, gamma_init=self.gamma_init)
        return make(in_channels, out_channels, kernel_size, stride=stride, padding=padding, groups=groups)


class MaxPoolAfterReLU(nn.Cell):
    """Max-pool with symmetric padding for inputs that are nowhere negative, exactly as PyTorch's.

    There, padding by zeros equals padding by minus infinity. MindSpore's own padded max-pool is a three-dimensional
    one with argmax, slower and without an ONNX counterpart.
    """

    def __init__(self, kernel_size, stride, padding):
        super().__init__()
        self.pad = ops.Pad(((0, 0), (0, 0), (padding, padding), (padding, padding)))
        self.pool = nn.MaxPool2d(kernel_size, stride, pad_mode="valid")

    def construct(self, x):
        return self.pool(self.pad(x))


class AdaptiveAveragePool(nn.Cell):
    """(N, C, size, size) -> (N, C, out_size, out_size), PyTorch's adaptive average pooling.

    Output cell i averages the inputs from floor(i * size / out_size) to ceil((i + 1) * size / out_size). As two matrix
    products, because MindSpore's own operation has no ONNX counterpart.
    """

    def __init__(self, size, out_size):
        super().__init__()
        weights = np.zeros((out_size, size), np.float32)
        for cell in range(out_size):
            part = slice(cell * size // out_size, -(-(cell + 1) * size // out_size))
            weights[cell, part] = 1 / len(weights[cell, part])
        self.rows = Tensor(weights)
        self.columns = Tensor(weights.T.copy())

    def construct(self, x):
        return ops.matmul(ops.matmul(self.rows, x), self.columns)


def global_average(x):
    """(N, C, H, W) -> (N, C)."""
    return x.mean((2, 3))
