"""The table of networks, with everything that belongs to each.

Does not import MindSpore, which takes seconds, so that a wrong name is reported at once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from src.models import weight_names
from src.utils.errors import UserError, suggestion

Naming = Callable[[str], str | None]


@dataclass(frozen=True)
class NetworkSize:
    """The cost of a network.

    Attributes:
        parameters: number of trainable parameters.
        multiply_adds: multiply-adds of convolutions and dense layers, for one image.
        activations: outputs of convolutions, batch norms and dense layers, for one image.
    """

    parameters: int
    multiply_adds: int
    activations: int


@dataclass(frozen=True)
class Network:
    """One network that can be created by name.

    Attributes:
        builder: "MODULE:FUNCTION", called as ``builder(num_classes, layers, image_size=...,
            dropout=..., **arguments)``; returns a ``layers.ImageClassifier``.
        min_image_size: smallest side of an input in pixels.
        image_size: side of an input in pixels if none is given.
        single_pixel_at: side of an input in pixels up to which the last batch norms see one pixel
            per image; 0 if they never do.
        has_fixed_size: whether it is built for one image size, because of its dense layers.
        aliases: other names, including those of the seeds.
        arguments: arguments that distinguish it from others with the same builder.
        settings: {key: value} of the configuration that belong to the network: preprocessing,
            dropout, initial scale of its blocks. Recipes and flags win over them.
        recipes: {alias: recipe}: aliases that stand for a whole recipe.
        size: its NetworkSize without blocks, for ``image_size`` and 1000 classes (10 classes if
            image_size is 32); None if unknown.
        torch_module: our name of a module -> torchvision's and timm's.
        torch_file_module: the same in the file that torchvision publishes; None if it does not
            differ.
        acnet_module: our name of a module -> the ACNet repository's; None if that has no such
            network.
        acnet_fused_module: the same for a fused network; None if it is not different.
    """

    builder: str
    min_image_size: int
    image_size: int = 224
    single_pixel_at: int = 0
    has_fixed_size: bool = False
    aliases: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    recipes: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    size: NetworkSize | None = None
    torch_module: Callable[[str], str] = str
    torch_file_module: Callable[[str], str] | None = None
    acnet_module: Callable[[str], str] | None = None
    acnet_fused_module: Callable[[str], str] | None = None


# Preprocessing of the MindSpore seeds: both sides to 256, then the central 224, no antialiasing.
_MODEL_ZOO = {
    "image_size": 224,
    "crop_pct": 0.875,
    "eval_resize_mode": "square",
    "interpolation": "bilinear",
    "antialias": False,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}
# torchvision's transforms on Pillow's images.
_TORCHVISION = {"eval_resize_mode": "shorter_side", "antialias": True}
# ACNet's ImageNet networks use them too.
_ACNET_IMAGENET = {"gamma_init": 1, **_TORCHVISION}
# ACNet's CIFAR networks: the whole image.
_ACNET_CIFAR = {
    "gamma_init": 0.333,
    "image_size": 32,
    "crop_pct": 1.0,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
}


def _resnet(
    builder: str,
    depths: tuple[int, ...],
    size: NetworkSize,
    alias: str,
    acnet_module: Callable[[str], str] | None = None,
    **widths: int,
) -> Network:
    return Network(
        f"src.models.resnet:{builder}",
        min_image_size=32,
        single_pixel_at=32,
        aliases=(alias,),
        arguments={"depths": depths, **widths},
        settings=_ACNET_IMAGENET if acnet_module else _MODEL_ZOO,
        size=size,
        torch_module=weight_names.torchvision_resnet,
        acnet_module=acnet_module,
    )


def _acnet(network: Network, recipe: str) -> Network:
    """The network with its first alias standing for ACNet's own recipe."""
    return replace(network, recipes={network.aliases[0]: recipe})


