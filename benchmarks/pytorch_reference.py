"""The networks in PyTorch, to compare numbers and speed with.

PyTorch is a development-only dependency.
"""

from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional


def build(name, classes, block="base", dropout=0.5):
    """``name`` with ``block`` as a torch Module.

    Parameters of the base networks have torchvision's names.
    """
    if name == "alexnet":
        return _alexnet(classes, dropout)
    if name == "cifar_quick":
        return Quick(classes)
    if name == "mobilenet_v2":
        return MobileNetV2(classes, dropout)
    if name == "densenet121":
        return DenseNet(classes)
    depths, groups = {"resnet18": ((2, 2, 2, 2), 1), "resnext50_32x4d": ((3, 4, 6, 3), 32)}[name]
    return ResNet(depths, groups, classes, block)


class Acb(nn.Module):
    """Square, horizontal and vertical convolutions, each with its batch norm, summed."""

    def __init__(self, in_channels, out_channels, size=5, stride=1, groups=1):
        super().__init__()
        half, shape = size // 2, {"stride": stride, "groups": groups, "bias": False}
        self.square_conv = nn.Conv2d(in_channels, out_channels, size, padding=half, **shape)
        self.hor_conv = nn.Conv2d(in_channels, out_channels, (1, size), padding=(0, half), **shape)
        self.ver_conv = nn.Conv2d(in_channels, out_channels, (size, 1), padding=(half, 0), **shape)
        self.square_bn, self.hor_bn, self.ver_bn = (nn.BatchNorm2d(out_channels) for _ in range(3))

    def forward(self, x):
        return (
            self.square_bn(self.square_conv(x))
            + self.hor_bn(self.hor_conv(x))
            + self.ver_bn(self.ver_conv(x))
        )


class Block(nn.Module):
    """ResNet's basic block, or with groups ResNeXt's bottleneck."""

    def __init__(self, in_channels, width, out_channels, stride, groups, block):
        super().__init__()
        shapes = (
            [(in_channels, width, 3, stride, 1), (width, out_channels, 3, 1, 1)]
            if groups == 1
            else [
                (in_channels, width, 1, 1, 1),
                (width, width, 3, stride, groups),
                (width, out_channels, 1, 1, 1),
            ]
        )
        for number, (i, o, k, s, g) in enumerate(shapes, 1):
            acb = block == "acb" and k == 3
            setattr(
                self,
                f"conv{number}",
                Acb(i, o, k, s, g) if acb else nn.Conv2d(i, o, k, s, k // 2, groups=g, bias=False),
            )
            setattr(self, f"bn{number}", nn.Identity() if acb else nn.BatchNorm2d(o))
        self.depth = len(shapes)
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x):
        out = x
        for number in range(1, self.depth + 1):
            out = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(out))
            out = functional.relu(out) if number < self.depth else out
        return functional.relu(out + (self.downsample(x) if hasattr(self, "downsample") else x))


