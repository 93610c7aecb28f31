"""The CIFAR networks of ACNet (Ding et al., ICCV 2019, section 4.1), with the channel counts of the paper's code."""

from typing import Any

from mindspore import Tensor, nn, ops

from src.models.layers import LayerFactory, global_average


class CifarQuick(nn.Cell):
    """Caffe's CIFAR-quick with batch norm: three 5x5 convolutions and two dense layers. (N, 3, S, S) -> (N, num_classes)."""

    def __init__(self, num_classes: int, layers: LayerFactory, image_size: int = 32, **unused: Any) -> None:
        super().__init__()
        self.conv1 = layers.conv_norm(3, 32, 5, padding=2)
        self.conv2 = layers.conv_norm(32, 32, 5, padding=2)
        self.conv3 = layers.conv_norm(32, 64, 5, padding=2)
        self.relu = nn.ReLU()
        self.max_pool = nn.MaxPool2d(3, 2, pad_mode="valid")
        self.average_pool = nn.AvgPool2d(3, 2, pad_mode="valid")
        size = image_size
        for _ in range(3):
            size = (size - 3) // 2 + 1
        self.flat = 64 * size * size
        self.fc1 = nn.Dense(self.flat, 64)
        self.classifier = nn.Dense(64, num_classes)

    def construct(self, x: Tensor) -> Tensor:
        x = self.max_pool(self.relu(self.conv1(x)))
        x = self.average_pool(self.relu(self.conv2(x)))
        x = self.average_pool(self.relu(self.conv3(x)))
        x = self.relu(self.fc1(ops.reshape(x, (-1, self.flat))))
        return self.classifier(x)


class Vgg16Cifar(nn.Cell):
    """VGG-16 with batch norm and one hidden dense layer of 512. (N, 3, S, S) -> (N, num_classes)."""

    STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

    def __init__(self, num_classes: int, layers: LayerFactory, image_size: int = 32, **unused: Any) -> None:
        super().__init__()
        features, in_channels = [], 3
        for stage in self.STAGES:
            for channels in stage:
                features += [layers.conv_norm(in_channels, channels, 3, padding=1), nn.ReLU()]
                in_channels = channels
            features.append(nn.MaxPool2d(2, 2, pad_mode="valid"))
        self.features = nn.SequentialCell(features)
        self.flat = in_channels * (image_size // 32) ** 2
        self.fc1 = nn.Dense(self.flat, 512)
        self.relu = nn.ReLU()
        self.classifier = nn.Dense(512, num_classes)

    def construct(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = self.relu(self.fc1(ops.reshape(x, (-1, self.flat))))
        return self.classifier(x)


class _BasicBranchBlock(nn.Cell):
    def __init__(self, in_channels: int, channels: int, stride: int, layers: LayerFactory) -> None:
        super().__init__()
        self.conv1 = layers.conv_norm(in_channels, channels, 3, stride, padding=1)
        self.conv2 = layers.conv_norm(channels, channels, 3, padding=1)
        project = stride != 1 or in_channels != channels
        self.downsample = layers.conv_norm(in_channels, channels, 1, stride) if project else nn.Identity()
        self.relu = nn.ReLU()

    def construct(self, x: Tensor) -> Tensor:
        return self.relu(self.conv2(self.relu(self.conv1(x))) + self.downsample(x))

    @property
    def branch_end(self) -> nn.Cell:
        """The last layer of the residual branch."""
        return self.conv2


class ResNetCifar(nn.Cell):
    """ResNet of depth 6n + 2 for CIFAR (He et al., section 4.2), with projection shortcuts as in ACNet's code."""

    def __init__(self, num_classes: int, layers: LayerFactory, blocks_per_stage: int = 9, **unused: Any) -> None:
        super().__init__()
        self.conv1 = layers.conv_norm(3, 16, 3, padding=1)
        self.relu = nn.ReLU()
        blocks, in_channels = [], 16
        for stage, channels in enumerate((16, 32, 64)):
            for index in range(blocks_per_stage):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(_BasicBranchBlock(in_channels, channels, stride, layers))
                in_channels = channels
        self.blocks = nn.SequentialCell(blocks)
        self.classifier = nn.Dense(in_channels, num_classes)

    def construct(self, x: Tensor) -> Tensor:
        return self.classifier(global_average(self.blocks(self.relu(self.conv1(x)))))


class _PreActivationBlock(nn.Cell):
    def __init__(self, in_channels: int, channels: int, stride: int, project: bool, layers: LayerFactory) -> None:
        super().__init__()
        self.norm1, self.conv1 = layers.norm(in_channels), layers.conv(in_channels, channels, 3, stride, padding=1)
        self.norm2, self.conv2 = layers.norm(channels), layers.conv(channels, channels, 3, padding=1)
        self.relu = nn.ReLU()
        self.shortcut = nn.Identity()
        if project:
            self.shortcut = nn.SequentialCell(layers.norm(in_channels), nn.ReLU(),
                                              layers.conv(in_channels, channels, 1, stride))

    def construct(self, x: Tensor) -> Tensor:
        out = self.conv1(self.relu(self.norm1(x)))
        return self.conv2(self.relu(self.norm2(out))) + self.shortcut(x)


class WideResNetCifar(nn.Cell):
    """WRN-16-8 (Zagoruyko and Komodakis, arXiv:1605.07146): pre-activation, two blocks per stage, width 8.

    As in ACNet's code the first block of each stage has its own batch norm on the shortcut, and no ReLU stands between
    the last batch norm and the pooling.
    """

    def __init__(self, num_classes: int, layers: LayerFactory, blocks_per_stage: int = 2, width: int = 8, **unused: Any) -> None:
        super().__init__()
        self.conv1 = layers.conv(3, 16, 3, padding=1)
        blocks, in_channels = [], 16
        for stage in range(3):
            channels = (16 << stage) * width
            for index in range(blocks_per_stage):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(_PreActivationBlock(in_channels, channels, stride, index == 0, layers))
                in_channels = channels
        self.blocks = nn.SequentialCell(blocks)
        self.last_norm = layers.norm(in_channels)
        self.classifier = nn.Dense(in_channels, num_classes)

    def construct(self, x: Tensor) -> Tensor:
        return self.classifier(global_average(self.last_norm(self.blocks(self.conv1(x)))))
