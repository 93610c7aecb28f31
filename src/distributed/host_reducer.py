"""Averages gradients by MPI in their own memory, for CPU.

Between hosts the all-reduce overlaps with the backward pass and the optimizer update:

backward pass:   gradients become ready, last layer first         | done
sending thread:  all-reduces buckets of ready gradients           | the rest
optimizer:                                                        | updates reduced parameters
"""

import ctypes
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
from mindspore import Parameter, Tensor

from src.cli.config import Config
from src.distributed.allreduce import COMPRESSIONS, POLL_S, Compression, make_buckets
from src.distributed.communicator import Communicator
from src.kernels.library import ReadyGradient, ReadyGradients

# (name of the layer, index of the tensor in its kernel's call)
_Key = tuple[str, int]
# Wait for a ready gradient while nothing is being sent.
_IDLE_S = 0.02


class ReducedGradients:
    """Indices of gradients, in the order in which they have been averaged. Iterating blocks.

    Attributes:
        waited: seconds spent waiting.
    """

    def __init__(self, indices: Iterator[int]) -> None:
        self._indices, self.waited = indices, 0.0

    def __iter__(self) -> Iterator[int]:
        while True:
            started = time.perf_counter()
            index = next(self._indices, None)
            self.waited += time.perf_counter() - started
            if index is None:
                return
            yield index


class OverlappedAllReduce:
    """The first step records in which order gradients become ready; later steps send in that order.

    A gradient is averaged in its own memory, which MindSpore's graph returns as it is.
    """

    def __init__(
        self,
        ready_gradients: ReadyGradients,
        communicator: Communicator,
        compression: Compression | None,
    ) -> None:
        self._ready, self._communicator = ready_gradients, communicator
        self._compression = compression
        # Buckets in the order in which they are sent: [(key, index of the gradient)].
        self._plan: list[list[tuple[_Key, int]]] | None = None
        self._sizes: list[int] = []
        self._sender: _Sender | None = None

    @contextmanager
    def backward(self) -> Iterator[None]:
        """A context for the backward pass."""
        self._ready.begin()
        if self._plan is not None:
            self._sender = _Sender(
                self._ready, self._communicator, self._compression, self._plan, self._sizes
            )
            self._sender.start()
        try:
            yield
        finally:
            if self._sender is not None:
                self._sender.backward_is_done.set()

    def reduce(
        self, gradients: Sequence[np.ndarray], statistics: Sequence[np.ndarray]
    ) -> ReducedGradients:
        """Replace the gradients of the backward pass, and the statistics, by their means.

        All of them are complete when the result ends.
        """
        if self._sender is None:
            self._record_order(gradients)
            self._communicator.all_reduce_mean_(gradients, self._compression)
            self._communicator.all_reduce_mean_(statistics)
            return ReducedGradients(iter(range(len(gradients))))
        self._sender.send_rest(gradients, statistics)
        return ReducedGradients(self._arriving(self._sender))

    def _arriving(self, sender: "_Sender") -> Iterator[int]:
        while True:
            with self._communicator.waiting():
                index = sender.reduced.get()
            if index is None:
                break
            yield index
        self._ready.end()
        self._sender = None
        sender.join()
        if sender.failure is not None:
            raise sender.failure

    def _record_order(self, gradients: Sequence[np.ndarray]) -> None:
        ready: list[ReadyGradient] = []
        while more := self._ready.since(len(ready), 0.0):
            ready += more
        counts = Counter((gradient.layer, gradient.output) for gradient in ready)
        # Memory is reused: what became ready last is what the gradient's memory holds now.
        keys = {
            g.address: (g.layer, g.output)
            for g in ready
            if g.layer and counts[g.layer, g.output] == 1
        }
        order = {key: position for position, key in enumerate(keys.values())}
        plan = [
            (keys[array.ctypes.data], index)
            for index, array in enumerate(gradients)
            if array.ctypes.data in keys
        ]
        plan.sort(key=lambda pair: order[pair[0]])
        plans = self._communicator.all_gather(plan)
        self._sizes = [array.size for array in gradients]
        # Without the same gradients on every rank nothing is sent early.
        agreed = plans[0] if all(sorted(p) == sorted(plans[0]) for p in plans) else []
        buckets = make_buckets([gradients[index].nbytes for _, index in agreed])
        self._plan = [[agreed[position] for position in bucket] for bucket in buckets]


