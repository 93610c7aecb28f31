"""Creates the training step for the device of the configuration."""

from functools import partial
from typing import Any

from mindspore import Tensor, nn, ops

from src.cli.config import Config
from src.distributed.communicator import Communicator
from src.distributed.host_reducer import HostReducer
from src.distributed.reducers import create_device_reducer
from src.kernels.layers import conv_padding, kernel_statistics
from src.models.layers import ImageClassifier
from src.training.device_optimizer import DeviceOptimizer
from src.training.device_step import DeviceTrainStep
from src.training.graph_cache import GraphCache
from src.training.losses import create_loss
from src.training.optimizers import HostOptimizer
from src.training.step import (
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
    """The step that trains ``network``, with the loss, optimizer and reducer of ``config``.

    Args:
        graph_cache: keeps the compiled graph for later runs; None compiles it.
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
        network_with_loss,
        HostOptimizer(parameters, rule, config, communicator.broadcast_object),
        HostReducer.of(config, communicator, network.layers.ready_gradients()),
        running_statistics(network),
        masks,
        compile_graph,
        statistics,
    )


def replace_conv_gradients(network: nn.Cell) -> None:
    """Compute input gradients of some convolutions as forward convolutions, which are faster.

    For 1x1 and grouped convolutions with stride 1: the gradient of the input is a convolution with
    the kernel turned by 180 degrees, and input and output channels exchanged (Dumoulin and Visin,
    arXiv:1603.07285, section 4). On CPU MindSpore's forward kernels are faster than its kernels for
    gradients: a step of ResNeXt-50 takes 9 % less time. For dense 3x3 convolutions it would take
    2 % more (benchmarks/README.md). Parameters and results stay the same.
    """
    for _, cell in network.cells_and_names():
        if isinstance(cell, nn.Conv2d) and _fits(cell):
            cell.conv2d = _StrideOneConvolution(cell)


def _fits(conv: nn.Conv2d) -> bool:
    vertical, _, horizontal, _ = conv_padding(conv)
    reach = [dilation * (size - 1) for dilation, size in zip(conv.dilation, conv.kernel_size)]
    return (
        tuple(conv.stride) == (1, 1)
        and (tuple(conv.kernel_size) == (1, 1) or conv.group > 1)
        and vertical <= reach[0]
        and horizontal <= reach[1]
    )


class _StrideOneConvolution(nn.Cell):
    """(x, weight) -> convolution; takes the place of the primitive in an nn.Conv2d."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(auto_prefix=False)
        top, bottom, left, right = padding = conv_padding(conv)
        rows, columns = (
            dilation * (size - 1) for dilation, size in zip(conv.dilation, conv.kernel_size)
        )
        shape = {"pad_mode": "pad", "stride": 1, "dilation": conv.dilation, "group": conv.group}
        self.group, self.flips = conv.group, max(conv.kernel_size) > 1
        self.forward = ops.Conv2D(conv.out_channels, conv.kernel_size, pad=padding, **shape)
        self.input_gradient = ops.Conv2D(
            conv.in_channels,
            conv.kernel_size,
            pad=(rows - top, rows - bottom, columns - left, columns - right),
            **shape,
        )
        self.weight_gradient = ops.operations._grad_ops.Conv2DBackpropFilter(
            conv.out_channels, conv.kernel_size, pad=padding, pad_list=padding, **shape
        )
        self.reverse = ops.ReverseV2(axis=(2, 3))

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.forward(x, weight)

    def bprop(
        self, x: Tensor, weight: Tensor, out: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        return (
            self.input_gradient(gradient, self.transposed(weight)),
            self.weight_gradient(gradient, x, ops.shape(weight)),
        )

    def transposed(self, weight: Tensor) -> Tensor:
        """(O, I / groups, kh, kw) -> (I, O / groups, kh, kw), turned by 180 degrees."""
        outputs, inputs, height, width = weight.shape
        if self.group > 1:
            weight = ops.reshape(weight, (self.group, outputs // self.group, inputs, height, width))
            weight = ops.reshape(
                ops.transpose(weight, (0, 2, 1, 3, 4)),
                (self.group * inputs, outputs // self.group, height, width),
            )
        else:
            weight = ops.transpose(weight, (1, 0, 2, 3))
        return self.reverse(weight) if self.flips else weight
