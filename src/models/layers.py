"""Layers that networks share, and the factory that makes them.

Networks take every layer from the factory, which decides about blocks, SyncBN and kernels.
"""

import pkgutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mindspore
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.common.initializer import HeNormal

from src.kernels.attributes import Epilogue
from src.kernels.library import ReadyGradients
from src.models.blocks import find_block
from src.models.reparam import AddRelu, SplitProjected, SplitResidual, plain_conv

# Initial weights of plain convolutions. None keeps the framework's, which are PyTorch's: Kaiming
# uniform with a = sqrt(5), that is uniform within 1 / sqrt(fan-in). "kaiming_normal" is He et al.,
# arXiv:1502.01852, by fan-out, as torchvision and timm initialise a ResNet.
WEIGHT_INITS = {
    "kaiming_uniform": None,
    "kaiming_normal": HeNormal(mode="fan_out", nonlinearity="relu"),
}


@dataclass(frozen=True)
class LayerFactory:
    """Makes a network's layers: plain convolutions, blocks with several branches, or fused blocks.

    Between its layers, activations may have a layout and a type of their own (``KernelLayers``).

    Attributes:
        block: a name in ``blocks.BLOCKS``. The block replaces each square convolution of its sizes,
            together with the batch norm after it.
        fused: make the plain convolutions with bias that ``fuse`` leaves instead of blocks.
        gamma_init: initial scale of the batch norms inside blocks; None keeps 1.
        sync_bn: batch statistics over all ranks, on devices that support it.
        weight_init: initialiser of plain convolutions; None keeps the framework's.
        stochastic_depth: probability with which the last residual branch of a network is dropped
            from a sample in training.
    """

    block: str = "base"
    fused: bool = False
    gamma_init: float | None = None
    sync_bn: bool = False
    weight_init: Any = None
    stochastic_depth: float = 0.0

    @property
    def uses_blocked_layout(self) -> bool:
        """Whether activations differ from MindSpore's (N, C, H, W) float32."""
        return False

    def ready_gradients(self) -> ReadyGradients | None:
        """Notifications from the kernels behind these layers, or None if they give none."""
        return None

    def conv(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        bias: bool = False,
    ) -> nn.Cell:
        """A convolution, or a block in its place."""
        conv = self._conv(in_channels, out_channels, kernel_size, stride, padding, groups, bias)
        return self._finish(conv, Epilogue.NONE)

    def conv_relu(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        bias: bool = False,
    ) -> nn.Cell:
        """``conv``, then ReLU."""
        conv = self._conv(in_channels, out_channels, kernel_size, stride, padding, groups, bias)
        return self._finish(conv, Epilogue.RELU)

    def norm(self, channels: int) -> nn.Cell:
        """Batch norm over (N, channels, H, W)."""
        return self._finish(self._batch_norm(channels), Epilogue.NONE)

    def norm_relu(self, channels: int) -> nn.Cell:
        """Batch norm, then ReLU."""
        return self._finish(self._batch_norm(channels), Epilogue.RELU)

    def conv_norm(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
    ) -> nn.Cell:
        """A convolution and its batch norm, or a block instead of both."""
        layer = self._conv_norm(in_channels, out_channels, kernel_size, stride, padding, groups)
        return self._finish(layer, Epilogue.NONE)

    def conv_norm_relu(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
    ) -> nn.Cell:
        """``conv_norm``, then ReLU."""
        layer = self._conv_norm(in_channels, out_channels, kernel_size, stride, padding, groups)
        return self._finish(layer, Epilogue.RELU)

    def conv_norm_relu6(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
    ) -> nn.Cell:
        """``conv_norm``, then min(ReLU, 6)."""
        layer = self._conv_norm(in_channels, out_channels, kernel_size, stride, padding, groups)
        return self._finish(layer, Epilogue.RELU6)

    def conv_norm_add_relu(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        drop: float = 0.0,
    ) -> nn.Cell:
        """Called as (x, shortcut): ``conv_norm`` of x, plus the shortcut, then ReLU.

        Args:
            drop: the probability with which training drops the branch from a sample. If it is not
                0, a third input may give a factor for the branch in each sample, (N,) float32.
        """
        layer = self._conv_norm(in_channels, out_channels, kernel_size, stride, padding, groups)
        if drop:
            branch = self._finish(layer, Epilogue.NONE)
            return StochasticBranch(branch, self.stochastic_add(out_channels, Epilogue.RELU))
        return self._finish(layer, Epilogue.ADD_RELU)

    def max_pool(self, kernel_size: int, stride: int, padding: int = 0) -> nn.Cell:
        """Maximum over each window. With padding, the input must come from a ReLU."""
        if padding:
            return MaxPoolAfterReLU(kernel_size, stride, padding)
        return nn.MaxPool2d(kernel_size, stride, pad_mode="valid")

    def average_pool(self, kernel_size: int, stride: int) -> nn.Cell:
        """Mean over each window that lies inside the input."""
        return nn.AvgPool2d(kernel_size, stride, pad_mode="valid")

    def global_average(self) -> nn.Cell:
        """An activation of any layout -> (N, C)."""
        return GlobalAverage()

    def dense(self, in_channels: int, out_channels: int) -> nn.Cell:
        """A dense layer with bias, (N, in_channels) -> (N, out_channels)."""
        return nn.Dense(in_channels, out_channels)

    def split_residual(self) -> nn.Cell:
        """x -> (x, x), the inputs of the two branches of a residual block."""
        return SplitResidual()

    def split_projected(self) -> nn.Cell:
        """``split_residual`` for a block whose shortcut is a convolution."""
        return SplitProjected()

    def add(self) -> nn.Cell:
        """(activation, activation) -> their sum."""
        return Add()

    def stochastic_add(self, channels: int, epilogue: Epilogue = Epilogue.NONE) -> nn.Cell:
        """(branch, shortcut, factors (N,) float32) -> branch * factor + shortcut.

        Args:
            epilogue: RELU for a ReLU of the sum.
        """
        return StochasticAdd(epilogue)

    def drop_probabilities(self, blocks: int) -> tuple[float, ...]:
        """One per residual block of a network, rising linearly from 0 to ``stochastic_depth``.

        Huang et al., arXiv:1603.09382, section 3, where the first block has a little more than 0;
        here as in timm.
        """
        return tuple(np.linspace(0, self.stochastic_depth, blocks).tolist())

    def concat(self) -> nn.Cell:
        """(activation, activation) -> both, one after the other along the channels."""
        return Concat()

    def to_nchw(self) -> nn.Cell:
        """An activation of any layout -> (N, C, H, W), for layers of MindSpore."""
        return nn.Identity()

    def input_normalizer(self, mean: Sequence[float], std: Sequence[float]) -> nn.Cell:
        """(N, H, W, 3) uint8 RGB -> the first layer's input, (x / 255 - mean) / std."""
        return InputNormalizer(mean, std)

    def _finish(self, layer: nn.Cell, epilogue: Epilogue) -> nn.Cell:
        """``layer``, then ``epilogue``: a layer with a shortcut takes (x, shortcut)."""
        if epilogue.has_shortcut:
            return AddRelu(layer)
        if epilogue is Epilogue.RELU6:
            return ReluAfter(layer, nn.ReLU6())
        return ReluAfter(layer, nn.ReLU()) if epilogue is Epilogue.RELU else layer

    def _batch_norm(self, channels: int) -> nn.Cell:
        """With PyTorch's eps and momentum: MindSpore's argument 0.9 is PyTorch's 0.1."""
        kind = nn.SyncBatchNorm if self.sync_bn else nn.BatchNorm2d
        return kind(channels, eps=1e-5, momentum=0.9)

    def _conv_norm(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        padding: int,
        groups: int,
    ) -> nn.Cell:
        conv = self._conv(in_channels, out_channels, kernel_size, stride, padding, groups)
        if self._replaces(kernel_size):
            return conv
        return ConvNorm(conv, self._batch_norm(out_channels))

    def _conv(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        padding: int,
        groups: int,
        bias: bool = False,
    ) -> nn.Cell:
        if self._replaces(kernel_size):
            return self._block(
                in_channels,
                out_channels,
                kernel_size,
                stride=stride,
                padding=padding,
                groups=groups,
            )
        init = {} if self.weight_init is None else {"weight_init": self.weight_init}
        return nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            pad_mode="pad",
            padding=padding,
            group=groups,
            has_bias=bias,
            **init,
        )

    def _replaces(self, kernel_size: int) -> bool:
        return kernel_size in find_block(self.block).kernels

    def _block(self, *channels_and_kernel: int, **geometry: int) -> nn.Cell:
        if self.fused:
            return plain_conv(*channels_and_kernel, **geometry)
        block_class = pkgutil.resolve_name(find_block(self.block).builder)
        return block_class(
            *channels_and_kernel, **geometry, norm=self._batch_norm, gamma_init=self.gamma_init
        )


