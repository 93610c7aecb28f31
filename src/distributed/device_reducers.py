"""Averages gradients on GPU and Ascend: through the host by MPI, or by NCCL and HCCL."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
from mindspore import Parameter, Tensor, ops

from src.cli.config import Config
from src.distributed.allreduce import COMPRESSIONS
from src.distributed.communicator import Communicator


class HostStagedReducer:
    """Copies tensors to the host, averages them there by MPI, and copies them back."""

    def __init__(self, config: Config, communicator: Communicator) -> None:
        self._communicator = communicator
        self._compression = COMPRESSIONS[config.gradient_compression]

    def backward(self) -> AbstractContextManager[None]:
        return nullcontext()

    def add(self, total: list[Tensor] | None, gradients: Sequence[Tensor]) -> list[Tensor]:
        # Operations outside a Cell run one by one on the device.
        return list(gradients) if total is None else [a + b for a, b in zip(total, gradients)]

    def reduce(
        self, total: list[Tensor], micro_steps: int, statistics: Sequence[Parameter]
    ) -> tuple[list[Tensor], None]:
        if self._communicator.size == 1 and micro_steps == 1:
            return total, None
        scale = np.float32(1 / micro_steps)
        arrays = [tensor.asnumpy().astype(np.float32) * scale for tensor in total]
        memory = [parameter.asnumpy().copy() for parameter in statistics]
        self._communicator.all_reduce_mean_(arrays, self._compression)
        self._communicator.all_reduce_mean_(memory)
        for parameter, array in zip(statistics, memory):
            parameter.set_data(Tensor(array))
        return [Tensor(array) for array in arrays], None

    def broadcast(self, parameters: Sequence[Parameter]) -> None:
        if self._communicator.size > 1:
            for parameter in parameters:
                array = parameter.asnumpy().copy()
                self._communicator.broadcast_([array])
                parameter.set_data(Tensor(array))


class DeviceReducer(HostStagedReducer):
    """NCCL's or HCCL's AllReduce between graphs. Rank 0's parameters still travel by MPI."""

    def reduce(
        self, total: list[Tensor], micro_steps: int, statistics: Sequence[Parameter]
    ) -> tuple[list[Tensor], None]:
        size = self._communicator.size
        if size == 1 and micro_steps == 1:
            return total, None
        gradients = [self._all_reduce(tensor) / (size * micro_steps) for tensor in total]
        for parameter in statistics:
            parameter.set_data(self._all_reduce(parameter) / size)
        return gradients, None

    def _all_reduce(self, tensor: Tensor) -> Tensor:
        # Outside a Cell it runs by itself, not as part of a graph.
        return tensor if self._communicator.size == 1 else ops.AllReduce()(tensor)
