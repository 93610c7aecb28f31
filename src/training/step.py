"""One optimizer step: forward and backward as a graph, the reduction over ranks, the update.

Here for CPU, where reduction and update work in the gradients' own memory; device_step.py has the
step for GPU and Ascend.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import mindspore
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn

from src.cli.config import Config
from src.dataset.batches import Batch, micro_batch_size
from src.distributed.communicator import Communicator
from src.distributed.host_reducer import HostReducer
from src.models.layers import ImageClassifier
from src.models.weights import is_classifier
from src.training.optimizers import HostOptimizer

# (step, micro-step) -> the further inputs of the network.
ExtraInputs = Callable[[int, int], tuple[Tensor, ...]]
_DROPOUT_BITS = 16
_STEPS_TO_DOUBLE = 2000
_MAX_SCALE = 2.0**24


@dataclass(frozen=True)
class StepResult:
    """What one step did on this rank.

    Attributes:
        loss: mean over the rank's images.
        skipped: whether gradients overflowed under loss scaling, so that nothing was updated.
        nonfinite_parameter: name of the first parameter whose gradient is not finite, or None.
        seconds: duration of each part: forward_backward, allreduce, optimizer.
    """

    loss: float
    skipped: bool
    nonfinite_parameter: str | None
    seconds: dict[str, float]


class TrainStep:
    """Called with the micro-batches of a step; leaves all ranks with the same weights and state.

    While the backbone is frozen, only the classifier's gradients are computed.

    Args:
        statistics: running means and variances, which are averaged over ranks.
        extra_inputs: gives the network its dropout masks.
        compile_graph: called with (cell, inputs) before the first pass, to load the graph from a
            cache; None compiles it.
        kernel_statistics: the running statistics whose new values the backward pass returns
            instead of gradients.
    """

    def __init__(
        self,
        network_with_loss: "NetworkWithLoss",
        optimizer: HostOptimizer,
        reducer: HostReducer,
        statistics: Sequence[Parameter],
        extra_inputs: ExtraInputs,
        compile_graph: Callable[[nn.Cell, tuple[Tensor, ...]], object] | None = None,
        kernel_statistics: Sequence[Parameter] = (),
    ) -> None:
        self._network = network_with_loss.network
        parameters = [*optimizer.parameters, *kernel_statistics]
        self._forward_backward = ForwardBackward(network_with_loss, parameters).set_train(True)
        classifier = [p for p in optimizer.parameters if is_classifier(p.name)]
        self._classifier_only = ForwardBackward(network_with_loss, classifier).set_train(True)
        self.optimizer, self.reducer = optimizer, reducer
        self._classifier_reducer = reducer.without_overlap()
        # The range of bfloat16 is that of float32: nothing needs to be scaled.
        self.grad_scaler = GradScaler()
        self._statistics, self._kernel_statistics = list(statistics), list(kernel_statistics)
        self._extra_inputs, self._compile_graph = extra_inputs, compile_graph

    def __call__(self, micro_batches: Iterable[Batch], lr: float, step: int) -> StepResult:
        """Train on the micro-batches of ``step``, counted from 0, with learning rate ``lr``."""
        started = time.perf_counter()
        losses: list[float] = []
        gradients: Any = None
        frozen = self.optimizer.backbone_frozen
        reducer = self._classifier_reducer if frozen else self.reducer
        for micro_step, batch in enumerate(micro_batches):
            with reducer.backward():
                loss, new_gradients = self._compute_gradients(batch, step, micro_step)
            losses.append(float(loss.asnumpy()))
            gradients = reducer.add(gradients, new_gradients)
        computed = time.perf_counter()
        statistics = () if frozen else self._statistics
        gradients, arrivals = reducer.reduce(gradients, len(losses), statistics)
        reduced = time.perf_counter()
        nonfinite = self.optimizer(lr, gradients, arrivals)
        waited = arrivals.waited if arrivals is not None else 0.0
        updated = time.perf_counter()
        name = None if nonfinite is None else self.optimizer.parameters[nonfinite].name
        return StepResult(
            loss=sum(losses) / len(losses),
            skipped=False,
            nonfinite_parameter=name,
            seconds={
                "forward_backward": computed - started,
                "allreduce": reduced - computed + waited,
                "optimizer": updated - reduced - waited,
            },
        )

    def broadcast(self, parameters: Sequence[Parameter]) -> None:
        """Replace each parameter, and the optimizer's state, by rank 0's."""
        self.reducer.broadcast([*parameters, *self.optimizer.state_parameters])

    def synchronize(self) -> None:
        """Nothing is left to do: each step averages the running statistics over ranks."""

    def _compute_gradients(
        self, batch: Batch, step: int, micro_step: int
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(loss, gradient of each parameter that is trained now)."""
        inputs = Tensor(batch.images), Tensor(batch.labels)
        if self.optimizer.backbone_frozen:
            # In inference mode nothing is dropped, so no mask is passed.
            with self._network.with_frozen_backbone():
                return self._classifier_only(*inputs)
        inputs += self._extra_inputs(step, micro_step)
        if self._compile_graph is not None:
            self._compile_graph(self._forward_backward, inputs)
            self._compile_graph = None
        loss, outputs = self._forward_backward(*inputs)
        trainable = len(outputs) - len(self._kernel_statistics)
        for parameter, value in zip(self._kernel_statistics, outputs[trainable:]):
            parameter.asnumpy()[...] = value.asnumpy()
        return loss, outputs[:trainable]