class _Sender(threading.Thread):
    """Sends the gradients of one step as they become ready, then the rest.

    Attributes:
        backward_is_done: to be set when the graph has ended.
        reduced: indices of gradients that have been averaged, then None.
        failure: the exception that ended the thread, or None.
    """

    def __init__(
        self,
        ready_gradients: ReadyGradients,
        communicator: Communicator,
        compression: Compression | None,
        plan: Sequence[Sequence[tuple[_Key, int]]],
        sizes: Sequence[int],
    ) -> None:
        super().__init__(daemon=True, name="gradients")
        self.backward_is_done = threading.Event()
        self.failure: BaseException | None = None
        self.reduced: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._ready, self._compression = ready_gradients, compression
        self._plan, self._sizes = plan, sizes
        self._pipeline = communicator.pipeline()
        self._addresses: dict[_Key, int] = {}
        self._rest: tuple[Sequence[np.ndarray], Sequence[np.ndarray]] = ((), ())
        self._has_rest = threading.Event()

    def send_rest(self, gradients: Sequence[np.ndarray], statistics: Sequence[np.ndarray]) -> None:
        """Hand over all gradients, and statistics, which are averaged without compression."""
        self._rest = gradients, statistics
        self._has_rest.set()

    def run(self) -> None:
        try:
            self._send_ready()
            self._has_rest.wait()
            self._send_rest()
            self._pipeline.finish()
        except BaseException as failure:
            self.failure = failure
        self.reduced.put(None)

    def _send_ready(self) -> None:
        waiting, seen = deque(self._plan), 0
        while waiting:
            moved, is_done = self._pipeline.progress(), self.backward_is_done.is_set()
            patience = 0.0 if moved or is_done else self._patience()
            ready = self._ready.since(seen, patience)
            seen += len(ready)
            self._addresses.update(((g.layer, g.output), g.address) for g in ready)
            missing = [key for key, _ in waiting[0] if key not in self._addresses]
            if is_done and not ready and missing:
                raise RuntimeError(f"the gradient of {missing[0][0]} never became ready")
            while waiting and all(key in self._addresses for key, _ in waiting[0]):
                bucket = waiting.popleft()
                arrays = [
                    _array_at(self._addresses[key], self._sizes[index]) for key, index in bucket
                ]
                self._add(arrays, [index for _, index in bucket])
        while not self._has_rest.is_set():
            if not self._pipeline.progress():
                self._has_rest.wait(self._patience())

    def _patience(self) -> float:
        return _IDLE_S if self._pipeline.is_empty else POLL_S

    def _send_rest(self) -> None:
        gradients, statistics = self._rest
        sent = set()
        for bucket in self._plan:
            for key, index in bucket:
                sent.add(index)
                if gradients[index].ctypes.data != self._addresses[key]:
                    raise RuntimeError(f"the gradient of {key[0]} moved after it became ready")
        rest = [index for index in range(len(gradients)) if index not in sent]
        for positions in make_buckets([gradients[index].nbytes for index in rest]):
            indices = [rest[position] for position in positions]
            self._add([gradients[index] for index in indices], indices)
        for positions in make_buckets([array.nbytes for array in statistics]):
            self._pipeline.add([statistics[position] for position in positions])

    def _add(self, arrays: Sequence[np.ndarray], indices: Sequence[int]) -> None:
        def put_indices() -> None:
            for index in indices:
                self.reduced.put(index)

        self._pipeline.add(arrays, self._compression, put_indices)


def _array_at(address: int, size: int) -> np.ndarray:
    """The float32 array (size,) in this memory."""
    return np.ctypeslib.as_array((ctypes.c_float * size).from_address(address))


class HostReducer:
    """Averages tensors in place with MPI: on CPU asnumpy() is a tensor's own, writable memory.

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

    def without_overlap(self) -> "HostReducer":
        """A reducer for other gradients, which waits for all of them."""
        return HostReducer(self._communicator, self._compression)

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
