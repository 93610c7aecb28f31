"""Building networks by name."""

import pkgutil

import mindspore
from mindspore import nn

from src.models.layers import LayerFactory
from src.models.networks import NETWORKS, check_network, network_name
from src.utils.config import Config


def build_model(name: str, num_classes: int, block: str = "base", *, fused: bool = False, gamma_init: float | None = None,
                image_size: int | None = None, dropout: float = 0.5, sync_bn: bool = False) -> nn.Cell:
    """A network of (N, 3, image_size, image_size) float images to (N, num_classes) logits.

    Args:
        name: a name in ``networks.NETWORKS`` or an alias.
        block: a name in ``blocks.BLOCKS``.
        fused: the form that ``fuse`` leaves of a network with blocks.
        gamma_init: initial scale of the batch norms in blocks.
        image_size: side of the images; None is the network's own.
        dropout: drop probability, in training only, of networks that have dropout.
        sync_bn: batch statistics over all ranks.

    The network's attribute ``network_name`` is its name, on which name maps depend.

    Raises:
        UserError: for an unknown name or block, or an image size that the network cannot take.
    """
    check_network(name, image_size)
    name = network_name(name)
    entry, layers = NETWORKS[name], LayerFactory(block, fused, gamma_init, sync_bn)
    network = pkgutil.resolve_name(entry.builder)(
        num_classes, layers, image_size=image_size or entry.image_size, dropout=dropout, **entry.arguments)
    network.network_name = name
    return network


def create_network(config: Config, fused: bool = False) -> nn.Cell:
    """The network that ``config`` describes, its random weights drawn from the seed."""
    mindspore.set_seed(config.seed)
    return build_model(config.network, config.num_classes, config.block, fused=fused, gamma_init=config.gamma_init,
                       image_size=config.image_size, dropout=config.dropout, sync_bn=config.sync_bn)
