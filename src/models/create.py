"""Creates networks by name."""

import pkgutil

import mindspore
import numpy as np
from mindspore import Tensor, nn

from src.cli.config import Config
from src.kernels.layers import set_layer_names
from src.kernels.library import KernelLibrary
from src.models.kernel_layers import KernelLayers
from src.models.layers import (
    WEIGHT_INITS,
    ImageClassifier,
    LayerFactory,
    ResidualBlocks,
    set_parameter_names,
    use_float16,
)
from src.models.networks import NETWORKS, check_network, network_name
from src.utils.errors import UserError


def create_network(
    config: Config, kernels: KernelLibrary | None = None, fused: bool = False
) -> ImageClassifier:
    """The network that ``config`` describes; ``seed`` draws its initial weights.

    Args:
        kernels, fused: see ``create_model``.
    """
    mindspore.set_seed(config.seed)
    return create_model(
        config.network,
        config.num_classes,
        config.block,
        fused=fused,
        gamma_init=config.gamma_init,
        image_size=config.image_size,
        dropout=config.dropout,
        sync_bn=config.sync_bn,
        weight_init=config.weight_init,
        zero_init_residual=config.zero_init_residual,
        stochastic_depth=config.stochastic_depth,
        kernels=kernels,
        compute_type=config.compute_type,
    )


def create_model(
    name: str,
    num_classes: int,
    block: str = "base",
    *,
    fused: bool = False,
    gamma_init: float | None = None,
    image_size: int | None = None,
    dropout: float = 0.5,
    sync_bn: bool = False,
    weight_init: str = "kaiming_uniform",
    zero_init_residual: bool = False,
    stochastic_depth: float = 0.0,
    kernels: KernelLibrary | None = None,
    compute_type: str = "float32",
) -> ImageClassifier:
    """A network: (N, 3, image_size, image_size) float images -> (N, num_classes) logits.

    Args:
        name: a name in ``networks.NETWORKS`` or an alias.
        block: a name in ``blocks.BLOCKS``.
        fused: create the fused form of a network with blocks, as ``fuse`` returns it.
        gamma_init: initial scale of the batch norms in blocks.
        image_size: side of the images in pixels; None is the network's own.
        dropout: drop probability in training, for networks that have dropout.
        sync_bn: batch statistics over all ranks.
        weight_init: initial weights of plain convolutions, a name in ``layers.WEIGHT_INITS``.
        zero_init_residual: start the last scale of each residual branch at 0, so that each block
            starts as the identity (Goyal et al., arXiv:1706.02677, section 5.1).
        stochastic_depth: probability with which training drops the last residual branch; see
            ``LayerFactory.drop_probabilities``.
        kernels: kernels to compute with on CPU; None is MindSpore's own. Parameters are the same.
        compute_type: "float16": convolutions and dense layers compute in it, on devices;
            "bfloat16": with kernels, activations and their gradients are of that type.

    Raises:
        UserError: for an unknown name or block, or an image size or number of classes that the
            network cannot have.
    """
    check_network(name, image_size)
    if num_classes < 1:
        raise UserError(f"num_classes={num_classes}: a network has at least one class")
    name = network_name(name)
    entry = NETWORKS[name]
    init = WEIGHT_INITS[weight_init]
    layers = LayerFactory(block, fused, gamma_init, sync_bn, init, stochastic_depth)
    if kernels is not None:
        layers = KernelLayers(**vars(layers), library=kernels, bfloat16=compute_type == "bfloat16")
    build = pkgutil.resolve_name(entry.builder)
    network = build(
        num_classes,
        layers,
        image_size=image_size or entry.image_size,
        dropout=dropout,
        **entry.arguments,
    )
    network.network_name = name
    if compute_type == "float16":
        use_float16(network)
    has_branches = any(isinstance(cell, ResidualBlocks) for _, cell in network.cells_and_names())
    if stochastic_depth and not has_branches:
        raise UserError(
            f"stochastic_depth={stochastic_depth:g}: {name} cannot leave out branches; it is for "
            "ResNets"
        )
    set_parameter_names(network)
    set_layer_names(network)
    if zero_init_residual and not fused:
        _zero_last_scales(network)
    return network


def _zero_last_scales(network: ImageClassifier) -> None:
    """Raises UserError if no residual branch of the network ends in a batch norm."""
    cells: list[nn.Cell] = [cell for _, cell in network.cells_and_names()]
    ends = [cell.branch_end for cell in cells if hasattr(cell, "branch_end")]
    if not ends:
        raise UserError(
            f"zero_init_residual=1: no residual branch of {network.network_name} ends in a "
            "batch norm"
        )
    for end in ends:
        for parameter in end.get_parameters():
            if parameter.name.endswith("gamma"):
                parameter.set_data(Tensor(np.zeros(parameter.shape, np.float32)))
