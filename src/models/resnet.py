"""ResNet (He et al., arXiv:1512.03385, stride on the 3x3 as in torchvision) and ResNeXt (Xie et al., arXiv:1611.05431)."""

from typing import Any

from mindspore import Tensor, nn

from src.models.layers import LayerFactory


def build(num_classes: int, layers: LayerFactory, *, bottleneck: bool, depths: tuple[int, ...], cardinality: int = 1,
          base_width: int = 64, **unused: Any) -> nn.Cell:
    """The ResNet with these blocks."""
    return ResNet(Bottleneck if bottleneck else BasicBlock, depths, num_classes, layers, cardinality, base_width)


class BasicBlock(nn.Cell):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, out_channels: int, stride: int, cardinality: int, layers: LayerFactory,
                 downsample: nn.Cell) -> None:
        super().__init__()
        self.conv1 = layers.conv_norm(in_channels, width, 3, stride, padding=1, groups=cardinality, relu=True)
        self.conv2 = layers.conv_norm(width, out_channels, 3, padding=1, shortcut=True)
        self.fork, self.downsample = layers.fork(), downsample

    def construct(self, x: Tensor) -> Tensor:
        x, shortcut = self.fork(x)
        return self.conv2(self.conv1(x), self.downsample(shortcut))

    @property
    def branch_end(self) -> nn.Cell:
        """The last layer of the residual branch."""
        return self.conv2


class Bottleneck(nn.Cell):
    """1x1, 3x3 (grouped in ResNeXt) and 1x1 convolutions and a shortcut."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, out_channels: int, stride: int, cardinality: int, layers: LayerFactory,
                 downsample: nn.Cell) -> None:
        super().__init__()
        self.conv1 = layers.conv_norm(in_channels, width, 1, relu=True)
        self.conv2 = layers.conv_norm(width, width, 3, stride, padding=1, groups=cardinality, relu=True)
        self.conv3 = layers.conv_norm(width, out_channels, 1, shortcut=True)
        self.fork, self.downsample = layers.fork(), downsample

    def construct(self, x: Tensor) -> Tensor:
        x, shortcut = self.fork(x)
        return self.conv3(self.conv2(self.conv1(x)), self.downsample(shortcut))

    @property
    def branch_end(self) -> nn.Cell:
        """The last layer of the residual branch."""
        return self.conv3


class ResNet(nn.Cell):
    """(N, 3, H, W) float -> (N, num_classes).

    Args:
        block: BasicBlock or Bottleneck.
        depths: blocks in each of the four stages.
        cardinality, base_width: groups of the 3x3 convolution and channels per group at the first stage (ResNeXt's
            32x4d: 32 and 4).
    """

    def __init__(self, block: type[BasicBlock | Bottleneck], depths: tuple[int, ...], num_classes: int, layers: LayerFactory,
                 cardinality: int = 1, base_width: int = 64) -> None:
        super().__init__()
        self.conv1 = layers.conv_norm(3, 64, 7, stride=2, padding=3, relu=True)
        self.pool = layers.max_pool(3, 2, padding=1)
        in_channels = 64
        for stage, depth in enumerate(depths):
            channels = 64 << stage
            width = cardinality * (channels * base_width // 64)
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                out_channels = channels * block.expansion
                downsample = nn.Identity() if stride == 1 and in_channels == out_channels else layers.conv_norm(
                    in_channels, out_channels, 1, stride)
                blocks.append(block(in_channels, width, out_channels, stride, cardinality, layers, downsample))
                in_channels = out_channels
            setattr(self, f"layer{stage + 1}", nn.SequentialCell(blocks))
        self.average = layers.global_average()
        self.classifier = layers.dense(in_channels, num_classes)

    def construct(self, x: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.pool(self.conv1(x))))))
        return self.classifier(self.average(x))
