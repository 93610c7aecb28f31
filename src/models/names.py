"""Names of networks, their aliases and the smallest images that they take."""

ALIASES = {
    "resnext50": "resnext50_32x4d", "resnext101": "resnext101_32x4d",
    "sres18": "resnet18", "sres34": "resnet34", "sres50": "resnet50",
    "cfqkbnc": "cifar_quick", "vc": "vgg16_cifar", "src56": "resnet56_cifar", "wrnc16plain": "wrn16_8_cifar",
}

LEAST_IMAGE_SIZE = {
    "alexnet": 63, "resnet18": 32, "resnet34": 32, "resnet50": 32, "resnext50_32x4d": 32, "resnext101_32x4d": 32,
    "cifar_quick": 15, "vgg16_cifar": 32, "resnet56_cifar": 8, "wrn16_8_cifar": 8,
}

NETWORKS = tuple(LEAST_IMAGE_SIZE)
