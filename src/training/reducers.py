"""How the gradients and running statistics of all ranks become their means, between the graphs of a step."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
from mindspore import Parameter, Tensor, ops

from src.kernels.announcements import Announcements
from src.parallel.communicator import Communicator
from src.parallel.compression import COMPRESSIONS, Compression
from src.training.overlap import Arrivals, OverlappedMeans
from src.utils.config import Config


class Reducer(Protocol):
    """Takes the gradients as the forward and backward pass returns them; returns them as the optimizer takes them."""

    def computing(self) -> AbstractContextManager[None]:
        """The time in which the last forward and backward pass before ``mean`` runs."""

    def add(self, total: Any, gradients: Sequence[Tensor]) -> Any:
        """The sum of ``total``, an earlier result or None, and ``gradients``."""

    def mean(self, total: Any, parts: int, statistics: Sequence[Parameter]) -> tuple[Any, Arrivals | None]:
        """Means over ranks and over the ``parts`` that were added; ``statistics`` are replaced by their means over ranks.

        With Arrivals, the means are there only as those say.
        """

    def broadcast(self, parameters: Sequence[Parameter]) -> None:
        """Replace each parameter by rank 0's."""


class HostReducer:
    """MPI on the tensors' own memory, for CPU, where asnumpy() is zero-copy and writable.

    Args:
        overlap: averages gradients while others are computed; None waits for all of them.
    """

    def __init__(self, communicator: Communicator, compression: Compression | None, overlap: OverlappedMeans | None = None) -> None:
        self._communicator, self._compression, self._overlap = communicator, compression, overlap

    def computing(self) -> AbstractContextManager[None]:
        return nullcontext() if self._overlap is None else self._overlap.computing()

    def add(self, total: list[np.ndarray] | None, gradients: Sequence[Tensor]) -> list[np.ndarray]:
        arrays = [gradient.asnumpy() for gradient in gradients]
        for array, other in zip(arrays, total or ()):
            array += other
        return arrays

    def mean(self, total: list[np.ndarray], parts: int, statistics: Sequence[Parameter]) -> tuple[list[np.ndarray], Arrivals | None]:
        if parts > 1:
            for array in total:
                array *= np.float32(1 / parts)
        memory = [parameter.asnumpy() for parameter in statistics]
        if self._overlap is not None:
            return total, self._overlap.mean(total, memory)
        if self._compression is None:
            self._communicator.mean_(total + memory)
        else:
            self._communicator.mean_(total, self._compression)
            self._communicator.mean_(memory)
        return total, None

    def broadcast(self, parameters: Sequence[Parameter]) -> None:
        self._communicator.broadcast_([parameter.asnumpy() for parameter in parameters])


class StagedReducer:
    """MPI for a device: tensors are copied to the host, averaged there and copied back."""

    def __init__(self, communicator: Communicator, compression: Compression | None) -> None:
        self._communicator, self._compression = communicator, compression

    def computing(self) -> AbstractContextManager[None]:
        return nullcontext()

    def add(self, total: list[Tensor] | None, gradients: Sequence[Tensor]) -> list[Tensor]:
        # Operations outside a Cell run one by one on the device.
        return list(gradients) if total is None else [a + b for a, b in zip(total, gradients)]

    def mean(self, total: list[Tensor], parts: int, statistics: Sequence[Parameter]) -> tuple[list[Tensor], Arrivals | None]:
        if self._communicator.size == 1 and parts == 1:
            return total, None
        arrays = [tensor.asnumpy().astype(np.float32) * np.float32(1 / parts) for tensor in total]
        memory = [parameter.asnumpy().copy() for parameter in statistics]
        self._communicator.mean_(arrays, self._compression)
        self._communicator.mean_(memory)
        for parameter, array in zip(statistics, memory):
            parameter.set_data(Tensor(array))
        return [Tensor(array) for array in arrays], None

    def broadcast(self, parameters: Sequence[Parameter]) -> None:
        if self._communicator.size > 1:
            for parameter in parameters:
                array = parameter.asnumpy().copy()
                self._communicator.broadcast_([array])
                parameter.set_data(Tensor(array))


class DeviceReducer(StagedReducer):
    """The device's own collective operations (NCCL, HCCL), called between graphs. Rank 0's parameters travel by MPI."""

    def mean(self, total: list[Tensor], parts: int, statistics: Sequence[Parameter]) -> tuple[list[Tensor], Arrivals | None]:
        if self._communicator.size == 1 and parts == 1:
            return total, None
        gradients = [self._sum(tensor) / (self._communicator.size * parts) for tensor in total]
        for parameter in statistics:
            parameter.set_data(self._sum(parameter) / self._communicator.size)
        return gradients, None

    def _sum(self, tensor: Tensor) -> Tensor:
        # Called outside a Cell, it runs by itself and not as part of a graph.
        return tensor if self._communicator.size == 1 else ops.AllReduce()(tensor)


def create_reducer(config: Config, communicator: Communicator, announcements: Announcements | None = None) -> Reducer:
    """The reducer for the device and the key ``reducer`` of ``config``.

    Args:
        announcements: of the kernels that compute the gradients, if they make any.
    """
    compression = COMPRESSIONS[config.gradient_compression]
    if config.device_target == "CPU":
        overlap = None
        if announcements is not None and communicator.has_several_hosts and config.accumulation_steps == 1:
            overlap = OverlappedMeans(announcements, communicator, compression)
        return HostReducer(communicator, compression, overlap)
    return (DeviceReducer if config.reducer != "mpi" else StagedReducer)(communicator, compression)


def uses_collectives(config: Config, communicator: Communicator) -> bool:
    """Whether the devices must be connected to each other before training."""
    return config.device_target != "CPU" and config.reducer != "mpi" and communicator.size > 1
