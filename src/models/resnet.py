"""ResNet (He et al., arXiv:1512.03385) and ResNeXt (Xie et al., arXiv:1611.05431).

As in torchvision, the 3x3 convolution of a bottleneck has the stride.
"""

from typing import Any

from mindspore import Tensor, nn

from src.models.layers import ImageClassifier, LayerFactory, ResidualBlocks


class BasicBlock(nn.Cell):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        width: int,
        out_channels: int,
        stride: int,
        cardinality: int,
        layers: LayerFactory,
        downsample: nn.Cell,
        drop: float,
    ) -> None:
        super().__init__()
        self.conv1 = layers.conv_norm_relu(
            in_channels, width, 3, stride, padding=1, groups=cardinality
        )
        self.conv2 = layers.conv_norm_add_relu(width, out_channels, 3, padding=1, drop=drop)
        is_projected = not isinstance(downsample, nn.Identity)
        self.split = layers.split_projected() if is_projected else layers.split_residual()
        self.downsample = downsample

    def construct(self, x: Tensor, *factors: Tensor) -> Tensor:
        x, shortcut = self.split(x)
        return self.conv2(self.conv1(x), self.downsample(shortcut), *factors)

    @property
    def branch_end(self) -> nn.Cell:
        """The last layer of the residual branch."""
        return self.conv2


class Bottleneck(nn.Cell):
    """1x1, 3x3 (grouped in ResNeXt) and 1x1 convolutions and a shortcut."""

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        width: int,
        out_channels: int,
        stride: int,
        cardinality: int,
        layers: LayerFactory,
        downsample: nn.Cell,
        drop: float,
    ) -> None:
        super().__init__()
        self.conv1 = layers.conv_norm_relu(in_channels, width, 1)
        self.conv2 = layers.conv_norm_relu(width, width, 3, stride, padding=1, groups=cardinality)
        self.conv3 = layers.conv_norm_add_relu(width, out_channels, 1, drop=drop)
        self.split, self.downsample = layers.split_residual(), downsample

    def construct(self, x: Tensor, *factors: Tensor) -> Tensor:
        x, shortcut = self.split(x)
        return self.conv3(self.conv2(self.conv1(x)), self.downsample(shortcut), *factors)

    @property
    def branch_end(self) -> nn.Cell:
        """The last layer of the residual branch."""
        return self.conv3


class ResNet(ImageClassifier):
    """(N, 3, H, W) float -> (N, num_classes).

    Args:
        block: BasicBlock or Bottleneck.
        depths: number of blocks in each of the four stages.
        cardinality: groups of the 3x3 convolutions; 32 in ResNeXt 32x4d.
        base_width: channels per group in the first stage; 4 in ResNeXt 32x4d.
    """

    def __init__(
        self,
        num_classes: int,
        layers: LayerFactory,
        *,
        block: type[BasicBlock | Bottleneck],
        depths: tuple[int, ...],
        cardinality: int = 1,
        base_width: int = 64,
    ) -> None:
        super().__init__(layers)
        self.conv1 = layers.conv_norm_relu(3, 64, 7, stride=2, padding=3)
        self.pool = layers.max_pool(3, 2, padding=1)
        in_channels, first = 64, 0
        drops = self.drop_probabilities = layers.drop_probabilities(sum(depths))
        for stage, depth in enumerate(depths):
            channels = 64 << stage
            width = cardinality * (channels * base_width // 64)
            out_channels = channels * block.expansion
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                downsample = nn.Identity()
                if stride != 1 or in_channels != out_channels:
                    downsample = layers.conv_norm(in_channels, out_channels, 1, stride)
                blocks.append(
                    block(
                        in_channels,
                        width,
                        out_channels,
                        stride,
                        cardinality,
                        layers,
                        downsample,
                        drops[first + index],
                    )
                )
                in_channels = out_channels
            of_stage = ResidualBlocks(blocks, drops[first : first + depth], first)
            setattr(self, f"layer{stage + 1}", of_stage)
            first += depth
        self.average = layers.global_average()
        self.classifier = layers.dense(in_channels, num_classes)

    def construct(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.pool(self.conv1(x))
        x = self.layer2(self.layer1(x, mask), mask)
        x = self.layer4(self.layer3(x, mask), mask)
        return self.classify(self.average(x))


def basic(num_classes: int, layers: LayerFactory, depths: tuple[int, ...], **unused: Any) -> ResNet:
    """A ResNet of basic blocks."""
    return ResNet(num_classes, layers, block=BasicBlock, depths=depths)


def bottleneck(
    num_classes: int,
    layers: LayerFactory,
    depths: tuple[int, ...],
    cardinality: int = 1,
    base_width: int = 64,
    **unused: Any,
) -> ResNet:
    """A ResNet or ResNeXt of bottleneck blocks."""
    return ResNet(
        num_classes,
        layers,
        block=Bottleneck,
        depths=depths,
        cardinality=cardinality,
        base_width=base_width,
    )
