"""Means of large arrays over ranks on several hosts: added up within each host, exchanged between hosts, spread within each host.

Arrays are cut into pieces that follow each other, so that both directions of a link are in use all the time. Back-to-back Allreduces
take turns with the two directions, and need twice the time (benchmarks/slow_links.py).
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from src.parallel.compression import Compression

_PIECE_BYTES = 1 << 19
_IN_FLIGHT = 128
# Between two looks at what has arrived: most of a core stays free for computing.
PAUSE_S = 2e-4
# Arrays below this size travel together: latency, not bandwidth, is what they cost.
PACK_BELOW_BYTES = 1 << 20
_TAGS = 1 << 14


class Exchange:
    """Where the ranks of ``world`` are, and the communicators between them. The leader of each group speaks for it.

    Between groups travels what a ring needs, 2 (n - 1) / n of the bytes of each array in each direction, for n groups: each leader
    gets its share of the array from the others, adds it up in order of groups, and sends it to the others.

    Args:
        groups: of each rank, the name of its group: of the host, within which memory is shared.
    """

    def __init__(self, mpi: ModuleType, world: Any, groups: Sequence[str]) -> None:
        self.mpi, self.size = mpi, world.Get_size()
        names = list(dict.fromkeys(groups))
        self.inside = world.Split(names.index(groups[world.Get_rank()]))
        # Operations of one communicator must begin in one order on all its ranks, so that there are two.
        self.outward = self.inside.Dup()
        self.leads = self.inside.Get_rank() == 0
        self.between = world.Split(0 if self.leads else mpi.UNDEFINED)

    def stream(self) -> "MeanStream":
        """Arrays may be added to it while others are on their way. There may be one at a time."""
        return MeanStream(self)


class MeanStream:
    """Arrays on their way to becoming means. Every rank adds arrays of the same sizes in the same order."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._waiting: deque[_Piece] = deque()
        self._moving: deque[_Piece] = deque()
        self._buckets: deque[_Bucket] = deque()
        self._added = 0

    def add(self, arrays: Sequence[np.ndarray], compression: Compression | None = None,
            arrived: Callable[[], object] = lambda: None) -> None:
        """Replace float32 ``arrays``, which travel together, by their means over ranks.

        Args:
            compression: what travels between groups.
            arrived: called when they are means.
        """
        bucket = _Bucket(arrays, arrived)
        self._buckets.append(bucket)
        step = _PIECE_BYTES // bucket.flat.itemsize
        for start in range(0, bucket.flat.size, step):
            self._waiting.append(_Piece(self._exchange, compression, bucket.flat[start:start + step], self._added % _TAGS))
            self._added += 1
        bucket.last = self._added

    def progress(self) -> bool:
        """Move on what can be moved; returns whether there was something."""
        moved = False
        while self._waiting and len(self._moving) < _IN_FLIGHT:
            self._moving.append(self._waiting.popleft())
            moved = True
        # In order: a piece that is overtaken would begin its operations in another order than on other ranks.
        phase = len(_Piece.PHASES)
        for piece in self._moving:
            while piece.phase < phase and piece.advance():
                moved = True
            phase = min(phase, piece.phase)
        while self._moving and self._moving[0].phase == len(_Piece.PHASES):
            self._moving.popleft()
        arrived = self._added - len(self._moving) - len(self._waiting)
        while self._buckets and self._buckets[0].last <= arrived:
            self._buckets.popleft().unpack()
        return moved

    @property
    def done(self) -> bool:
        return not self._buckets

    def finish(self) -> None:
        """Wait until all arrays that were added are means."""
        while not self.done:
            if not self.progress():
                self.pause()

    @staticmethod
    def pause() -> None:
        """Wait for a moment, while other threads compute."""
        time.sleep(PAUSE_S)


def buckets(sizes: Sequence[int]) -> list[list[int]]:
    """Indices of arrays of ``sizes`` bytes grouped into what travels together, in the order in which groups are complete."""
    found: list[list[int]] = []
    small: list[int] = []
    for index, size in enumerate(sizes):
        if size >= PACK_BELOW_BYTES:
            found.append([index])
            continue
        small.append(index)
        if sum(sizes[number] for number in small) >= PACK_BELOW_BYTES:
            found.append(small)
            small = []
    return found + ([small] if small else [])


