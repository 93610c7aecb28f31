"""Averages gradients by MPI in their own memory, for CPU."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
from mindspore import Parameter, Tensor

from src.cli.config import Config
from src.distributed.allreduce import COMPRESSIONS, Compression
from src.distributed.communicator import Communicator
from src.distributed.overlap import OverlappedAllReduce, ReducedGradients
from src.kernels.library import ReadyGradients


class HostReducer:
    """MPI on the tensors' own memory: on CPU asnumpy() is that memory, and writable.

    Args:
        overlap: averages gradients while others are computed; None waits for all of them.
    """

    def __init__(
        self,
        communicator: Communicator,
        compression: Compression | None,
        overlap: OverlappedAllReduce | None = None,
    ) -> None:
        self._communicator, self._compression = communicator, compression
        self._overlap = overlap

    @classmethod
    def of(
        cls, config: Config, communicator: Communicator, ready_gradients: ReadyGradients | None
    ) -> "HostReducer":
        """The reducer for ``config``. It overlaps only if the ranks are on several hosts."""
        compression = COMPRESSIONS[config.gradient_compression]
        overlap = None
        one_pass = config.accumulation_steps == 1
        if ready_gradients is not None and communicator.has_several_hosts and one_pass:
            overlap = OverlappedAllReduce(ready_gradients, communicator, compression)
        return cls(communicator, compression, overlap)

    def backward(self) -> AbstractContextManager[None]:
        return nullcontext() if self._overlap is None else self._overlap.backward()

    def add(self, total: list[np.ndarray] | None, gradients: Sequence[Tensor]) -> list[np.ndarray]:
        arrays = [gradient.asnumpy() for gradient in gradients]
        for array, other in zip(arrays, total or ()):
            array += other
        return arrays

    def reduce(
        self, total: list[np.ndarray], micro_steps: int, statistics: Sequence[Parameter]
    ) -> tuple[list[np.ndarray], ReducedGradients | None]:
        if micro_steps > 1:
            for array in total:
                array *= np.float32(1 / micro_steps)
        memory = [parameter.asnumpy() for parameter in statistics]
        if self._overlap is not None:
            return total, self._overlap.reduce(total, memory)
        if self._compression is None:
            self._communicator.all_reduce_mean_(total + memory)
        else:
            self._communicator.all_reduce_mean_(total, self._compression)
            self._communicator.all_reduce_mean_(memory)
        return total, None

    def broadcast(self, parameters: Sequence[Parameter]) -> None:
        self._communicator.broadcast_([parameter.asnumpy() for parameter in parameters])
