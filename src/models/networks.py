"""The table of networks. It imports nothing of MindSpore, so a wrong name is reported before seconds are spent on that import."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from src.models import name_maps
from src.utils.errors import UserError, suggestion


@dataclass(frozen=True)
class NetworkSize:
    """What a network costs.

    Attributes:
        parameters: trainable ones.
        multiply_adds: of convolutions and dense layers, for one image.
        activations: outputs of convolutions, batch norms and dense layers for one image.
    """

    parameters: int
    multiply_adds: int
    activations: int


@dataclass(frozen=True)
class Network:
    """One network that can be built by name.

    Attributes:
        builder: "MODULE:FUNCTION", called as ``builder(num_classes, layers, image_size=..., dropout=..., **arguments)``;
            returns a Cell of (N, 3, S, S) float images -> (N, num_classes) logits whose last layer is named ``classifier``.
        least_image_size: smallest side in pixels of an input.
        image_size: side for which it is built if none is given.
        aliases: further names, those of the seeds among them.
        arguments: what distinguishes it from others with the same builder.
        torch_module: our name of a module -> torchvision's and timm's.
        size: its NetworkSize without blocks, for ``image_size`` and 1000 classes, or 10 if it is one for 32 pixels; None if nobody
            has counted.
        acnet_module: (our name of a module, whether it is of a fused network) -> the ACNet repository's; None if it has
            no such network.
    """

    builder: str
    least_image_size: int
    image_size: int = 224
    aliases: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    size: NetworkSize | None = None
    torch_module: Callable[[str], str] = str
    acnet_module: Callable[[str, bool], str] | None = None


def _resnet(bottleneck: bool, depths: tuple[int, ...], size: NetworkSize, aliases: tuple[str, ...],
            acnet_module: Callable[[str, bool], str] | None = None, **widths: int) -> Network:
    return Network("src.models.resnet:build", 32, aliases=aliases, torch_module=name_maps.torchvision_resnet,
                   acnet_module=acnet_module, arguments={"bottleneck": bottleneck, "depths": depths, **widths}, size=size)


NETWORKS: dict[str, Network] = {
    "alexnet": Network("src.models.alexnet:AlexNet", 63, torch_module=name_maps.torchvision_alexnet,
                       size=NetworkSize(61_100_840, 714_188_480, 494_184)),
    "resnet18": _resnet(False, (2, 2, 2, 2), NetworkSize(11_689_512, 1_814_073_344, 4_968_424), ("sres18",), name_maps.acnet_resnet),
    "resnet34": _resnet(False, (3, 4, 6, 3), NetworkSize(21_797_672, 3_663_761_408, 7_477_224), ("sres34",), name_maps.acnet_resnet),
    "resnet50": _resnet(True, (3, 4, 6, 3), NetworkSize(25_557_032, 4_089_184_256, 22_228_968), ("sres50",), name_maps.acnet_resnet50),
    "resnext50_32x4d": _resnet(True, (3, 4, 6, 3), NetworkSize(25_028_904, 4_230_479_872, 28_802_024), ("resnext50",),
                               cardinality=32, base_width=4),
    "resnext101_32x4d": _resnet(True, (3, 4, 23, 3), NetworkSize(44_177_704, 7_969_996_800, 42_449_896), ("resnext101",),
                                cardinality=32, base_width=4),
    "cifar_quick": Network("src.models.cifar:CifarQuick", 15, 32, ("cfqkbnc",), acnet_module=name_maps.acnet_quick,
                           size=NetworkSize(117_034, 10_763_904, 86_282)),
    "vgg16_cifar": Network("src.models.cifar:Vgg16Cifar", 32, 32, ("vc",), acnet_module=name_maps.acnet_vgg,
                           size=NetworkSize(14_986_698, 313_463_808, 553_482)),
    "resnet56_cifar": Network("src.models.cifar:ResNetCifar", 8, 32, ("src56",), acnet_module=name_maps.acnet_resnet56,
                              size=NetworkSize(855_770, 125_747_840, 1_089_546)),
    "wrn16_8_cifar": Network("src.models.cifar:WideResNetCifar", 8, 32, ("wrnc16plain",), acnet_module=name_maps.acnet_wrn,
                             size=NetworkSize(10_962_170, 1_548_145_664, 2_310_154)),
}


def aliases() -> dict[str, str]:
    """{alias: name of the network}."""
    return {alias: name for name, network in NETWORKS.items() for alias in network.aliases}


def network_name(name: str) -> str:
    """The name in the table of a network given by name or alias. Raises UserError for any other."""
    resolved = aliases().get(name, name)
    if resolved not in NETWORKS:
        raise UserError(f"unknown network '{name}'{suggestion(name, (*NETWORKS, *aliases()))}; there are {', '.join(NETWORKS)}")
    return resolved


def check_network(name: str, image_size: int | None = None) -> None:
    """Raise UserError for an unknown network, or an image size that it cannot take."""
    name = network_name(name)
    least = NETWORKS[name].least_image_size
    if image_size is not None and image_size < least:
        raise UserError(f"image_size={image_size} is too small for {name}, which needs {least} or more")


def torch_name(name: str, network: str) -> str:
    """torchvision's and timm's name of parameter ``name`` if they have the network, else our name in PyTorch's words."""
    module, leaf = name_maps.in_torch_words(name)
    return f"{NETWORKS[network_name(network)].torch_module(module)}.{leaf}"


def acnet_name(name: str, network: str, fused: bool = False) -> str | None:
    """The name of parameter ``name`` in the ACNet repository's .hdf5 files; None if it has no such network.

    Args:
        fused: True for the deploy form, whose blocks are one convolution named fused_conv.
    """
    to_acnet = NETWORKS[network_name(network)].acnet_module
    module, leaf = name_maps.in_torch_words(name)
    return f"{to_acnet(module, fused)}.{leaf}" if to_acnet is not None else None
