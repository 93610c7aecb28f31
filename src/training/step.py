"""One optimizer step: forward and backward as a graph, then the means over ranks, then the update. The same on every device."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import mindspore
import mindspore.amp
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from src.dataset.batches import Batch
from src.kernels.cells import updated_statistics
from src.parallel.communicator import Communicator
from src.training.convolutions import speed_up_gradients
from src.training.dropout import DropoutMasks
from src.training.graph_cache import GraphCache
from src.training.loss_scale import LossScale
from src.training.optimizers import Optimizer, create_optimizer
from src.training.reducers import Reducer, create_reducer
from src.utils.config import Config

Masks = Callable[[int, int], tuple[Tensor, ...]]


@dataclass(frozen=True)
class StepResult:
    """What one step did on this rank.

    Attributes:
        loss: mean over the rank's images.
        skipped: whether gradients overflowed under loss scaling, so that weights and optimizer state stayed as they were.
        nonfinite_parameter: name of the first parameter whose gradient is not finite, or None.
        seconds: duration of each part: forward_backward, allreduce, optimizer.
    """

    loss: float
    skipped: bool
    nonfinite_parameter: str | None
    seconds: dict[str, float]


class NetworkWithLoss(nn.Cell):
    """(uint8 images (N, S, S, 3), labels, dropout mask or None) -> mean cross-entropy with label smoothing, a float32 scalar.

    Labels are (N,) int32 or class probabilities (N, C) float32. Smoothing e spreads its mass over all classes (Szegedy et al.,
    arXiv:1512.00567, section 7), as in PyTorch: (1 - e) * (-log p[label]) + e * mean over classes of (-log p);
    ``Config.smoothing`` turns a share of the other classes into such an e.
    """

    def __init__(self, network: nn.Cell, normalizer: nn.Cell, smoothing: float) -> None:
        super().__init__(auto_prefix=False)
        self.network, self.normalizer, self.smoothing = network, normalizer, smoothing
        # nn.CrossEntropyLoss takes the logarithm apart, whose last bit on CPU depends on where its memory lies; the gradient of
        # log_softmax is reference code of oneDNN's.
        self.cross_entropy = ops.SparseSoftmaxCrossEntropyWithLogits()

    def construct(self, images: Tensor, labels: Tensor, kept: Tensor | None = None) -> Tensor:
        images = self.normalizer(images)
        logits = ops.cast(self.network(images) if kept is None else self.network(images, kept), mindspore.float32)
        classes = logits.shape[1]
        if labels.ndim == 1:
            labels = self._one_hot(labels, classes)
        targets = (1 - self.smoothing) * labels + self.smoothing / classes
        # -log p[c] is that of the likeliest class, which no exponential underflows for, and the difference of the two logits.
        likeliest = logits.argmax(1).astype(mindspore.int32)
        return self.cross_entropy(logits, likeliest) + ((self._one_hot(likeliest, classes) - targets) * logits).sum(1).mean()

    def _one_hot(self, labels: Tensor, classes: int) -> Tensor:
        return ops.one_hot(labels, classes, Tensor(1.0, mindspore.float32), Tensor(0.0, mindspore.float32))


class ForwardBackward(nn.Cell):
    """(images, labels, dropout mask or None) -> (loss, gradients of the parameters, in their order).

    In place of gradients, the kernels of ``src/kernels`` return new values for running statistics.
    """

    def __init__(self, network_with_loss: nn.Cell, parameters: Sequence[Parameter]) -> None:
        super().__init__(auto_prefix=False)
        # A child, so that set_train reaches the network: value_and_grad hides it from the Cell.
        self.network_with_loss = network_with_loss
        # As a member of a Cell this compiles to one forward and one backward pass; calling the network for the loss
        # beside GradOperation for the gradients runs the forward pass twice.
        self.value_and_grad = mindspore.value_and_grad(network_with_loss, None, ParameterTuple(parameters))

    def construct(self, images: Tensor, labels: Tensor, kept: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        if kept is None:
            return self.value_and_grad(images, labels)
        return self.value_and_grad(images, labels, kept)


class ScaledForwardBackward(nn.Cell):
    """(loss scale, images, labels, dropout mask or None) -> (loss, gradients times the loss scale)."""

    def __init__(self, network_with_loss: nn.Cell, parameters: Sequence[Parameter]) -> None:
        super().__init__(auto_prefix=False)
        self.scaled_loss = _ScaledLoss(network_with_loss)
        self.value_and_grad = mindspore.value_and_grad(self.scaled_loss, None, ParameterTuple(parameters))

    def construct(self, loss_scale: Tensor, images: Tensor, labels: Tensor,
                  kept: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        if kept is None:
            loss, gradients = self.value_and_grad(loss_scale, images, labels)
        else:
            loss, gradients = self.value_and_grad(loss_scale, images, labels, kept)
        return loss / loss_scale, gradients


class TrainStep:
    """Called with the forward batches of a step; leaves the same weights, optimizer state and statistics on every rank.

    Args:
        forward_backward: a ForwardBackward, or a ScaledForwardBackward if ``loss_scale`` is active.
        statistics: running means and variances, which are averaged over ranks.
        masks: (step, forward batch) -> the further inputs of the network.
        compile_with: called with (cell, inputs) before the first pass, to take its graph from a cache; None compiles.
        updated: those of the statistics whose new values ``forward_backward`` returns behind the gradients.
    """

    def __init__(self, forward_backward: nn.Cell, optimizer: Optimizer, reducer: Reducer, statistics: Sequence[Parameter],
                 masks: Masks, loss_scale: LossScale, compile_with: Callable[[nn.Cell, tuple[Tensor, ...]], object] | None = None,
                 updated: Sequence[Parameter] = ()) -> None:
        self._forward_backward = forward_backward.set_train(True)
        self.optimizer, self.reducer, self.loss_scale = optimizer, reducer, loss_scale
        self._statistics, self._updated = list(statistics), list(updated)
        self._masks, self._compile_with = masks, compile_with

    def __call__(self, batches: Iterable[Batch], lr: float, number: int) -> StepResult:
        """Train on the forward batches of step ``number``, counted from 0, with learning rate ``lr``."""
        started = time.perf_counter()
        losses, total = [], None
        for part, batch in enumerate(batches):
            with self.reducer.computing():
                loss, gradients = self._gradients(batch, number, part)
            losses.append(float(loss.asnumpy()))
            total = self.reducer.add(total, gradients)
        computed = time.perf_counter()
        total, arrivals = self.reducer.mean(total, len(losses), self._statistics)
        reduced = time.perf_counter()
        # An overflow on one rank is in the mean, so that every rank skips the same steps.
        nonfinite = self.optimizer(lr, total, self.loss_scale.value, arrivals)
        self.loss_scale.adjust(overflow=nonfinite is not None)
        waited = arrivals.waited if arrivals is not None else 0.0
        seconds = {"forward_backward": computed - started, "allreduce": reduced - computed + waited,
                   "optimizer": time.perf_counter() - reduced - waited}
        return StepResult(sum(losses) / len(losses), nonfinite is not None and self.loss_scale.active,
                          None if nonfinite is None else self.optimizer.parameters[nonfinite].name, seconds)

    def _gradients(self, batch: Batch, number: int, part: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        inputs = (Tensor(batch.images), Tensor(batch.labels), *self._masks(number, part))
        if self.loss_scale.active:
            inputs = (Tensor(self.loss_scale.value, mindspore.float32), *inputs)
        if self._compile_with is not None:
            self._compile_with(self._forward_backward, inputs)
            self._compile_with = None
        loss, found = self._forward_backward(*inputs)
        trainable = len(found) - len(self._updated)
        for parameter, value in zip(self._updated, found[trainable:]):
            parameter.asnumpy()[...] = value.asnumpy()
        return loss, found[:trainable]


class _ScaledLoss(nn.Cell):
    def __init__(self, network_with_loss: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.network_with_loss = network_with_loss

    def construct(self, loss_scale: Tensor, images: Tensor, labels: Tensor, kept: Tensor | None = None) -> Tensor:
        return self.network_with_loss(images, labels, kept) * loss_scale


def create_train_step(network: nn.Cell, config: Config, communicator: Communicator,
                      graph_cache: GraphCache | None = None) -> TrainStep:
    """The train step of ``network`` for the device of ``config``.

    Args:
        graph_cache: takes the compiled graph of an earlier run; None compiles it.
    """
    masks = dropout_masks(network, config, communicator)
    if config.device_target == "CPU":
        speed_up_gradients(network)
    layers, normalizer = network.layers, network.layers.input_normalizer(config.mean, config.std)
    if config.device_target != "CPU" and config.precision != "O0":
        network = mindspore.amp.auto_mixed_precision(network, config.precision)
    network_with_loss = NetworkWithLoss(network, normalizer, config.smoothing)
    parameters, loss_scale = network.trainable_params(), LossScale.of(config)
    updated = updated_statistics(network)
    forward_backward = (ScaledForwardBackward if loss_scale.active else ForwardBackward)(network_with_loss, [*parameters, *updated])
    compile_with = partial(graph_cache.compile, config=config, layers=repr(layers)) if graph_cache is not None else None
    return TrainStep(forward_backward, create_optimizer(config, parameters), create_reducer(config, communicator, layers.announcements()),
                     running_statistics(network), masks, loss_scale, compile_with, updated)


def dropout_masks(network: nn.Cell, config: Config, communicator: Communicator) -> Masks:
    """A function of (step, forward batch of the step): the further inputs of the network, a mask if it has dropout."""
    width = getattr(network, "dropout_width", 0)
    if not width:
        return lambda step, part: ()
    masks = DropoutMasks(width, config, communicator.rank, communicator.size)
    return lambda step, part: (masks(step, part),)


def running_statistics(network: nn.Cell) -> list[Parameter]:
    """The running means and variances of a network's batch norms."""
    return [p for p in network.get_parameters() if p.name.endswith(("moving_mean", "moving_variance"))]
