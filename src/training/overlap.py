"""Means over ranks on several hosts of gradients that are complete, while the backward pass computes others and after it, while the
optimizer updates the parameters of those that have arrived."""

import ctypes
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from src.kernels.announcements import Announcement, Announcements
from src.parallel.communicator import Communicator
from src.parallel.compression import Compression
from src.parallel.exchange import PAUSE_S, buckets

# (name of the layer, which of its kernel's tensors)
_Key = tuple[str, int]
# While nothing is on its way.
_IDLE_S = 0.02


class Arrivals:
    """Indices of gradients, in the order in which they have become means; iterating waits for them.

    Attributes:
        waited: seconds that this took.
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


class OverlappedMeans:
    """Learns in a first step which gradients the kernels announce, and in which order; later steps send them off in that order.

    A gradient is averaged in its own memory, which a graph of MindSpore hands out as it is.
    """

    def __init__(self, announcements: Announcements, communicator: Communicator, compression: Compression | None) -> None:
        self._announcements, self._communicator, self._compression = announcements, communicator, compression
        # What travels together, in order: (key, index of the gradient).
        self._plan: list[list[tuple[_Key, int]]] | None = None
        self._sizes: list[int] = []
        self._sender: _Sender | None = None

    @contextmanager
    def computing(self) -> Iterator[None]:
        """The time in which the graph runs."""
        self._announcements.begin()
        if self._plan is not None:
            self._sender = _Sender(self._announcements, self._communicator, self._compression, self._plan, self._sizes)
            self._sender.start()
        try:
            yield
        finally:
            if self._sender is not None:
                self._sender.computed.set()

    def mean(self, gradients: Sequence[np.ndarray], statistics: Sequence[np.ndarray]) -> Arrivals:
        """Replace the gradients, which ``computing`` left, and the statistics by their means; they are all there when the result ends."""
        if self._sender is None:
            self._learn(gradients)
            self._communicator.mean_(gradients, self._compression)
            self._communicator.mean_(statistics)
            return Arrivals(iter(range(len(gradients))))
        self._sender.send_rest(gradients, statistics)
        return Arrivals(self._arrive(self._sender))

    def _arrive(self, sender: "_Sender") -> Iterator[int]:
        while True:
            with self._communicator.waiting():
                index = sender.arrived.get()
            if index is None:
                break
            yield index
        self._announcements.end()
        self._sender = None
        sender.join()
        if sender.failure is not None:
            raise sender.failure

    def _learn(self, gradients: Sequence[np.ndarray]) -> None:
        made: list[Announcement] = []
        while more := self._announcements.since(len(made), 0.0):
            made += more
        times = Counter((announcement.layer, announcement.output) for announcement in made)
        # Memory is used again: what was announced last is what the gradient's now holds.
        keys = {a.address: (a.layer, a.output) for a in made if a.layer and times[a.layer, a.output] == 1}
        order = {key: number for number, key in enumerate(keys.values())}
        found = [(keys[array.ctypes.data], index) for index, array in enumerate(gradients) if array.ctypes.data in keys]
        found.sort(key=lambda pair: order[pair[0]])
        plans = self._communicator.gather(found)
        alike = all(sorted(plan) == sorted(plans[0]) for plan in plans)
        self._sizes = [array.size for array in gradients]
        sizes = [gradients[index].nbytes for _, index in plans[0]] if alike else []
        self._plan = [[plans[0][number] for number in bucket] for bucket in buckets(sizes)]


class _Sender(threading.Thread):
    """Sends off the gradients of one step as they are announced, then the rest.

    Attributes:
        computed: to be set when the graph has come to its end.
        arrived: indices of gradients that are means now, then None.
        failure: what went wrong, or None.
    """

    def __init__(self, announcements: Announcements, communicator: Communicator, compression: Compression | None,
                 plan: Sequence[Sequence[tuple[_Key, int]]], sizes: Sequence[int]) -> None:
        super().__init__(daemon=True, name="gradients")
        self.computed = threading.Event()
        self.failure: BaseException | None = None
        self.arrived: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._announcements, self._compression, self._plan, self._sizes = announcements, compression, plan, sizes
        self._stream = communicator.stream()
        self._addresses: dict[_Key, int] = {}
        self._rest: tuple[Sequence[np.ndarray], Sequence[np.ndarray]] | None = None
        self._has_rest = threading.Event()

    def send_rest(self, gradients: Sequence[np.ndarray], statistics: Sequence[np.ndarray]) -> None:
        """All gradients, and what is averaged without compression besides."""
        self._rest = gradients, statistics
        self._has_rest.set()

    def run(self) -> None:
        try:
            self._send_announced()
            self._has_rest.wait()
            self._send_rest()
            self._stream.finish()
        except BaseException as failure:
            self.failure = failure
        self.arrived.put(None)

    def _send_announced(self) -> None:
        waiting, seen = deque(self._plan), 0
        while waiting:
            moved, ended = self._stream.progress(), self.computed.is_set()
            made = self._announcements.since(seen, 0.0 if moved or ended else _IDLE_S if self._stream.done else PAUSE_S)
            seen += len(made)
            self._addresses.update(((a.layer, a.output), a.address) for a in made)
            if ended and not made and any(key not in self._addresses for key, _ in waiting[0]):
                raise RuntimeError(f"the gradient of {waiting[0][0][0][0]} was not announced")
            while waiting and all(key in self._addresses for key, _ in waiting[0]):
                bucket = waiting.popleft()
                self._add([_at(self._addresses[key], self._sizes[index]) for key, index in bucket], [index for _, index in bucket])
        while not self._has_rest.is_set():
            if not self._stream.progress():
                self._has_rest.wait(_IDLE_S if self._stream.done else PAUSE_S)

    def _send_rest(self) -> None:
        gradients, statistics = self._rest or ((), ())
        sent = set()
        for bucket in self._plan:
            for key, index in bucket:
                sent.add(index)
                if gradients[index].ctypes.data != self._addresses[key]:
                    raise RuntimeError(f"the gradient of {key[0]} has moved since it was announced")
        rest = [index for index in range(len(gradients)) if index not in sent]
        for chosen in buckets([gradients[index].nbytes for index in rest]):
            self._add([gradients[rest[number]] for number in chosen], [rest[number] for number in chosen])
        for chosen in buckets([array.nbytes for array in statistics]):
            self._stream.add([statistics[number] for number in chosen])

    def _add(self, arrays: Sequence[np.ndarray], indices: Sequence[int]) -> None:
        def tell() -> None:
            for index in indices:
                self.arrived.put(index)
        self._stream.add(arrays, self._compression, tell)


def _at(address: int, size: int) -> np.ndarray:
    """The float32 array (size,) in this memory."""
    return np.ctypeslib.as_array((ctypes.c_float * size).from_address(address))