NETWORKS: dict[str, Network] = {
    "alexnet": Network(
        "src.models.alexnet:AlexNet",
        min_image_size=63,
        has_fixed_size=True,
        settings={**_MODEL_ZOO, "dropout": 0.35},
        size=NetworkSize(61_100_840, 714_188_480, 494_184),
        torch_module=weight_names.torchvision_alexnet,
    ),
    "resnet18": _acnet(
        _resnet(
            "basic",
            (2, 2, 2, 2),
            NetworkSize(11_689_512, 1_814_073_344, 4_968_424),
            "sres18",
            weight_names.acnet_resnet,
        ),
        "acnet_resnet18_imagenet",
    ),
    "resnet34": _acnet(
        _resnet(
            "basic",
            (3, 4, 6, 3),
            NetworkSize(21_797_672, 3_663_761_408, 7_477_224),
            "sres34",
            weight_names.acnet_resnet,
        ),
        "acnet_resnet34_imagenet",
    ),
    "resnet50": _acnet(
        _resnet(
            "bottleneck",
            (3, 4, 6, 3),
            NetworkSize(25_557_032, 4_089_184_256, 22_228_968),
            "sres50",
            weight_names.acnet_resnet50,
        ),
        "acnet_resnet50_imagenet",
    ),
    "resnext50_32x4d": _resnet(
        "bottleneck",
        (3, 4, 6, 3),
        NetworkSize(25_028_904, 4_230_479_872, 28_802_024),
        "resnext50",
        cardinality=32,
        base_width=4,
    ),
    "resnext101_32x4d": _resnet(
        "bottleneck",
        (3, 4, 23, 3),
        NetworkSize(44_177_704, 7_969_996_800, 42_449_896),
        "resnext101",
        cardinality=32,
        base_width=4,
    ),
    "densenet121": Network(
        "src.models.densenet:densenet",
        min_image_size=32,
        single_pixel_at=32,
        aliases=("densenet",),
        arguments={"depths": (6, 12, 24, 16), "growth": 32},
        settings=_TORCHVISION,
        size=NetworkSize(7_978_856, 2_834_161_664, 22_567_656),
        torch_module=weight_names.torchvision_densenet,
        torch_file_module=weight_names.torchvision_densenet_file,
    ),
    "mobilenet_v2": Network(
        "src.models.mobilenet:MobileNetV2",
        min_image_size=32,
        single_pixel_at=32,
        aliases=("mobilenetv2",),
        settings={**_TORCHVISION, "dropout": 0.2},
        size=NetworkSize(3_504_872, 300_774_272, 13_357_224),
        torch_module=weight_names.torchvision_mobilenet,
    ),
    "densenet40_cifar": Network(
        "src.models.densenet:densenet_cifar",
        min_image_size=8,
        image_size=32,
        aliases=("dc40",),
        arguments={"depths": (12, 12, 12), "growth": 12},
        settings=_ACNET_CIFAR,
        size=NetworkSize(1_019_722, 264_812_928, 2_707_978),
    ),
    "cifar_quick": Network(
        "src.models.cifar:CifarQuick",
        min_image_size=15,
        image_size=32,
        has_fixed_size=True,
        aliases=("cfqkbnc",),
        settings=_ACNET_CIFAR,
        recipes={"cfqkbnc": "acnet_cifar_quick_cifar10"},
        size=NetworkSize(117_034, 10_763_904, 86_282),
        acnet_module=weight_names.acnet_quick,
    ),
    "vgg16_cifar": Network(
        "src.models.cifar:Vgg16Cifar",
        min_image_size=32,
        image_size=32,
        has_fixed_size=True,
        aliases=("vc",),
        settings=_ACNET_CIFAR,
        recipes={"vc": "acnet_vgg16_cifar_cifar10"},
        size=NetworkSize(14_986_698, 313_463_808, 553_482),
        acnet_module=weight_names.acnet_vgg,
    ),
    "resnet56_cifar": Network(
        "src.models.cifar:ResNetCifar",
        min_image_size=8,
        image_size=32,
        aliases=("src56",),
        settings=_ACNET_CIFAR,
        recipes={"src56": "acnet_resnet56_cifar_cifar10"},
        size=NetworkSize(855_770, 125_747_840, 1_089_546),
        acnet_module=weight_names.acnet_resnet56,
    ),
    "wrn16_8_cifar": Network(
        "src.models.cifar:WideResNetCifar",
        min_image_size=8,
        image_size=32,
        aliases=("wrnc16plain",),
        settings=_ACNET_CIFAR,
        recipes={"wrnc16plain": "acnet_wrn16_8_cifar_cifar10"},
        size=NetworkSize(10_962_170, 1_548_145_664, 2_310_154),
        acnet_module=weight_names.acnet_wrn,
        acnet_fused_module=weight_names.acnet_wrn_fused,
    ),
}


