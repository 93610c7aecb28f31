"""A training step on GPU or Ascend as one graph: forward and backward pass, reduction, update."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mindspore
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn

from src.dataset.batches import Batch
from src.distributed.communicator import Communicator
from src.distributed.device_reducers import DeviceReducer
from src.training.device_optimizer import DeviceOptimizer, FlatUpdate, flat_gradient
from src.training.step import ExtraInputs, GradScaler, NetworkWithLoss, StepResult


class DeviceTrainStep:
    """``TrainStep`` for devices.

    With one micro-batch per step and the device's own collectives, a step is a single graph.
    Otherwise the gradients of a micro-batch are one graph, and the update is another.

    Running statistics are averaged over ranks by ``synchronize``, not in every step. They are
    running means, so the result is the same.
    """

    def __init__(
        self,
        network_with_loss: NetworkWithLoss,
        optimizer: DeviceOptimizer,
        reducer: DeviceReducer,
        communicator: Communicator,
        statistics: Sequence[Parameter],
        extra_inputs: ExtraInputs,
        grad_scaler: GradScaler,
    ) -> None:
        self.optimizer, self.reducer, self.grad_scaler = optimizer, reducer, grad_scaler
        self._communicator, self._statistics = communicator, list(statistics)
        self._extra_inputs = extra_inputs
        self._network = network_with_loss.network
        self._update = optimizer.create_update(reducer.collective)
        self._whole = _Graphs.of(network_with_loss, optimizer, self._update)
        self._classifier_only = _Graphs.of(network_with_loss, optimizer, self._update)
        self._is_synchronized = True

    def __call__(self, micro_batches: Iterable[Batch], lr: float, step: int) -> StepResult:
        """Train on the micro-batches of ``step``, counted from 0, with learning rate ``lr``."""
        started = time.perf_counter()
        self._is_synchronized = False
        # In inference mode, as the backbone is while it is frozen, nothing is dropped.
        drops = not self.optimizer.backbone_frozen
        inputs = [
            (
                Tensor(batch.images),
                Tensor(batch.labels),
                *(self._extra_inputs(step, micro_step) if drops else ()),
            )
            for micro_step, batch in enumerate(micro_batches)
        ]
        settings = self.optimizer.settings(lr, self.grad_scaler.value)
        scale = Tensor(self.grad_scaler.value, mindspore.float32)
        reduced = 0.0
        with self._graphs() as graphs:
            if len(inputs) == 1 and self.reducer.is_in_graph:
                loss, finite = graphs.step(settings, scale, *inputs[0])
                losses = [loss]
            else:
                losses, flats = _accumulate(graphs.gradients, scale, inputs)
                before = time.perf_counter()
                flats = self.reducer.reduce(flats)
                reduced = time.perf_counter() - before
                finite = self._update(settings, *flats)
        mean_loss = sum(float(loss.asnumpy()) for loss in losses) / len(losses)
        is_finite = bool(finite.asnumpy())
        if is_finite:
            self.optimizer.count_update()
        self.grad_scaler.update(overflow=not is_finite)
        is_skipped = not is_finite and self.grad_scaler.active
        name = None if is_finite or is_skipped else self._find_nonfinite(scale, inputs)
        seconds = time.perf_counter() - started - reduced
        return StepResult(
            loss=mean_loss,
            skipped=is_skipped,
            nonfinite_parameter=name,
            seconds={"forward_backward": seconds, "allreduce": reduced, "optimizer": 0.0},
        )

    def broadcast(self, parameters: Sequence[Parameter]) -> None:
        """Replace each parameter, and the optimizer's state, by rank 0's."""
        self.reducer.broadcast([*parameters, *self.optimizer.state_parameters])
        self.optimizer.load()

    def synchronize(self) -> None:
        """Bring parameters and optimizer state up to date. Every rank calls it.

        The running statistics are averaged over ranks, and the state is copied from the device.
        """
        if self._is_synchronized:
            return
        self._is_synchronized = True
        self.optimizer.store_states()
        if self._communicator.size == 1:
            return
        arrays = [parameter.asnumpy().copy() for parameter in self._statistics]
        self._communicator.all_reduce_mean_(arrays)
        for parameter, array in zip(self._statistics, arrays):
            parameter.set_data(Tensor(array))

    @contextmanager
    def _graphs(self) -> Iterator["_Graphs"]:
        """The graphs for the next step, in a context in which they may be compiled."""
        if self.optimizer.backbone_frozen:
            with self._network.with_frozen_backbone():
                yield self._classifier_only
        else:
            yield self._whole

    def _find_nonfinite(self, scale: Tensor, inputs: Sequence[tuple[Tensor, ...]]) -> str:
        """Name of the first parameter whose gradient is not finite on some rank.

        The gradients are computed once more: nothing was updated.
        """
        with self._graphs() as graphs:
            _, flats = _accumulate(graphs.gradients, scale, inputs)
        index = self.optimizer.first_nonfinite([flat.asnumpy() for flat in flats])
        found = [i for i in self._communicator.all_gather(index) if i is not None]
        return self.optimizer.parameters[min(found, default=0)].name


def _accumulate(
    gradients: "FlatGradients", scale: Tensor, inputs: Sequence[tuple[Tensor, ...]]
) -> tuple[list[Tensor], list[Tensor]]:
    """(losses, mean flat gradients times the scale) of the micro-batches."""
    losses: list[Tensor] = []
    totals: list[Any] = []
    for of_one in inputs:
        loss, flats = gradients(scale, *of_one)
        losses.append(loss)
        totals = [a + b for a, b in zip(totals, flats)] if totals else list(flats)
    if len(inputs) > 1:
        totals = [total / len(inputs) for total in totals]
    return losses, totals


@dataclass(frozen=True)
class _Graphs:
    """The graphs of a step: that of the gradients, and that of the whole step."""

    gradients: "FlatGradients"
    step: "_WholeStep"

    @classmethod
    def of(
        cls, network_with_loss: nn.Cell, optimizer: DeviceOptimizer, update: FlatUpdate
    ) -> "_Graphs":
        gradients = FlatGradients(network_with_loss, optimizer.members)
        return cls(gradients, _WholeStep(gradients, update).set_train(True))


class FlatGradients(nn.Cell):
    """(loss scale, images, targets, dropout mask or None) -> (loss, flat gradients).

    The gradients are those of each group of parameters, times the scale.
    """

    def __init__(self, network_with_loss: nn.Cell, groups: Sequence[Sequence[Parameter]]) -> None:
        super().__init__(auto_prefix=False)
        self.scaled_loss = _ScaledLoss(network_with_loss)
        parameters = [parameter for group in groups for parameter in group]
        self.value_and_grad = mindspore.value_and_grad(
            self.scaled_loss, None, ParameterTuple(parameters)
        )
        ends = np.cumsum([len(group) for group in groups]).tolist()
        self.ranges = tuple(zip([0, *ends[:-1]], ends))

    def construct(
        self, loss_scale: Tensor, images: Tensor, targets: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if mask is None:
            loss, gradients = self.value_and_grad(loss_scale, images, targets)
        else:
            loss, gradients = self.value_and_grad(loss_scale, images, targets, mask)
        flats: tuple[Tensor, ...] = ()
        for start, end in self.ranges:
            flats = (*flats, flat_gradient(gradients[start:end]))
        return loss / loss_scale, flats


class _WholeStep(nn.Cell):
    """(settings, loss scale, images, targets, mask or None) -> (loss, whether it was updated)."""

    def __init__(self, gradients: FlatGradients, update: FlatUpdate) -> None:
        super().__init__(auto_prefix=False)
        self.gradients, self.update = gradients, update

    def construct(
        self,
        settings: Tensor,
        loss_scale: Tensor,
        images: Tensor,
        targets: Tensor,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        loss, flats = self.gradients(loss_scale, images, targets, mask)
        return loss, self.update(settings, *flats)


class _ScaledLoss(nn.Cell):
    def __init__(self, network_with_loss: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.network_with_loss = network_with_loss

    def construct(
        self, loss_scale: Tensor, images: Tensor, targets: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        return self.network_with_loss(images, targets, mask) * loss_scale