class _Bucket:
    """Arrays, in one piece of memory: their own if it is one."""

    def __init__(self, arrays: Sequence[np.ndarray], arrived: Callable[[], object]) -> None:
        self._arrays, self.last, self._arrived = arrays, 0, arrived
        self.flat = arrays[0].reshape(-1) if len(arrays) == 1 else np.concatenate([array.reshape(-1) for array in arrays])

    def unpack(self) -> None:
        if len(self._arrays) > 1:
            start = 0
            for array in self._arrays:
                array[...] = self.flat[start:start + array.size].reshape(array.shape)
                start += array.size
        self._arrived()


class _Piece:
    """A part of an array on its way: PHASES[phase] comes next once its requests are done."""

    def __init__(self, exchange: Exchange, compression: Compression | None, array: np.ndarray, tag: int) -> None:
        self._exchange, self._compression, self._array, self._tag = exchange, compression, array, tag
        self._requests: list[Any] = []
        self._received: dict[int, np.ndarray] = {}
        self.phase = 0

    def advance(self) -> bool:
        """Begin the next phase, unless this one is not done."""
        if self._requests and not self._exchange.mpi.Request.Testall(self._requests):
            return False
        self._requests = []
        self.PHASES[self.phase](self)
        self.phase += 1
        return True

    def _gather_inside(self) -> None:
        exchange = self._exchange
        if exchange.inside.Get_size() > 1:
            source = exchange.mpi.IN_PLACE if exchange.leads else self._array
            self._requests = [exchange.inside.Ireduce(source, self._array if exchange.leads else None, exchange.mpi.SUM, 0)]

    def _send_shares(self) -> None:
        if not self._exchange.leads:
            return
        between = self._exchange.between
        self._others = [(between.Get_rank() + step) % between.Get_size() for step in range(1, between.Get_size())]
        share = -(-self._array.size // between.Get_size())
        self._parts = [slice(start, min(start + share, self._array.size)) for start in range(0, share * between.Get_size(), share)]
        own = self._array[self._parts[between.Get_rank()]]
        coded = self._coded(self._array)
        self._received = {other: np.empty(own.size, coded.dtype) for other in self._others}
        self._requests = [between.Irecv(self._received[other], other, 2 * self._tag) for other in self._others]
        self._requests += [between.Isend(coded[self._parts[other]], other, 2 * self._tag) for other in self._others]

    def _send_mean(self) -> None:
        if not self._exchange.leads:
            return
        between = self._exchange.between
        rank = between.Get_rank()
        own = self._array[self._parts[rank]]
        self._received[rank] = self._coded(own)
        total = self._decoded(self._received[0]) if rank or self._compression else own
        for group in range(1, between.Get_size()):
            total += self._decoded(self._received[group])
        total *= np.float32(1 / self._exchange.size)
        self._mean = self._coded(total)
        if self._compression is None:
            own[...] = total
            into = self._array
        else:
            into = self._coded_mean = np.empty(self._array.size, np.uint16)
            into[self._parts[rank]] = self._mean
        self._requests = [between.Irecv(into[self._parts[other]], other, 2 * self._tag + 1) for other in self._others]
        self._requests += [between.Isend(self._mean, other, 2 * self._tag + 1) for other in self._others]

    def _spread_inside(self) -> None:
        exchange = self._exchange
        if exchange.leads and self._compression is not None:
            self._array[...] = self._compression.decode(self._coded_mean)
        if exchange.inside.Get_size() > 1:
            self._requests = [exchange.outward.Ibcast(self._array, 0)]

    def _end(self) -> None:
        self._received.clear()

    def _coded(self, array: np.ndarray) -> np.ndarray:
        return array if self._compression is None else self._compression.encode(array)

    def _decoded(self, array: np.ndarray) -> np.ndarray:
        return array if self._compression is None else self._compression.decode(array)

    PHASES = (_gather_inside, _send_shares, _send_mean, _spread_inside, _end)