def aliases() -> dict[str, str]:
    """{alias: name of the network}."""
    return {alias: name for name, network in NETWORKS.items() for alias in network.aliases}


def network_name(name: str) -> str:
    """The name in NETWORKS of a network given by name or alias. Raises UserError if unknown."""
    resolved = aliases().get(name, name)
    if resolved not in NETWORKS:
        near = suggestion(name, (*NETWORKS, *aliases()))
        raise UserError(f"unknown network '{name}'{near}; available: {', '.join(NETWORKS)}")
    return resolved


def network_settings(name: Any) -> Mapping[str, Any]:
    """``Network.settings`` of a network given by name or alias; {} for an unknown name."""
    network = NETWORKS.get(aliases().get(name, name))
    return network.settings if network is not None else {}


def network_image_size(name: Any) -> int | None:
    """Side in pixels of a network's images, unless a key says otherwise; None for an unknown name.

    Args:
        name: a name or an alias.
    """
    network = NETWORKS.get(aliases().get(name, name))
    return network.settings.get("image_size", network.image_size) if network is not None else None


def recipe_of_alias(name: Any) -> str | None:
    """The recipe that an alias stands for, or None."""
    return next((n.recipes[name] for n in NETWORKS.values() if name in n.recipes), None)


def check_network(name: str, image_size: int | None = None) -> None:
    """Raise UserError for an unknown network, or an image size that it cannot take."""
    name = network_name(name)
    least = NETWORKS[name].min_image_size
    if image_size is not None and image_size < least:
        raise UserError(
            f"image_size={image_size} is too small for {name}, which needs {least} or more"
        )


def torch_name(name: str, network: str) -> str:
    """torchvision's and timm's name of parameter ``name``.

    For a network that those do not have: our name, with PyTorch's words for batch norm.
    """
    module, leaf = weight_names.split_torch_name(name)
    return f"{NETWORKS[network_name(network)].torch_module(module)}.{leaf}"


def torch_file_name(name: str, network: str) -> str:
    """The name of parameter ``name`` in the file that torchvision publishes."""
    module, leaf = weight_names.split_torch_name(name)
    entry = NETWORKS[network_name(network)]
    return f"{(entry.torch_file_module or entry.torch_module)(module)}.{leaf}"


def acnet_name(name: str, network: str, fused: bool = False) -> str | None:
    """The name of parameter ``name`` in the ACNet repository's .hdf5 files.

    Args:
        fused: whether the file holds the deploy form, whose blocks are one convolution named
            fused_conv.

    Returns:
        None if the repository has no such network.
    """
    entry = NETWORKS[network_name(network)]
    to_acnet = (entry.acnet_fused_module if fused else None) or entry.acnet_module
    module, leaf = weight_names.split_torch_name(name)
    return f"{to_acnet(module)}.{leaf}" if to_acnet is not None else None


def count_classes(arrays: Mapping[str, np.ndarray], network: str) -> int | None:
    """Number of classes of the weights {name: array} of ``network``; None without a classifier."""
    for naming in namings(network):
        bias = arrays.get(naming("classifier.bias") or "")
        if bias is not None:
            return len(bias)
    return None


def namings(network: str) -> tuple[Naming, ...]:
    """How files may call a parameter of ours: {our name} -> their name, or None."""
    return (
        lambda name: name,
        lambda name: torch_name(name, network),
        lambda name: torch_file_name(name, network),
        lambda name: acnet_name(name, network),
        lambda name: acnet_name(name, network, fused=True),
    )