class ImageClassifier(nn.Cell):
    """Base class of the networks: (N, 3, S, S) float -> (N, num_classes) logits.

    The last layer is the attribute ``classifier``, and all below it are the backbone. A network
    calls it through ``classify``.

    Attributes:
        layers: the factory that made the network's layers.
        backbone_frozen: whether a graph that is compiled now computes no gradients of the backbone.
        network_name: the network's name in ``networks.NETWORKS``; ``create_model`` sets it.
        drop_probabilities: one per unit or residual branch that training drops at random for each
            sample. Unless all are 0, calls may pass a mask, (N, number of probabilities) uint8, 1
            for what is kept.
    """

    drop_probabilities: tuple[float, ...] = ()

    def __init__(self, layers: LayerFactory) -> None:
        super().__init__()
        self.layers = layers
        self.backbone_frozen = False
        self.network_name = ""

    def classify(self, features: Tensor) -> Tensor:
        """The backbone's output -> logits (N, num_classes)."""
        if self.backbone_frozen:
            features = ops.stop_gradient(features)
        return self.classifier(features)

    @contextmanager
    def with_frozen_backbone(self) -> Iterator[None]:
        """Within this context, graphs that are compiled train the classifier only.

        The backbone is in inference mode: batch norm uses its running statistics, and leaves them
        as they are.
        """
        self.backbone_frozen = True
        self.set_train(False)
        try:
            yield
        finally:
            self.backbone_frozen = False
            self.set_train(True)


