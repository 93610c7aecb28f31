"""An exponential moving average of a network's weights and running statistics."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from mindspore import Parameter, Tensor, nn

from src.models.weight_files import AVERAGE_PREFIX


class WeightAverage:
    """average <- d average + (1 - d) weights after each update, on CPU.

    d is ``decay``, but at update t, counted from 1, at most (1 + t) / (10 + t): the weights of the
    first steps are forgotten sooner (as in TensorFlow's ExponentialMovingAverage). Running
    statistics are averaged like weights (as in timm's ModelEma).

    Attributes:
        parameters: the averages, which a checkpoint holds, named ``ema.NAME``.
    """

    def __init__(self, network: nn.Cell, decay: float) -> None:
        self._decay, self._weights = decay, list(network.get_parameters())
        self.parameters = [
            Parameter(
                Tensor(weight.asnumpy().copy()),
                name=f"{AVERAGE_PREFIX}{weight.name}",
                requires_grad=False,
            )
            for weight in self._weights
        ]

    def start(self) -> None:
        """Initialise the averages with the current weights."""
        for average, weight in self._pairs():
            average[...] = weight

    def update(self, updates: int) -> None:
        """Update the averages with the weights after update number ``updates``, counted from 1."""
        decay = np.float32(min(self._decay, (1 + updates) / (10 + updates)))
        for average, weight in self._pairs():
            average += (1 - decay) * (weight - average)

    @contextmanager
    def in_network(self) -> Iterator[None]:
        """A context in which the network holds the averages."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def move_to_network(self) -> None:
        """Copy the averages into the network."""
        for average, weight in self._pairs():
            weight[...] = average

    def _exchange(self) -> None:
        for average, weight in self._pairs():
            kept = weight.copy()
            weight[...] = average
            average[...] = kept

    def _pairs(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        # On CPU asnumpy() is the parameter's own memory; loading a parameter replaces it.
        for average, weight in zip(self.parameters, self._weights):
            yield average.asnumpy(), weight.asnumpy()