class ResNet(nn.Module):
    def __init__(self, depths, groups, classes, block="base"):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        in_channels = 64
        for stage, depth in enumerate(depths):
            channels = 64 << stage
            width, out_channels = (
                (channels, channels) if groups == 1 else (channels * 2, channels * 4)
            )
            blocks = []
            for index in range(depth):
                blocks.append(
                    Block(
                        in_channels,
                        width,
                        out_channels,
                        2 if stage and not index else 1,
                        groups,
                        block,
                    )
                )
                in_channels = out_channels
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(in_channels, classes)

    def forward(self, x):
        x = functional.max_pool2d(functional.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
        return self.fc(x.mean((2, 3)))


class Quick(nn.Module):
    """cifar_quick with ACBs."""

    def __init__(self, classes):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = Acb(3, 32), Acb(32, 32), Acb(32, 64)
        self.fc1, self.classifier = nn.Linear(576, 64), nn.Linear(64, classes)

    def forward(self, x):
        x = functional.max_pool2d(functional.relu(self.conv1(x)), 3, 2)
        x = functional.avg_pool2d(functional.relu(self.conv2(x)), 3, 2)
        x = functional.avg_pool2d(functional.relu(self.conv3(x)), 3, 2)
        return self.classifier(functional.relu(self.fc1(x.flatten(1))))


def _initialise(network, mode):
    """Kaiming normal, as torchvision: PyTorch's default vanishes in networks as deep as these."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=mode)


def _conv_bn_relu6(in_channels, out_channels, size, stride=1, groups=1):
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU6(),
    )


class InvertedResidual(nn.Module):
    """MobileNetV2's block."""

    def __init__(self, in_channels, out_channels, stride, expansion):
        super().__init__()
        width = in_channels * expansion
        self.conv = nn.Sequential(
            *([_conv_bn_relu6(in_channels, width, 1)] if expansion > 1 else []),
            _conv_bn_relu6(width, width, 3, stride, groups=width),
            nn.Conv2d(width, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.adds = stride == 1 and in_channels == out_channels

    def forward(self, x):
        return x + self.conv(x) if self.adds else self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self, classes, dropout):
        super().__init__()
        features = [_conv_bn_relu6(3, 32, 3, 2), InvertedResidual(32, 16, 1, 1)]
        in_channels = 16
        for channels, blocks, stride in (
            (24, 2, 2),
            (32, 3, 2),
            (64, 4, 2),
            (96, 3, 1),
            (160, 3, 2),
            (320, 1, 1),
        ):
            for index in range(blocks):
                features.append(InvertedResidual(in_channels, channels, 1 if index else stride, 6))
                in_channels = channels
        self.features = nn.Sequential(*features, _conv_bn_relu6(in_channels, 1280, 1))
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(1280, classes))
        _initialise(self, mode="fan_out")

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


class _DenseLayer(nn.Module):
    def __init__(self, in_channels):
        super().__init__()
        self.norm1, self.conv1 = (
            nn.BatchNorm2d(in_channels),
            nn.Conv2d(in_channels, 128, 1, bias=False),
        )
        self.norm2, self.conv2 = nn.BatchNorm2d(128), nn.Conv2d(128, 32, 3, padding=1, bias=False)

    def forward(self, x):
        new = self.conv1(functional.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(functional.relu(self.norm2(new)))], 1)


class DenseNet(nn.Module):
    """DenseNet-121."""

    def __init__(self, classes):
        super().__init__()
        features = OrderedDict(
            conv0=nn.Conv2d(3, 64, 7, 2, 3, bias=False),
            norm0=nn.BatchNorm2d(64),
            relu0=nn.ReLU(),
            pool0=nn.MaxPool2d(3, 2, 1),
        )
        channels = 64
        for stage, depth in enumerate((6, 12, 24, 16), 1):
            features[f"denseblock{stage}"] = nn.Sequential(
                OrderedDict(
                    (f"denselayer{index + 1}", _DenseLayer(channels + 32 * index))
                    for index in range(depth)
                )
            )
            channels += 32 * depth
            if stage < 4:
                features[f"transition{stage}"] = nn.Sequential(
                    OrderedDict(
                        norm=nn.BatchNorm2d(channels),
                        relu=nn.ReLU(),
                        conv=nn.Conv2d(channels, channels // 2, 1, bias=False),
                        pool=nn.AvgPool2d(2),
                    )
                )
                channels //= 2
        features["norm5"] = nn.BatchNorm2d(channels)
        self.features, self.classifier = nn.Sequential(features), nn.Linear(channels, classes)
        _initialise(self, mode="fan_in")

    def forward(self, x):
        return self.classifier(functional.relu(self.features(x)).mean((2, 3)))


def _alexnet(classes, dropout):
    features = nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
    )
    classifier = nn.Sequential(
        nn.Dropout(dropout),
        nn.Linear(9216, 4096),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(4096, 4096),
        nn.ReLU(),
        nn.Linear(4096, classes),
    )
    return nn.Sequential(
        OrderedDict(
            features=features,
            pool=nn.AdaptiveAvgPool2d(6),
            flatten=nn.Flatten(),
            classifier=classifier,
        )
    )


def normalise(images, mean, std):
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32."""
    images = images.permute(0, 3, 1, 2).float()
    return (images / 255 - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
