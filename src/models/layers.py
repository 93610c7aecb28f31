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


class Activated(nn.Cell):
    """A layer, then ReLU."""

    def __init__(self, layer: nn.Cell) -> None:
        super().__init__()
        self.wrapped, self.relu = layer, nn.ReLU()

    def construct(self, x: Tensor) -> Tensor:
        return self.relu(self.wrapped(x))


class ActivatedWithShortcut(nn.Cell):
    """(x, shortcut) -> ReLU of the layer's output plus the shortcut."""

    def __init__(self, layer: nn.Cell) -> None:
        super().__init__()
        self.wrapped, self.relu = layer, nn.ReLU()

    def construct(self, x: Tensor, shortcut: Tensor) -> Tensor:
        return self.relu(self.wrapped(x) + shortcut)


def name_parameters(network: nn.Cell) -> None:
    """Name each parameter by the path to it, but for cells that are the ``wrapped`` of another, whose parameters are the other's own."""
    for path, parameter in network.parameters_and_names():
        parameter.name = ".".join(part for part in path.split(".") if part != "wrapped")


class Fork(nn.Cell):
    """x -> (x, x), for the two branches of a residual block."""

    def construct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Sum(nn.Cell):
    """(a, b) -> a + b."""

    def construct(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


@dataclass(frozen=True)
class LayerFactory:
    """Makes a network's layers: convolutions plain, as blocks with several branches, or as the fused form of those.

    What flows between its layers may have a layout and a type of its own (``kernel_layers.KernelLayers``), so that a network takes all
    its layers from here.

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

    @property
    def has_own_layout(self) -> bool:
        """Whether activations are something else than (N, C, H, W) of MindSpore's operations."""
        return False

    def announcements(self) -> Any:
        """Of the kernels that compute with these layers: src.kernels.announcements.Announcements, or None."""
        return None

    def norm(self, channels: int, relu: bool = False) -> nn.Cell:
        """Batch norm over (N, channels, H, W), then ReLU if ``relu``."""
        return self._finish(self._batch_norm(channels), relu, shortcut=False)

    def conv(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0, groups: int = 1,
             bias: bool = False, relu: bool = False) -> nn.Cell:
        """A convolution, or a block in its place, then ReLU if ``relu``."""
        return self._finish(self._conv(in_channels, out_channels, kernel_size, stride, padding, groups, bias), relu, shortcut=False)

    def conv_norm(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0,
                  groups: int = 1, relu: bool = False, shortcut: bool = False) -> nn.Cell:
        """A convolution and its batch norm, or a block in place of both.

        Args:
            relu: ReLU behind it.
            shortcut: the layer is called as (x, shortcut), and that is added before ReLU, which it implies.
        """
        conv = self._conv(in_channels, out_channels, kernel_size, stride, padding, groups)
        layer = conv if self._replaces(kernel_size) else ConvNorm(conv, self._batch_norm(out_channels))
        return self._finish(layer, relu or shortcut, shortcut)

    def max_pool(self, kernel_size: int, stride: int, padding: int = 0) -> nn.Cell:
        """Maximum of each window; with padding only behind ReLU."""
        return MaxPoolAfterReLU(kernel_size, stride, padding) if padding else nn.MaxPool2d(kernel_size, stride, pad_mode="valid")

    def average_pool(self, kernel_size: int, stride: int) -> nn.Cell:
        """Mean of each window that lies within the input."""
        return nn.AvgPool2d(kernel_size, stride, pad_mode="valid")

    def global_average(self) -> nn.Cell:
        """An activation of any layout -> (N, C)."""
        return GlobalAverage()

    def dense(self, in_channels: int, out_channels: int) -> nn.Cell:
        """A dense layer with bias, (N, in_channels) -> (N, out_channels)."""
        return nn.Dense(in_channels, out_channels)

    def fork(self) -> nn.Cell:
        """An activation -> (it, it): what a residual block begins with."""
        return Fork()

    def sum(self) -> nn.Cell:
        """(activation, activation) -> their sum."""
        return Sum()

    def plain(self) -> nn.Cell:
        """An activation of any layout -> (N, C, H, W), as dense layers and operations of MindSpore take it."""
        return nn.Identity()

    def input_normalizer(self, mean: Sequence[float], std: Sequence[float]) -> nn.Cell:
        """(N, H, W, 3) uint8 RGB -> what the first layer takes, (x / 255 - mean) / std."""
        return InputNormalizer(mean, std)

    def _finish(self, layer: nn.Cell, relu: bool, shortcut: bool) -> nn.Cell:
        if shortcut:
            return ActivatedWithShortcut(layer)
        return Activated(layer) if relu else layer

    def _batch_norm(self, channels: int) -> nn.Cell:
        """With PyTorch's eps and momentum. MindSpore's momentum weighs the old statistics: its 0.9 is PyTorch's 0.1."""
        return (nn.SyncBatchNorm if self.sync_bn else nn.BatchNorm2d)(channels, eps=1e-5, momentum=0.9)

    def _conv(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0, groups: int = 1,
              bias: bool = False) -> nn.Cell:
        if self._replaces(kernel_size):
            return self._block(in_channels, out_channels, kernel_size, stride=stride, padding=padding, groups=groups)
        init = {} if self.weight_init is None else {"weight_init": self.weight_init}
        return nn.Conv2d(in_channels, out_channels, kernel_size, stride, pad_mode="pad", padding=padding, group=groups,
                         has_bias=bias, **init)

    def _replaces(self, kernel_size: int) -> bool:
        return kernel_size in find_block(self.block).kernels

    def _block(self, *channels_and_kernel: int, **geometry: int) -> nn.Cell:
        if self.fused:
            return plain_convolution(*channels_and_kernel, **geometry)
        build = pkgutil.resolve_name(find_block(self.block).builder)
        return build(*channels_and_kernel, **geometry, norm=self._batch_norm, gamma_init=self.gamma_init)


def scale_and_offset(mean: Sequence[float], std: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """(3,) and (3,) float32 by which an 8-bit RGB value is multiplied, and what is added, for (x / 255 - mean) / std."""
    deviation = np.asarray(std, np.float32)
    return (1 / (255 * deviation)).astype(np.float32), -np.asarray(mean, np.float32) / deviation


class InputNormalizer(nn.Cell):
    """(N, H, W, 3) uint8 RGB -> (N, 3, H, W) float32, (x / 255 - mean) / std.

    Part of the network's graph, because it costs less there than image by image in the input pipeline.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        scale, offset = scale_and_offset(mean, std)
        self.scale, self.offset = Tensor(scale.reshape(1, 3, 1, 1)), Tensor(offset.reshape(1, 3, 1, 1))

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


class GlobalAverage(nn.Cell):
    """(N, C, H, W) -> (N, C)."""

    def construct(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))
