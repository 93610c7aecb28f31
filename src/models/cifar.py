"""The CIFAR networks of ACNet (Ding et al., ICCV 2019, section 4.1).

Channel counts are those of the paper's code.
"""

from collections import OrderedDict
from typing import Any

from mindspore import Tensor, nn, ops

from src.models.layers import ImageClassifier, LayerFactory, ResidualBlocks


class CifarQuick(ImageClassifier):
    """Caffe's CIFAR-quick with batch norm: three 5x5 convolutions and two dense layers."""

    def __init__(
        self, num_classes: int, layers: LayerFactory, image_size: int = 32, **unused: Any
    ) -> None:
        super().__init__(layers)
        self.conv1 = layers.conv_norm_relu(3, 32, 5, padding=2)
        self.conv2 = layers.conv_norm_relu(32, 32, 5, padding=2)
        self.conv3 = layers.conv_norm_relu(32, 64, 5, padding=2)
        self.max_pool, self.average_pool = layers.max_pool(3, 2), layers.average_pool(3, 2)
        self.to_nchw = layers.to_nchw()
        self.relu = nn.ReLU()
        size = image_size
        for _ in range(3):
            size = (size - 3) // 2 + 1
        self.flat = 64 * size * size
        self.fc1 = layers.dense(self.flat, 64)
        self.classifier = layers.dense(64, num_classes)

    def construct(self, x: Tensor) -> Tensor:
        x = self.max_pool(self.conv1(x))
        x = self.average_pool(self.conv2(x))
        x = self.to_nchw(self.average_pool(self.conv3(x)))
        x = self.relu(self.fc1(ops.reshape(x, (-1, self.flat))))
        return self.classify(x)


class Vgg16Cifar(ImageClassifier):
    """VGG-16 with batch norm and one hidden dense layer of 512 units."""

    STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

    def __init__(
        self, num_classes: int, layers: LayerFactory, image_size: int = 32, **unused: Any
    ) -> None:
        super().__init__(layers)
        # The indices leave room for a ReLU after each convolution, as published weights do.
        features: OrderedDict[str, nn.Cell] = OrderedDict()
        index, in_channels = 0, 3
        for stage in self.STAGES:
            for channels in stage:
                features[str(index)] = layers.conv_norm_relu(in_channels, channels, 3, padding=1)
                index, in_channels = index + 2, channels
            features[str(index)] = layers.max_pool(2, 2)
            index += 1
        self.features, self.to_nchw = nn.SequentialCell(features), layers.to_nchw()
        self.flat = in_channels * (image_size // 32) ** 2
        self.fc1 = layers.dense(self.flat, 512)
        self.relu = nn.ReLU()
        self.classifier = layers.dense(512, num_classes)

    def construct(self, x: Tensor) -> Tensor:
        x = self.to_nchw(self.features(x))
        x = self.relu(self.fc1(ops.reshape(x, (-1, self.flat))))
        return self.classify(x)


class _BasicBranchBlock(nn.Cell):
    def __init__(
        self, in_channels: int, channels: int, stride: int, layers: LayerFactory, drop: float
    ) -> None:
        super().__init__()
        self.conv1 = layers.conv_norm_relu(in_channels, channels, 3, stride, padding=1)
        self.conv2 = layers.conv_norm_add_relu(channels, channels, 3, padding=1, drop=drop)
        project = stride != 1 or in_channels != channels
        self.downsample = (
            layers.conv_norm(in_channels, channels, 1, stride) if project else nn.Identity()
        )
        self.split = layers.split_projected() if project else layers.split_residual()

    def construct(self, x: Tensor, *factors: Tensor) -> Tensor:
        x, shortcut = self.split(x)
        return self.conv2(self.conv1(x), self.downsample(shortcut), *factors)

    @property
    def branch_end(self) -> nn.Cell:
        """The last layer of the residual branch."""
        return self.conv2


class ResNetCifar(ImageClassifier):
    """ResNet of depth 6n + 2 for CIFAR (He et al., section 4.2).

    Shortcuts are projections, as in ACNet's code.
    """

    def __init__(
        self, num_classes: int, layers: LayerFactory, blocks_per_stage: int = 9, **unused: Any
    ) -> None:
        super().__init__(layers)
        drops = self.drop_probabilities = layers.drop_probabilities(3 * blocks_per_stage)
        self.conv1 = layers.conv_norm_relu(3, 16, 3, padding=1)
        blocks: list[nn.Cell] = []
        in_channels = 16
        for stage, channels in enumerate((16, 32, 64)):
            for index in range(blocks_per_stage):
                stride = 2 if stage > 0 and index == 0 else 1
                drop = drops[len(blocks)]
                blocks.append(_BasicBranchBlock(in_channels, channels, stride, layers, drop))
                in_channels = channels
        self.blocks, self.average = ResidualBlocks(blocks, drops), layers.global_average()
        self.classifier = layers.dense(in_channels, num_classes)

    def construct(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.classify(self.average(self.blocks(self.conv1(x), mask)))


class _PreActivationBlock(nn.Cell):
    def __init__(
        self, in_channels: int, channels: int, stride: int, layers: LayerFactory, drop: float
    ) -> None:
        super().__init__()
        self.norm1 = layers.norm_relu(in_channels)
        self.conv1 = layers.conv(in_channels, channels, 3, stride, padding=1)
        self.norm2 = layers.norm_relu(channels)
        self.conv2 = layers.conv(channels, channels, 3, padding=1)
        self.split, self.shortcut = layers.split_residual(), nn.Identity()
        self.add = layers.stochastic_add(channels) if drop else layers.add()
        if in_channels != channels:
            # Named as if a ReLU stood between them, as in published weights.
            self.shortcut = nn.SequentialCell(
                OrderedDict(
                    [
                        ("0", layers.norm_relu(in_channels)),
                        ("2", layers.conv(in_channels, channels, 1, stride)),
                    ]
                )
            )

    def construct(self, x: Tensor, *factors: Tensor) -> Tensor:
        x, shortcut = self.split(x)
        branch = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        return self.add(branch, self.shortcut(shortcut), *factors)


class WideResNetCifar(ImageClassifier):
    """WRN-16-8 (Zagoruyko and Komodakis, arXiv:1605.07146): width 8, two blocks per stage.

    As in ACNet's code, the first block of each stage has its own batch norm on the shortcut, and
    there is no ReLU between the last batch norm and the pooling.
    """

    def __init__(
        self,
        num_classes: int,
        layers: LayerFactory,
        blocks_per_stage: int = 2,
        width: int = 8,
        **unused: Any,
    ) -> None:
        super().__init__(layers)
        drops = self.drop_probabilities = layers.drop_probabilities(3 * blocks_per_stage)
        self.conv1 = layers.conv(3, 16, 3, padding=1)
        blocks: list[nn.Cell] = []
        in_channels = 16
        for stage in range(3):
            channels = (16 << stage) * width
            for index in range(blocks_per_stage):
                stride = 2 if stage > 0 and index == 0 else 1
                drop = drops[len(blocks)]
                blocks.append(_PreActivationBlock(in_channels, channels, stride, layers, drop))
                in_channels = channels
        self.blocks, self.average = ResidualBlocks(blocks, drops), layers.global_average()
        self.last_norm = layers.norm(in_channels)
        self.classifier = layers.dense(in_channels, num_classes)

    def construct(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.classify(self.average(self.last_norm(self.blocks(self.conv1(x), mask))))
