"""DenseNet (Huang et al., arXiv:1608.06993): each layer sees the outputs of all before it."""

from collections import OrderedDict
from typing import Any

from mindspore import Tensor, nn

from src.models.layers import ImageClassifier, LayerFactory


class _DenseLayer(nn.Cell):
    """x -> x and, after its channels, ``growth`` new ones."""

    def __init__(
        self, in_channels: int, growth: int, bottleneck: int, layers: LayerFactory
    ) -> None:
        super().__init__()
        self.split, self.concat = layers.split_residual(), layers.concat()
        self.norm1 = layers.norm_relu(in_channels)
        width = in_channels
        self.conv1: nn.Cell = nn.Identity()
        if bottleneck:
            width = bottleneck * growth
            self.conv1 = layers.conv_norm_relu(in_channels, width, 1)
        self.conv2 = layers.conv(width, growth, 3, padding=1)

    def construct(self, x: Tensor) -> Tensor:
        x, kept = self.split(x)
        return self.concat(kept, self.conv2(self.conv1(self.norm1(x))))


def _transition(in_channels: int, out_channels: int, layers: LayerFactory) -> nn.Cell:
    return nn.SequentialCell(
        OrderedDict(
            norm=layers.norm_relu(in_channels),
            conv=layers.conv(in_channels, out_channels, 1),
            pool=layers.average_pool(2, 2),
        )
    )


class DenseNet(ImageClassifier):
    """(N, 3, H, W) float -> (N, num_classes).

    Args:
        stem: layers before the first dense layer, and their output channels.
        depths: number of layers in each dense block.
        growth: channels that each of them adds.
        bottleneck: output channels of the 1x1 convolution before each 3x3 one, in growth rates; 0
            for none.
        compression: output channels of a transition, relative to its input's.
    """

    def __init__(
        self,
        num_classes: int,
        layers: LayerFactory,
        *,
        stem: tuple[OrderedDict[str, nn.Cell], int],
        depths: tuple[int, ...],
        growth: int,
        bottleneck: int,
        compression: float,
    ) -> None:
        super().__init__(layers)
        features, channels = stem
        for stage, depth in enumerate(depths, 1):
            dense_layers = OrderedDict()
            for index in range(1, depth + 1):
                dense_layers[f"denselayer{index}"] = _DenseLayer(
                    channels, growth, bottleneck, layers
                )
                channels += growth
            features[f"denseblock{stage}"] = nn.SequentialCell(dense_layers)
            if stage < len(depths):
                narrowed = int(channels * compression)
                features[f"transition{stage}"] = _transition(channels, narrowed, layers)
                channels = narrowed
        features[f"norm{len(depths) + 1}"] = layers.norm_relu(channels)
        self.features, self.average = nn.SequentialCell(features), layers.global_average()
        self.classifier = layers.dense(channels, num_classes)

    def construct(self, x: Tensor) -> Tensor:
        return self.classify(self.average(self.features(x)))


def densenet(
    num_classes: int, layers: LayerFactory, depths: tuple[int, ...], growth: int, **unused: Any
) -> DenseNet:
    """DenseNet-BC for ImageNet (the paper's table 1), as in torchvision."""
    channels = 2 * growth
    stem = OrderedDict(
        conv0=layers.conv_norm_relu(3, channels, 7, stride=2, padding=3),
        pool0=layers.max_pool(3, 2, padding=1),
    )
    return DenseNet(
        num_classes,
        layers,
        stem=(stem, channels),
        depths=depths,
        growth=growth,
        bottleneck=4,
        compression=0.5,
    )


def densenet_cifar(
    num_classes: int, layers: LayerFactory, depths: tuple[int, ...], growth: int, **unused: Any
) -> DenseNet:
    """DenseNet for CIFAR without bottlenecks and compression (section 3, "Implementation")."""
    return DenseNet(
        num_classes,
        layers,
        stem=(OrderedDict(conv0=layers.conv(3, 16, 3, padding=1)), 16),
        depths=depths,
        growth=growth,
        bottleneck=0,
        compression=1.0,
    )
