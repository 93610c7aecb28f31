"""The batch that fits a machine and a data set, and the learning rate that fits the batch."""

from src.dataset.batches import global_batch
from src.models.networks import NETWORKS, network_name
from src.parallel.communicator import Communicator
from src.utils.config import Config
from src.utils.memory import available_bytes

_STEPS_PER_EPOCH = 10
# Of fewer images on a rank batch norm sees too little, whatever the number of steps.
_LEAST_IMAGES = 8
# Share of the memory that is free when a training begins.
_MEMORY_SHARE = 0.6
# Bytes a process needs before it has a network: MindSpore itself and its compiled graph.
_BASE_BYTES = 0.7e9
# A weight, its gradient, its momentum and what reduction and optimizer keep of it; an activation, its gradient and work space.
# ResNeXt-50 takes 4.6 bytes per activation with the kernels of src/kernels, 7 with MindSpore's.
_BYTES_PER_PARAMETER, _BYTES_PER_ACTIVATION = 20, 8


def fit_batch(config: Config, images: int, communicator: Communicator) -> Config:
    """``config`` with a batch that the machines hold and that makes 10 steps an epoch of so many ``images``, if ``fit_batch`` asks for it,
    and with the learning rate in proportion, if it has an ``lr_batch_size`` (Goyal et al., arXiv:1706.02677, section 2.1).

    Every rank calls it. The result has neither key any more: what is recorded is what was computed with.
    """
    forward = communicator.size * config.accumulation_steps
    if config.fit_batch:
        # Ranks that do not divide the batch take a little less each.
        share = max((config.global_batch_size or config.per_batch_size * forward) // forward, 1)
        held = min(communicator.gather(_images_that_memory_holds(config, communicator.local_size)))
        while share > 1 and (share > held or (share > _LEAST_IMAGES and images // (share * forward) < _STEPS_PER_EPOCH)):
            share //= 2
        while share > 1 and images < share * forward:
            share //= 2
        batch = share * forward
    else:
        batch = global_batch(config, communicator.size)
    scale = batch / config.lr_batch_size if config.lr_batch_size else 1.0
    return config.model_copy(update={"fit_batch": False, "lr_batch_size": 0, "lr": config.lr * scale, "eta_min": config.eta_min * scale,
                                     **({"global_batch_size": batch} if config.fit_batch else {})})


def training_bytes(config: Config, batch: int) -> float:
    """About how many bytes one rank needs to train on ``batch`` images at a time; 0 if nobody has counted the network."""
    network = NETWORKS[network_name(config.network)]
    if network.size is None:
        return 0.0
    pixels = (config.image_size / network.image_size) ** 2
    # Three branches in place of one.
    blocks = 1.0 if config.block == "base" else 3.0
    return (_BASE_BYTES + _BYTES_PER_PARAMETER * blocks * network.size.parameters
            + _BYTES_PER_ACTIVATION * blocks * pixels * network.size.activations * batch)


def _images_that_memory_holds(config: Config, ranks: int) -> float:
    """Images of one forward pass of each of the ``ranks`` of this machine. A device's memory is not asked: no limit there."""
    fixed = training_bytes(config, 0)
    of_image = training_bytes(config, 1) - fixed
    if config.device_target != "CPU" or not of_image:
        return float("inf")
    return (_MEMORY_SHARE * available_bytes() / ranks - fixed) / of_image
