"""The CIFAR networks of ACNet in PyTorch, with or without ACBs, to compare speed with."""

from torch import nn
from torch.nn import functional

from benchmarks.pytorch_reference import Acb

_VGG_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_RESNET_BLOCKS, _WRN_BLOCKS, _WRN_WIDTH = 9, 2, 8


def build_cifar(name, block="base", classes=10):
    """``name`` with ``block``, "base" or "acb", for (N, 3, 32, 32)."""
    return NETWORKS[name](Layers(block), classes)


class Layers:
    """Makes 3x3 and 5x5 convolutions, or ACBs instead of them."""

    def __init__(self, block):
        self.uses_acb = block == "acb"

    def conv(self, in_channels, out_channels, size, stride=1):
        if self.uses_acb and size > 1:
            return Acb(in_channels, out_channels, size, stride)
        return nn.Conv2d(in_channels, out_channels, size, stride, size // 2, bias=False)

    def conv_norm(self, in_channels, out_channels, size, stride=1):
        conv = self.conv(in_channels, out_channels, size, stride)
        if isinstance(conv, Acb):
            return conv
        return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


class CifarQuick(nn.Module):
    def __init__(self, layers, classes):
        super().__init__()
        self.conv1, self.conv2 = layers.conv_norm(3, 32, 5), layers.conv_norm(32, 32, 5)
        self.conv3 = layers.conv_norm(32, 64, 5)
        self.fc1, self.classifier = nn.Linear(576, 64), nn.Linear(64, classes)

    def forward(self, x):
        x = functional.max_pool2d(functional.relu(self.conv1(x)), 3, 2)
        x = functional.avg_pool2d(functional.relu(self.conv2(x)), 3, 2)
        x = functional.avg_pool2d(functional.relu(self.conv3(x)), 3, 2)
        return self.classifier(functional.relu(self.fc1(x.flatten(1))))


class Vgg16(nn.Module):
    def __init__(self, layers, classes):
        super().__init__()
        features, in_channels = [], 3
        for stage in _VGG_STAGES:
            for channels in stage:
                features += [layers.conv_norm(in_channels, channels, 3), nn.ReLU(inplace=True)]
                in_channels = channels
            features.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*features)
        self.fc1, self.classifier = nn.Linear(512, 512), nn.Linear(512, classes)

    def forward(self, x):
        return self.classifier(functional.relu(self.fc1(self.features(x).flatten(1))))


class _BasicBlock(nn.Module):
    def __init__(self, in_channels, channels, stride, layers):
        super().__init__()
        self.conv1 = layers.conv_norm(in_channels, channels, 3, stride)
        self.conv2 = layers.conv_norm(channels, channels, 3)
        projects = stride != 1 or in_channels != channels
        self.downsample = (
            layers.conv_norm(in_channels, channels, 1, stride) if projects else nn.Identity()
        )

    def forward(self, x):
        return functional.relu(self.conv2(functional.relu(self.conv1(x))) + self.downsample(x))


class ResNet56(nn.Module):
    def __init__(self, layers, classes):
        super().__init__()
        self.conv1, in_channels = layers.conv_norm(3, 16, 3), 16
        blocks = []
        for stage, channels in enumerate((16, 32, 64)):
            for index in range(_RESNET_BLOCKS):
                stride = 2 if stage and not index else 1
                blocks.append(_BasicBlock(in_channels, channels, stride, layers))
                in_channels = channels
        self.blocks, self.classifier = nn.Sequential(*blocks), nn.Linear(in_channels, classes)

    def forward(self, x):
        return self.classifier(self.blocks(functional.relu(self.conv1(x))).mean((2, 3)))


class _PreActivationBlock(nn.Module):
    def __init__(self, in_channels, channels, stride, layers):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(in_channels), nn.BatchNorm2d(channels)
        self.conv1 = layers.conv(in_channels, channels, 3, stride)
        self.conv2 = layers.conv(channels, channels, 3)
        self.shortcut = nn.Identity()
        if in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.BatchNorm2d(in_channels),
                nn.ReLU(),
                layers.conv(in_channels, channels, 1, stride),
            )

    def forward(self, x):
        out = self.conv1(functional.relu(self.norm1(x)))
        return self.conv2(functional.relu(self.norm2(out))) + self.shortcut(x)


class Wrn16x8(nn.Module):
    def __init__(self, layers, classes):
        super().__init__()
        self.conv1, in_channels = layers.conv(3, 16, 3), 16
        blocks = []
        for stage in range(3):
            channels = (16 << stage) * _WRN_WIDTH
            for index in range(_WRN_BLOCKS):
                stride = 2 if stage and not index else 1
                blocks.append(_PreActivationBlock(in_channels, channels, stride, layers))
                in_channels = channels
        self.blocks, self.last_norm = nn.Sequential(*blocks), nn.BatchNorm2d(in_channels)
        self.classifier = nn.Linear(in_channels, classes)

    def forward(self, x):
        return self.classifier(self.last_norm(self.blocks(self.conv1(x))).mean((2, 3)))


NETWORKS = {
    "cifar_quick": CifarQuick,
    "vgg16_cifar": Vgg16,
    "resnet56_cifar": ResNet56,
    "wrn16_8_cifar": Wrn16x8,
}
