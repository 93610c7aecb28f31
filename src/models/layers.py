"""Layers that networks share, and the factory that makes them, so that blocks and SyncBN are choices made outside networks."""

import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mindspore
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.common.initializer import HeNormal

from src.models.blocks import find_block
from src.models.fusion import plain_convolution

# Initial weights of plain convolutions. The framework's own are PyTorch's: Kaiming uniform with a = sqrt(5), which is uniform within
# 1 / sqrt(fan-in). He et al., arXiv:1502.01852, by fan-out is what torchvision and timm give a ResNet.
WEIGHT_INITS = {"kaiming_uniform": None, "kaiming_normal": HeNormal(mode="fan_out", nonlinearity="relu")}


class ConvNorm(nn.Cell):
    """Convolution without bias, then batch norm. (N, C, H, W) -> (N, C', H', W')."""

    def __init__(self, conv: nn.Cell, norm: nn.Cell) -> None:
        super().__init__()
        self.conv = conv
        self.norm = norm

    def construct(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


@dataclass(frozen=True)
class LayerFactory:
    """Makes a network's convolutions and norms: plain, as blocks with several branches, or as the fused form of those.

    Attributes:
        block: a name in ``blocks.BLOCKS``; such a block replaces a square convolution of its sizes together with the batch
            norm behind it.
        fused: the plain convolutions with bias that ``fuse`` leaves in place of the blocks.
        gamma_init: initial scale of the batch norms inside blocks; None keeps 1.
        sync_bn: batch statistics over all ranks (on devices that have it).
        weight_init: initialiser of plain convolutions; None keeps the framework's.
    """

    block: str = "base"
    fused: bool = False
    gamma_init: float | None = None
    sync_bn: bool = False
    weight_init: Any = None

    def norm(self, channels: int) -> nn.Cell:
        """Batch norm over (N, channels, H, W) with PyTorch's eps and momentum.

        MindSpore's momentum weighs the old statistics: its 0.9 is PyTorch's 0.1.
        """
        return (nn.SyncBatchNorm if self.sync_bn else nn.BatchNorm2d)(channels, eps=1e-5, momentum=0.9)

    def conv(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0, groups: int = 1,
             bias: bool = False) -> nn.Cell:
        """A convolution, or a block in its place."""
        if self._replaces(kernel_size):
            return self._block(in_channels, out_channels, kernel_size, stride=stride, padding=padding, groups=groups)
        init = {} if self.weight_init is None else {"weight_init": self.weight_init}
        return nn.Conv2d(in_channels, out_channels, kernel_size, stride, pad_mode="pad", padding=padding, group=groups,
                         has_bias=bias, **init)

    def conv_norm(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0,
                  groups: int = 1) -> nn.Cell:
        """A convolution and its batch norm, or a block in place of both."""
        conv = self.conv(in_channels, out_channels, kernel_size, stride, padding, groups)
        return conv if self._replaces(kernel_size) else ConvNorm(conv, self.norm(out_channels))

    def _replaces(self, kernel_size: int) -> bool:
        return kernel_size in find_block(self.block).kernels

    def _block(self, *channels_and_kernel: int, **geometry: int) -> nn.Cell:
        if self.fused:
            return plain_convolution(*channels_and_kernel, **geometry)
        build = pkgutil.resolve_name(find_block(self.block).builder)
        return build(*channels_and_kernel, **geometry, norm=self.norm, gamma_init=self.gamma_init)


class InputNormalizer(nn.Cell):
    """(N, H, W, 3) uint8 RGB -> (N, 3, H, W) float32, (x / 255 - mean) / std.

    Part of the network's graph, because it costs less there than image by image in the input pipeline.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        deviation = np.asarray(std, np.float32)
        self.scale = Tensor((1 / (255 * deviation)).reshape(1, 3, 1, 1).astype(np.float32))
        self.offset = Tensor((-np.asarray(mean, np.float32) / deviation).reshape(1, 3, 1, 1))

    def construct(self, images: Tensor) -> Tensor:
        images = ops.transpose(ops.cast(images, mindspore.float32), (0, 3, 1, 2))
        return images * self.scale + self.offset


class MaxPoolAfterReLU(nn.Cell):
    """Max-pool with symmetric padding for inputs that are nowhere negative; computes exactly what PyTorch's does.

    For such inputs, padding by zeros equals padding by minus infinity. MindSpore's own padded max-pool is a three-dimensional
    one with argmax, slower and without an ONNX counterpart.
    """

    def __init__(self, kernel_size: int, stride: int, padding: int) -> None:
        super().__init__()
        self.pad = ops.Pad(((0, 0), (0, 0), (padding, padding), (padding, padding)))
        self.pool = nn.MaxPool2d(kernel_size, stride, pad_mode="valid")

    def construct(self, x: Tensor) -> Tensor:
        return self.pool(self.pad(x))


class AdaptiveAveragePool(nn.Cell):
    """(N, C, size, size) -> (N, C, out_size, out_size), PyTorch's adaptive average pooling.

    Output cell i averages the inputs from floor(i * size / out_size) to ceil((i + 1) * size / out_size). As two matrix
    products, because MindSpore's own operation has no ONNX counterpart.
    """

    def __init__(self, size: int, out_size: int) -> None:
        super().__init__()
        weights = np.zeros((out_size, size), np.float32)
        for cell in range(out_size):
            part = slice(cell * size // out_size, -(-(cell + 1) * size // out_size))
            weights[cell, part] = 1 / len(weights[cell, part])
        self.rows = Tensor(weights)
        self.columns = Tensor(weights.T.copy())

    def construct(self, x: Tensor) -> Tensor:
        return ops.matmul(ops.matmul(self.rows, x), self.columns)


def global_average(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C)."""
    return x.mean((2, 3))
