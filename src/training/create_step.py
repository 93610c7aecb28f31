"""Creates the training step for the device of the configuration."""

from functools import partial
from typing import Any

from src.cli.config import Config
from src.distributed.communicator import Communicator
from src.distributed.host_reducer import HostReducer
from src.distributed.reducers import create_device_reducer
from src.kernels.layers import kernel_statistics
from src.models.layers import ImageClassifier
from src.training.conv_gradients import replace_conv_gradients
from src.training.device_optimizer import DeviceOptimizer
from src.training.device_step import DeviceTrainStep
from src.training.graph_cache import GraphCache
from src.training.losses import create_loss
from src.training.optimizers import HostOptimizer
from src.training.step import (
    ForwardBackward,
    GradScaler,
    NetworkWithLoss,
    TrainStep,
    dropout_masks,
    running_statistics,
)
from src.training.update_rules import create_update_rule


def create_train_step(
    network: ImageClassifier,
    config: Config,
    communicator: Communicator,
    graph_cache: GraphCache | None = None,
) -> TrainStep | DeviceTrainStep:
    """The train step of ``network`` for the device of ``config``.

    Args:
        graph_cache: takes the compiled graph of an earlier run; None compiles it.
    """
    normalizer = network.layers.input_normalizer(config.mean, config.std)
    network_with_loss = NetworkWithLoss(network, normalizer, create_loss(config))
    parameters, rule = network.trainable_params(), create_update_rule(config)
    masks = dropout_masks(network, config, communicator)
    if config.device_target != "CPU":
        return DeviceTrainStep(
            network_with_loss,
            DeviceOptimizer(parameters, rule, config),
            create_device_reducer(config, communicator),
            communicator,
            running_statistics(network),
            masks,
            GradScaler.of(config),
        )
    replace_conv_gradients(network)
    statistics = kernel_statistics(network)
    compile_graph: Any = None
    if graph_cache is not None:
        compile_graph = partial(graph_cache.compile, config=config, layers=repr(network.layers))
    return TrainStep(
        ForwardBackward(network_with_loss, [*parameters, *statistics]),
        HostOptimizer(parameters, rule, config),
        HostReducer.of(config, communicator, network.layers.ready_gradients()),
        running_statistics(network),
        masks,
        compile_graph,
        statistics,
    )