class NetworkWithLoss(nn.Cell):
    """(uint8 images (N, S, S, 3), targets, dropout mask or None) -> loss, a float32 scalar."""

    def __init__(self, network: nn.Cell, normalizer: nn.Cell, loss: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.network, self.normalizer, self.loss = network, normalizer, loss

    def construct(self, images: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        images = self.normalizer(images)
        logits = self.network(images) if mask is None else self.network(images, mask)
        return self.loss(logits.astype(mindspore.float32), targets)


class ForwardBackward(nn.Cell):
    """(images, targets, dropout mask or None) -> (loss, gradients of the parameters, in order).

    For running statistics, the kernels return new values instead of gradients
    (src/kernels/operations.py).
    """

    def __init__(self, network_with_loss: nn.Cell, parameters: Sequence[Parameter]) -> None:
        super().__init__(auto_prefix=False)
        # A child, so that set_train reaches the network: value_and_grad hides it from the Cell.
        self.network_with_loss = network_with_loss
        # As a member of a Cell this compiles to one forward and one backward pass. Calling the
        # network for the loss, next to GradOperation for the gradients, runs the forward pass
        # twice.
        self.value_and_grad = mindspore.value_and_grad(
            network_with_loss, None, ParameterTuple(parameters)
        )

    def construct(
        self, images: Tensor, targets: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if mask is None:
            return self.value_and_grad(images, targets)
        return self.value_and_grad(images, targets, mask)


@dataclass
class GradScaler:
    """Loss scaling for float16 gradients (Micikevicius et al., arXiv:1710.03740, section 3.2).

    The loss is multiplied by ``value`` before the backward pass, and the gradients are divided by
    it after. A step whose gradients are not all finite is skipped, and a dynamic scale is then
    halved; after 2,000 good steps it is doubled.

    Attributes:
        value: the scale of the next step; 1 if not active.
        dynamic: whether the scale adapts.
        active: whether losses are scaled at all.
        good_steps: number of steps without overflow since the scale changed.
    """

    value: float = 1.0
    dynamic: bool = False
    active: bool = False
    good_steps: int = 0

    @classmethod
    def of(cls, config: Config) -> "GradScaler":
        """From the keys amp_level, loss_scale and is_dynamic_loss_scale."""
        if not config.scales_loss:
            return cls()
        return cls(config.loss_scale, config.is_dynamic_loss_scale, active=True)

    def update(self, overflow: bool) -> None:
        """Adapt the scale after a step."""
        self.good_steps = 0 if overflow else self.good_steps + 1
        if not self.dynamic:
            return
        if overflow:
            self.value = max(self.value / 2, 1.0)
        elif self.good_steps == _STEPS_TO_DOUBLE:
            self.value, self.good_steps = min(self.value * 2, _MAX_SCALE), 0

    def state(self) -> dict[str, Any]:
        """The state that a resumed run needs."""
        return {"value": self.value, "good_steps": self.good_steps}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what ``state`` returned."""
        self.value, self.good_steps = state["value"], state["good_steps"]


class DropoutMasks:
    """Dropout or stochastic-depth masks of one rank, a function of (seed, step, sample).

    Resumed runs, and runs on another number of ranks, therefore drop the same units. Sample k of a
    step's global batch draws from its own stream of a Philox generator (Salmon et al. 2011) keyed
    by (seed, step), whichever rank has it.

    Args:
        probabilities: with which each unit or residual branch of a sample is dropped.
        rank, size: the rank has every ``size``-th sample of the global batch, from ``rank`` on.
    """

    def __init__(
        self, probabilities: Sequence[float], config: Config, rank: int, size: int
    ) -> None:
        # A unit is dropped if its 16-bit draw is below its limit.
        limits = np.round(np.array(probabilities) * 2**_DROPOUT_BITS)
        self._limits = np.minimum(limits, 2**_DROPOUT_BITS - 1).astype(np.uint16)
        self._seed = config.seed
        self._batch, self._rank, self._size = micro_batch_size(config, size), rank, size

    def __call__(self, step: int, micro_step: int) -> Tensor:
        """(B, number of probabilities) uint8, 1 where a micro-batch of ``step`` keeps a unit."""
        width = len(self._limits)
        words = math.ceil(width * _DROPOUT_BITS / 64)
        # The top bits of the second key word separate these streams from those that augment
        # samples and shuffle epochs.
        key = np.array([self._seed, 2**62 + step], np.uint64)
        draws = np.empty((self._batch, words), np.uint64)
        for slot in range(self._batch):
            sample = (micro_step * self._batch + slot) * self._size + self._rank
            counter = np.array([0, sample, 0, 0], np.uint64)
            draws[slot] = np.random.Philox(key=key, counter=counter).random_raw(words)
        return Tensor((draws.view(np.uint16)[:, :width] >= self._limits).view(np.uint8))


def dropout_masks(
    network: ImageClassifier, config: Config, communicator: Communicator
) -> ExtraInputs:
    """A function that gives the network its mask, if it drops anything in training."""
    if not any(network.drop_probabilities):
        return lambda step, micro_step: ()
    masks = DropoutMasks(network.drop_probabilities, config, communicator.rank, communicator.size)
    return lambda step, micro_step: (masks(step, micro_step),)


def running_statistics(network: nn.Cell) -> list[Parameter]:
    """The running means and variances of a network's batch norms."""
    endings = ("moving_mean", "moving_variance")
    return [p for p in network.get_parameters() if p.name.endswith(endings)]