class ConvNorm(nn.Cell):
    """Convolution without bias, then batch norm. (N, C, H, W) -> (N, C', H', W')."""

    def __init__(self, conv: nn.Cell, norm: nn.Cell) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm

    def construct(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class ReluAfter(nn.Cell):
    """A layer, then a ReLU."""

    def __init__(self, source: nn.Cell, relu: nn.Cell) -> None:
        super().__init__()
        self.source, self.relu = source, relu

    def construct(self, x: Tensor) -> Tensor:
        return self.relu(self.source(x))


def use_float16(network: nn.Cell) -> None:
    """Compute convolutions and dense layers of ``network`` in float16, as PyTorch's autocast does.

    Weights and running statistics stay float32, and batch norm computes in float32 from float16.
    """
    for _, cell in network.cells_and_names():
        if isinstance(cell, (nn.Conv2d, nn.Dense)):
            cell.to_float(mindspore.float16)


def set_parameter_names(network: nn.Cell) -> None:
    """Name each parameter by its path in the network.

    A cell that is the ``source`` of another is left out of the path: its parameters count as the
    other's own, so that ReLU or a kernel around a layer does not change their names.
    """
    for path, parameter in network.parameters_and_names():
        parameter.name = ".".join(part for part in path.split(".") if part != "source")


class Add(nn.Cell):
    """(a, b) -> a + b."""

    def construct(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class StochasticAdd(nn.Cell):
    """(branch, shortcut, factors (N,) float32) -> [relu](branch * factor + shortcut).

    Without factors they are 1.
    """

    def __init__(self, epilogue: Epilogue) -> None:
        super().__init__()
        self.relu = nn.ReLU() if epilogue is Epilogue.RELU else nn.Identity()

    def construct(self, branch: Tensor, shortcut: Tensor, factors: Tensor | None = None) -> Tensor:
        if factors is not None:
            branch = branch * ops.cast(ops.reshape(factors, (-1, 1, 1, 1)), branch.dtype)
        # A difference, because MindSpore's GPU backend would fuse the sum with the batch norm of a
        # projected shortcut, and ends with "Graph cycle exists".
        return self.relu(branch - (-shortcut))


class StochasticBranch(nn.Cell):
    """(x, shortcut, factors (N,) or nothing) -> scaled branch + shortcut, for stochastic depth."""

    def __init__(self, source: nn.Cell, add: nn.Cell) -> None:
        super().__init__()
        self.source, self.add = source, add

    def construct(self, x: Tensor, shortcut: Tensor, *factors: Tensor) -> Tensor:
        return self.add(self.source(x), shortcut, *factors)


class ResidualBlocks(nn.SequentialCell):
    """Residual blocks, one after the other.

    Args:
        drops: the probability with which training drops the branch of each block from a sample.
            What is not dropped is scaled up, so that its mean stays the same.
        first: column of the mask for the first of the blocks.
    """

    def __init__(self, blocks: Sequence[nn.Cell], drops: Sequence[float], first: int = 0) -> None:
        super().__init__(list(blocks))
        self.drops, self.first = tuple(drops), first

    def construct(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for index, block in enumerate(self.cell_list):
            if mask is None or self.drops[index] == 0:
                x = block(x)
            else:
                kept = ops.cast(mask[:, self.first + index], mindspore.float32)
                x = block(x, kept * (1 / (1 - self.drops[index])))
        return x


class Concat(nn.Cell):
    """(N, A, H, W), (N, B, H, W) -> (N, A + B, H, W)."""

    def construct(self, a: Tensor, b: Tensor) -> Tensor:
        return ops.concat((a, b), axis=1)


def scale_and_offset(mean: Sequence[float], std: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Scale and offset, (3,) float32 each: x * scale + offset = (x / 255 - mean) / std."""
    deviation = np.asarray(std, np.float32)
    scale = (1 / (255 * deviation)).astype(np.float32)
    return scale, -np.asarray(mean, np.float32) / deviation


class InputNormalizer(nn.Cell):
    """(N, H, W, 3) uint8 RGB -> (N, 3, H, W) float32, (x / 255 - mean) / std.

    Part of the network's graph, where it costs less than per image in the input pipeline.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        scale, offset = scale_and_offset(mean, std)
        self.scale = Tensor(scale.reshape(1, 3, 1, 1))
        self.offset = Tensor(offset.reshape(1, 3, 1, 1))

    def construct(self, images: Tensor) -> Tensor:
        images = ops.transpose(ops.cast(images, mindspore.float32), (0, 3, 1, 2))
        return images * self.scale + self.offset


class MaxPoolAfterReLU(nn.Cell):
    """Max-pool with symmetric padding for inputs that are never negative; the same as PyTorch's.

    For such inputs padding with zeros equals padding with minus infinity. MindSpore's own padded
    max-pool is a three-dimensional one with argmax, slower and without an ONNX counterpart.
    """

    def __init__(self, kernel_size: int, stride: int, padding: int) -> None:
        super().__init__()
        self.pad = ops.Pad(((0, 0), (0, 0), (padding, padding), (padding, padding)))
        self.pool = nn.MaxPool2d(kernel_size, stride, pad_mode="valid")

    def construct(self, x: Tensor) -> Tensor:
        return self.pool(self.pad(x))


class AdaptiveAveragePool(nn.Cell):
    """(N, C, size, size) -> (N, C, out_size, out_size), PyTorch's adaptive average pooling.

    Output cell i averages the inputs from floor(i * size / out_size) to
    ceil((i + 1) * size / out_size). Written as two matrix products, because MindSpore's own
    operation has no ONNX counterpart.
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
        rows, columns = ops.cast(self.rows, x.dtype), ops.cast(self.columns, x.dtype)
        return ops.matmul(ops.matmul(rows, x), columns)


class GlobalAverage(nn.Cell):
    """(N, C, H, W) -> (N, C)."""

    def construct(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))
