"""Building networks by name."""

import pkgutil

import mindspore
import numpy as np
from mindspore import Tensor, nn

from src.kernels.cells import name_layers
from src.kernels.library import KernelLibrary
from src.models.kernel_layers import KernelLayers
from src.models.layers import WEIGHT_INITS, LayerFactory, name_parameters
from src.models.networks import NETWORKS, check_network, network_name
from src.utils.config import Config
from src.utils.errors import UserError


def build_model(name: str, num_classes: int, block: str = "base", *, fused: bool = False, gamma_init: float | None = None,
                image_size: int | None = None, dropout: float = 0.5, sync_bn: bool = False, weight_init: str = "kaiming_uniform",
                zero_init_residual: bool = False, kernels: KernelLibrary | None = None, bfloat16: bool = False) -> nn.Cell:
    """A network of (N, 3, image_size, image_size) float images to (N, num_classes) logits.

    Args:
        name: a name in ``networks.NETWORKS`` or an alias.
        block: a name in ``blocks.BLOCKS``.
        fused: the form that ``fuse`` leaves of a network with blocks.
        gamma_init: initial scale of the batch norms in blocks.
        image_size: side of the images; None is the network's own.
        dropout: drop probability, in training only, of networks that have dropout.
        sync_bn: batch statistics over all ranks.
        weight_init: initial weights of plain convolutions, a name in ``layers.WEIGHT_INITS``.
        zero_init_residual: the last scale of each residual branch begins at 0, so that each block begins as the identity (Goyal et
            al., arXiv:1706.02677, section 5.1).
        kernels: what convolutions, norms and pooling compute with on CPU; None is MindSpore's own. Parameters are the same.
        bfloat16: with kernels, activations and their gradients are bfloat16.

    The network's attribute ``network_name`` is its name, on which name maps depend; ``layers`` is the factory of its layers.

    Raises:
        UserError: for an unknown name or block, or an image size that the network cannot take.
    """
    check_network(name, image_size)
    name = network_name(name)
    entry, layers = NETWORKS[name], LayerFactory(block, fused, gamma_init, sync_bn, WEIGHT_INITS[weight_init])
    if kernels is not None:
        layers = KernelLayers(**vars(layers), library=kernels, bfloat16=bfloat16)
    network = pkgutil.resolve_name(entry.builder)(
        num_classes, layers, image_size=image_size or entry.image_size, dropout=dropout, **entry.arguments)
    name_parameters(network)
    name_layers(network)
    network.network_name, network.layers = name, layers
    if zero_init_residual and not fused:
        _zero_last_scales(network)
    return network


def create_network(config: Config, fused: bool = False, kernels: KernelLibrary | None = None) -> nn.Cell:
    """The network that ``config`` describes, its random weights drawn from the seed."""
    mindspore.set_seed(config.seed)
    return build_model(config.network, config.num_classes, config.block, fused=fused, gamma_init=config.gamma_init,
                       image_size=config.image_size, dropout=config.dropout, sync_bn=config.sync_bn, weight_init=config.weight_init,
                       zero_init_residual=config.zero_init_residual, kernels=kernels, bfloat16=config.precision != "O0")


def _zero_last_scales(network: nn.Cell) -> None:
    """Raises UserError for a network without residual branches that end in a batch norm."""
    ends = [cell.branch_end for _, cell in network.cells_and_names() if hasattr(cell, "branch_end")]
    if not ends:
        raise UserError(f"zero_init_residual=1: {network.network_name} has no residual branches that end in a batch norm")
    for end in ends:
        for parameter in end.get_parameters():
            if parameter.name.endswith("gamma"):
                parameter.set_data(Tensor(np.zeros(parameter.shape, np.float32)))
