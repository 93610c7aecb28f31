"""Networks by name."""

from dataclasses import replace

from mindspore.common.initializer import HeNormal

from src.models import cifar, resnet
from src.models.alexnet import AlexNet
from src.models.layers import LayerFactory
from src.models.names import ALIASES, LEAST_IMAGE_SIZE, NETWORKS
from src.utils.errors import UserError, suggestion

_RESNETS = {
    "resnet18": (resnet.BasicBlock, (2, 2, 2, 2), {}),
    "resnet34": (resnet.BasicBlock, (3, 4, 6, 3), {}),
    "resnet50": (resnet.Bottleneck, (3, 4, 6, 3), {}),
    "resnext50_32x4d": (resnet.Bottleneck, (3, 4, 6, 3), {"cardinality": 32, "base_width": 4}),
    "resnext101_32x4d": (resnet.Bottleneck, (3, 4, 23, 3), {"cardinality": 32, "base_width": 4}),
}


def build_model(name, num_classes, block="base", *, fused=False, gamma_init=None, image_size=None, dropout=0.5,
                sync_bn=False):
    """A network of (N, 3, image_size, image_size) float images to (N, num_classes) logits.

    Args:
        name: one of ``NETWORKS`` or an alias of ``ALIASES``.
        block: "base", or "acb" for asymmetric convolution blocks in place of 3x3 and 5x5 convolutions.
        fused: with block "acb", the form that ``acb.fuse`` leaves.
        gamma_init: initial scale of the batch norms in ACBs.
        image_size: for the networks whose dense layers depend on it; None is 224 for AlexNet, 32 for the CIFAR networks.
        dropout: AlexNet's drop probability, in training only.
        sync_bn: batch statistics over all ranks.

    The network's attribute ``network_name`` is its name, of which name maps depend.

    Raises:
        UserError: for an unknown name or block, or an image size that the network cannot take.
    """
    name = ALIASES.get(name, name)
    network = _build(name, num_classes, block, fused, gamma_init, image_size, dropout, sync_bn)
    network.network_name = name
    return network


def _build(name, num_classes, block, fused, gamma_init, image_size, dropout, sync_bn):
    if name not in NETWORKS:
        raise UserError(f"unknown network '{name}'{suggestion(name, (*NETWORKS, *ALIASES))}; "
                        f"there are {', '.join(NETWORKS)}")
    if block not in ("base", "acb"):
        raise UserError(f"unknown block '{block}'; there are base and acb")
    if image_size is not None and image_size < LEAST_IMAGE_SIZE[name]:
        raise UserError(f"image_size={image_size} is too small for {name}, which needs {LEAST_IMAGE_SIZE[name]} or more")
    layers = LayerFactory(block, fused, gamma_init, sync_bn)
    if name in _RESNETS:
        kind, depths, width = _RESNETS[name]
        # torchvision's and the paper's initialisation: Kaiming normal by fan-out.
        he_normal = HeNormal(mode="fan_out", nonlinearity="relu")
        return resnet.ResNet(kind, depths, num_classes, replace(layers, weight_init=he_normal), **width)
    if name == "alexnet":
        return AlexNet(num_classes, layers, dropout, image_size or 224)
    if name == "cifar_quick":
        return cifar.CifarQuick(num_classes, layers, image_size or 32)
    if name == "vgg16_cifar":
        return cifar.Vgg16Cifar(num_classes, layers, image_size or 32)
    if name == "resnet56_cifar":
        return cifar.ResNetCifar(num_classes, layers)
    return cifar.WideResNetCifar(num_classes, layers)
