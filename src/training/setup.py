"""The network of a run, from its configuration."""

import mindspore

from src.models import build_model
from src.models.weights import load_weights


def create_network(config, fused=False):
    """The network that ``config`` describes, with seeded weights, or those of checkpoint_file_path in training."""
    mindspore.set_seed(config.seed)
    return build_model(config.network, config.num_classes, config.block, fused=fused, gamma_init=config.gamma_init,
                       image_size=config.image_size, dropout=config.dropout, sync_bn=config.sync_bn)


def start_from_checkpoint(network, config):
    """Load the weights of checkpoint_file_path; returns the names that were left out."""
    return load_weights(network, config.checkpoint_file_path, config.allow_head_mismatch)
