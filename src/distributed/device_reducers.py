"""Averages gradients on GPU and Ascend: by NCCL or HCCL in the graph, or by MPI on the host."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from src.cli.config import Config
from src.distributed.allreduce import COMPRESSIONS
from src.distributed.communicator import Communicator


class DeviceReducer:
    """Base class of the reducers for devices. Gradients are flat float32 arrays.

    A subclass has a collective for the graph of the step, or overrides ``reduce``, which is called
    between the graph of the gradients and that of the update.

    Attributes:
        collective: a Cell, gradient -> its mean over ranks; None if the graph averages nothing.
        is_in_graph: whether the graph does the whole reduction, so that ``reduce`` does nothing.
    """

    is_in_graph: ClassVar[bool] = True

    def __init__(self, config: Config, communicator: Communicator) -> None:
        self._communicator = communicator
        self._compression = COMPRESSIONS[config.gradient_compression]
        self.collective: nn.Cell | None = None

    def reduce(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """The mean over ranks of each gradient."""
        return list(gradients)

    def broadcast(self, parameters: Sequence[Parameter]) -> None:
        """Replace each parameter by rank 0's, by MPI."""
        if self._communicator.size > 1:
            for parameter in parameters:
                array = parameter.asnumpy().copy()
                self._communicator.broadcast_([array])
                parameter.set_data(Tensor(array))


class CollectiveReducer(DeviceReducer):
    """One AllReduce of NCCL or HCCL, in the graph of the step."""

    def __init__(self, config: Config, communicator: Communicator) -> None:
        super().__init__(config, communicator)
        if communicator.size > 1:
            self.collective = AllReduceMean(communicator.size)


class HostStagedReducer(DeviceReducer):
    """Copies gradients to the host, averages them there by MPI, and copies them back."""

    is_in_graph = False

    def reduce(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        if self._communicator.size == 1:
            return list(gradients)
        arrays = [gradient.asnumpy().copy() for gradient in gradients]
        self._communicator.all_reduce_mean_(arrays, self._compression)
        return [Tensor(np.asarray(array, np.float32)) for array in arrays]


class AllReduceMean(nn.Cell):
    """A tensor -> its mean over ``size`` ranks."""

    def __init__(self, size: int) -> None:
        super().__init__(auto_prefix=False)
        self.size, self.all_reduce = size, ops.AllReduce()

    def construct(self, gradient: Tensor) -> Tensor:
        return self.all_reduce(gradient) / self.size
