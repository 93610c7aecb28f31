"""MobileNetV2 (Sandler et al., arXiv:1801.04381), as in torchvision."""

from collections import OrderedDict

from mindspore import Tensor, nn, ops

from src.models.layers import ImageClassifier, LayerFactory

# Table 2 of the paper: expansion, output channels, number of blocks, stride of the first.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_LAST_CHANNELS = 1280


class InvertedResidual(nn.Cell):
    """1x1 expansion, depthwise 3x3 and linear 1x1 convolution, with a shortcut if shapes allow."""

    def __init__(
        self, in_channels: int, expansion: int, out_channels: int, stride: int, layers: LayerFactory
    ) -> None:
        super().__init__()
        width = in_channels * expansion
        convs: OrderedDict[str, nn.Cell] = OrderedDict()
        if expansion > 1:
            convs["expand"] = layers.conv_norm_relu6(in_channels, width, 1)
        convs["depthwise"] = layers.conv_norm_relu6(
            width, width, 3, stride, padding=1, groups=width
        )
        convs["project"] = layers.conv_norm(width, out_channels, 1)
        self.branch = nn.SequentialCell(convs)
        self.has_shortcut = stride == 1 and in_channels == out_channels
        self.split, self.add = layers.split_residual(), layers.add()

    def construct(self, x: Tensor) -> Tensor:
        if not self.has_shortcut:
            return self.branch(x)
        x, shortcut = self.split(x)
        return self.add(self.branch(x), shortcut)


class MobileNetV2(ImageClassifier):
    """(N, 3, H, W) float -> (N, num_classes).

    Args:
        dropout: probability of dropping a unit before the classifier, in training only. Without a
            dropout mask the framework's generator draws the units.
    """

    def __init__(
        self, num_classes: int, layers: LayerFactory, dropout: float = 0.2, image_size: int = 224
    ) -> None:
        super().__init__(layers)
        features = [layers.conv_norm_relu6(3, 32, 3, stride=2, padding=1)]
        in_channels = 32
        for expansion, channels, blocks, stride in _STAGES:
            for index in range(blocks):
                features.append(
                    InvertedResidual(
                        in_channels, expansion, channels, 1 if index else stride, layers
                    )
                )
                in_channels = channels
        features.append(layers.conv_norm_relu6(in_channels, _LAST_CHANNELS, 1))
        self.features, self.average = nn.SequentialCell(features), layers.global_average()
        self.drop, self.dropout_scale = nn.Dropout(p=dropout), 1 / (1 - dropout)
        self.drop_probabilities = (dropout,) * _LAST_CHANNELS if dropout else ()
        self.classifier = layers.dense(_LAST_CHANNELS, num_classes)

    def construct(self, x: Tensor, dropout_mask: Tensor | None = None) -> Tensor:
        x = self.average(self.features(x))
        if dropout_mask is None:
            return self.classify(self.drop(x))
        return self.classify(x * ops.cast(dropout_mask, x.dtype) * self.dropout_scale)
