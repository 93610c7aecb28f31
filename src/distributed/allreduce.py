"""Hierarchical all-reduce over several hosts, in chunks, optionally compressed.

Within each host gradients are summed, between hosts the sums are exchanged, and within each host
the means are broadcast. Arrays are split into pipelined chunks, which keeps both directions of a
link busy. Back-to-back Allreduces use one direction at a time and take twice as long
(benchmarks/slow_links.py).
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import cv2
import numpy as np

_CHUNK_BYTES = 1 << 19
_MAX_IN_FLIGHT = 128
# Seconds between polls: long enough to leave most of the core to computation.
POLL_S = 2e-4
# Phases of a chunk: the four of _phases, and the end.
_DONE = 5
# Smaller arrays share a bucket: they cost latency, not bandwidth.
BUCKET_BYTES = 1 << 20
_TAGS = 1 << 14
# Elements that are rounded at a time: few enough to stay in a core's cache.
_ROUNDED_ELEMENTS = 1 << 15


@dataclass(frozen=True)
class Compression:
    """A sixteen-bit form of float32 arrays: half the bytes between hosts.

    Attributes:
        encode: float32 array (n,) -> uint16 array (n,), rounded to nearest, ties to even.
        decode: uint16 array (n,) -> float32 array (n,).
    """

    encode: Callable[[np.ndarray], np.ndarray]
    decode: Callable[[np.ndarray], np.ndarray]


def _encode_float16(array: np.ndarray) -> np.ndarray:
    """Values beyond 65,504 become infinity, which the training step finds and reports."""
    # The processor's own instruction, 100 times faster than numpy's astype.
    return cv2.convertFp16(array).reshape(-1).view(np.uint16)


def _decode_float16(coded: np.ndarray) -> np.ndarray:
    return cv2.convertFp16(coded.view(np.int16)).reshape(-1)


def _encode_bfloat16(array: np.ndarray) -> np.ndarray:
    """The upper half of the bits. Infinities and the NaN that arithmetic gives stay as they are."""
    coded = np.empty(array.size, np.uint16)
    for start in range(0, array.size, _ROUNDED_ELEMENTS):
        part = slice(start, start + _ROUNDED_ELEMENTS)
        bits = array[part].view(np.uint32)
        coded[part] = (bits + ((bits >> 16) & 1) + np.uint32(0x7FFF)) >> 16
    return coded


def _decode_bfloat16(coded: np.ndarray) -> np.ndarray:
    return (coded.astype(np.uint32) << 16).view(np.float32)


COMPRESSIONS: dict[str, Compression | None] = {
    "none": None,
    "float16": Compression(_encode_float16, _decode_float16),
    "bfloat16": Compression(_encode_bfloat16, _decode_bfloat16),
}


class HierarchicalAllReduce:
    """The groups of the ranks of ``world``, and the communicators within and between them.

    Between groups each array travels as in a ring all-reduce, 2 (n - 1) / n of its bytes in each
    direction for n groups: the leader of each group receives its shard from the other leaders, adds
    it up in the order of groups, and sends it to them.

    Args:
        groups: for each rank, the name of its group: its host, within which memory is shared.
    """

    def __init__(self, mpi: ModuleType, world: Any, groups: Sequence[str]) -> None:
        self.mpi, self.size = mpi, world.Get_size()
        names = list(dict.fromkeys(groups))
        self.within = world.Split(names.index(groups[world.Get_rank()]))
        # Operations of one communicator must start in the same order on all its ranks, so reduction
        # and broadcast have one each.
        self.within_for_broadcast = self.within.Dup()
        self.is_leader = self.within.Get_rank() == 0
        self.between = world.Split(0 if self.is_leader else mpi.UNDEFINED)

    def pipeline(self) -> "AllReducePipeline":
        """A new pipeline; there may be one at a time."""
        return AllReducePipeline(self)


class AllReducePipeline:
    """Arrays that are being averaged; more may be added meanwhile.

    Every rank adds arrays of the same sizes in the same order.
    """

    def __init__(self, topology: HierarchicalAllReduce) -> None:
        self._topology = topology
        self._waiting: deque[_Chunk] = deque()
        self._moving: deque[_Chunk] = deque()
        self._buckets: deque[_Bucket] = deque()
        self._added = 0

    def add(
        self,
        arrays: Sequence[np.ndarray],
        compression: Compression | None = None,
        when_done: Callable[[], object] = lambda: None,
    ) -> None:
        """Replace float32 ``arrays``, which form one bucket, by their means over ranks.

        Args:
            compression: the form in which groups send each other arrays.
            when_done: called when the arrays hold the means.
        """
        bucket = _Bucket(arrays, when_done)
        self._buckets.append(bucket)
        elements = _CHUNK_BYTES // bucket.flat.itemsize
        for start in range(0, bucket.flat.size, elements):
            part = bucket.flat[start : start + elements]
            phases = _phases(self._topology, compression, part, self._added % _TAGS)
            self._waiting.append(_Chunk(self._topology, phases))
            self._added += 1
        bucket.last_chunk = self._added

    def progress(self) -> bool:
        """Advance what can be advanced. Returns whether there was anything."""
        moved = False
        while self._waiting and len(self._moving) < _MAX_IN_FLIGHT:
            self._moving.append(self._waiting.popleft())
            moved = True
        # In order: a chunk that overtook another would start its operations in another order than
        # on other ranks.
        limit = _DONE
        for chunk in self._moving:
            while chunk.phase < limit and chunk.advance():
                moved = True
            limit = min(limit, chunk.phase)
        while self._moving and self._moving[0].phase == _DONE:
            self._moving.popleft()
        done = self._added - len(self._moving) - len(self._waiting)
        while self._buckets and self._buckets[0].last_chunk <= done:
            self._buckets.popleft().finish()
        return moved

    @property
    def is_empty(self) -> bool:
        return not self._buckets

    def finish(self) -> None:
        """Wait until all arrays that were added are means."""
        while not self.is_empty:
            if not self.progress():
                time.sleep(POLL_S)


def make_buckets(sizes: Sequence[int]) -> list[list[int]]:
    """Group arrays of ``sizes`` bytes into buckets of about 1 MiB by index, in completion order."""
    buckets: list[list[int]] = []
    small: list[int] = []
    for index, size in enumerate(sizes):
        if size >= BUCKET_BYTES:
            buckets.append([index])
            continue
        small.append(index)
        if sum(sizes[i] for i in small) >= BUCKET_BYTES:
            buckets.append(small)
            small = []
    return buckets + ([small] if small else [])


class _Bucket:
    """Arrays as one flat array: their own memory if there is only one."""

    def __init__(self, arrays: Sequence[np.ndarray], when_done: Callable[[], object]) -> None:
        self._arrays, self._when_done, self.last_chunk = arrays, when_done, 0
        if len(arrays) == 1:
            self.flat = arrays[0].reshape(-1)
        else:
            self.flat = np.concatenate([array.reshape(-1) for array in arrays])

    def finish(self) -> None:
        if len(self._arrays) > 1:
            unflatten(self.flat, self._arrays)
        self._when_done()


def unflatten(flat: np.ndarray, arrays: Sequence[np.ndarray]) -> None:
    """Copy the parts of ``flat`` back into ``arrays``."""
    start = 0
    for array in arrays:
        array[...] = flat[start : start + array.size].reshape(array.shape)
        start += array.size


class _Chunk:
    """A part of an array on its way: ``phases`` yields the MPI requests of each phase."""

    def __init__(self, topology: HierarchicalAllReduce, phases: Iterator[list[Any]]) -> None:
        self._mpi, self._phases = topology.mpi, phases
        self._requests: list[Any] = []
        self.phase = 0

    def advance(self) -> bool:
        """Start the next phase, unless this one is still running. Returns whether it started."""
        if self._requests and not self._mpi.Request.Testall(self._requests):
            return False
        self._requests = next(self._phases, [])
        self.phase += 1
        return True


def _phases(
    topology: HierarchicalAllReduce, compression: Compression | None, array: np.ndarray, tag: int
) -> Iterator[list[Any]]:
    """Replace ``array`` by its mean over ranks; yield the requests to wait for after each phase."""
    yield _reduce_within(topology, array)
    if not topology.is_leader:
        yield []
        yield []
        yield _broadcast_within(topology, array)
        return

    between = topology.between
    rank, groups = between.Get_rank(), between.Get_size()
    others = [(rank + step) % groups for step in range(1, groups)]
    shard = math.ceil(array.size / groups)
    shards = [slice(i * shard, min((i + 1) * shard, array.size)) for i in range(groups)]
    own = array[shards[rank]]

    def encode(values: np.ndarray) -> np.ndarray:
        return values if compression is None else compression.encode(values)

    def decode(values: np.ndarray) -> np.ndarray:
        return values if compression is None else compression.decode(values)

    # Each leader receives its shard from the others, and sends them theirs.
    coded = encode(array)
    received = {other: np.empty(own.size, coded.dtype) for other in others}
    requests = [between.Irecv(received[other], other, 2 * tag) for other in others]
    requests += [between.Isend(coded[shards[other]], other, 2 * tag) for other in others]
    yield requests

    # It adds up its shard in the order of groups, so that every rank gets the same bits, and
    # exchanges the means.
    received[rank] = encode(own)
    total = decode(received[0]) if rank or compression else own
    for group in range(1, groups):
        total += decode(received[group])
    total *= np.float32(1 / topology.size)
    mean = encode(total)
    means = array if compression is None else np.empty(array.size, np.uint16)
    means[shards[rank]] = mean
    requests = [between.Irecv(means[shards[other]], other, 2 * tag + 1) for other in others]
    requests += [between.Isend(mean, other, 2 * tag + 1) for other in others]
    yield requests

    if compression is not None:
        array[...] = compression.decode(means)
    yield _broadcast_within(topology, array)


def _reduce_within(topology: HierarchicalAllReduce, array: np.ndarray) -> list[Any]:
    if topology.within.Get_size() == 1:
        return []
    source = topology.mpi.IN_PLACE if topology.is_leader else array
    target = array if topology.is_leader else None
    return [topology.within.Ireduce(source, target, topology.mpi.SUM, 0)]


def _broadcast_within(topology: HierarchicalAllReduce, array: np.ndarray) -> list[Any]:
    if topology.within.Get_size() == 1:
        return []
    return [topology.within_for_broadcast.Ibcast(array, 0)]
