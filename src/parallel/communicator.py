"""How ranks talk. Alone, rank is 0, size is 1 and every operation is the identity, so that no caller asks which it is."""

import atexit
import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import numpy as np

from src.parallel.compression import Compression
from src.parallel.environment import launched_ranks, on_one_machine, started_by_mpirun
from src.parallel.exchange import PACK_BELOW_BYTES, Exchange, MeanStream, buckets
from src.parallel.watchdog import StallWatchdog
from src.utils.errors import UserError

T = TypeVar("T")


class Communicator:
    """A process alone, and the interface of the others. Arrays are C-contiguous numpy arrays, changed in place."""

    rank, size = 0, 1
    local_rank, local_size = 0, 1

    def mean_(self, arrays: Sequence[np.ndarray], compression: Compression | None = None) -> None:
        """Replace each float32 array by its mean over ranks, the same bits on each; a Compression is what travels."""

    def stream(self) -> MeanStream:
        """Means of arrays that are added one after the other, between hosts. Only for several of them."""
        raise TypeError("there is one host")

    @property
    def has_several_hosts(self) -> bool:
        return len(set(self.hosts)) > 1

    def waiting(self) -> AbstractContextManager[None]:
        """Marks the time in which this rank may be waiting for others."""
        return nullcontext()

    def sum(self, values: Sequence[float]) -> np.ndarray:
        """Element-wise sum over ranks of a sequence of numbers, as a float64 array."""
        return np.asarray(values, np.float64)

    def broadcast_(self, arrays: Sequence[np.ndarray]) -> None:
        """Replace each array by rank 0's."""

    def from_root(self, value: T) -> T:
        """Rank 0's small picklable ``value``, on every rank."""
        return value

    def gather(self, value: T) -> list[T]:
        """List of every rank's small ``value`` in order of rank, on every rank."""
        return [value]

    def barrier(self) -> None:
        """Wait until every rank is here."""

    def watch_for_stalls(self, timeout_s: float) -> None:
        """From now on end the job, naming the rank, if one rank is waited for longer than ``timeout_s`` seconds."""

    def local_peers(self) -> list[int]:
        """Process numbers of the other ranks on this machine."""
        return []

    @property
    def is_root(self) -> bool:
        return self.rank == 0

    @property
    def hosts(self) -> list[str]:
        """Name of each rank's machine."""
        return [socket.gethostname()] * self.size


class MpiCommunicator(Communicator):
    """Ranks of an mpirun, through mpi4py; the arrays' own memory is what MPI reads and writes.

    Attributes:
        waiting_since: time.monotonic() at which this rank entered the collective operation it is in, or None.
        places: (host name, process number) of each rank.
    """

    def __init__(self, mpi: ModuleType) -> None:
        self._mpi = mpi
        self._world = mpi.COMM_WORLD
        self.rank, self.size = self._world.Get_rank(), self._world.Get_size()
        machine = self._world.Split_type(mpi.COMM_TYPE_SHARED)
        self.local_rank, self.local_size = machine.Get_rank(), machine.Get_size()
        machine.Barrier()
        if self.local_rank == 0:
            _unlink_shared_memory(self.local_size)
        machine.Free()
        self._packed = np.empty(0, np.float32)
        self._exchange: Exchange | None = None
        self.waiting_since: float | None = None
        self._watchdog: StallWatchdog | None = None
        self.places = self._world.allgather((socket.gethostname(), os.getpid()))

    @property
    def hosts(self) -> list[str]:
        return [host for host, _ in self.places]

    def mean_(self, arrays: Sequence[np.ndarray], compression: Compression | None = None) -> None:
        if self.has_several_hosts or compression is not None:
            stream = self.stream()
            for bucket in buckets([array.nbytes for array in arrays]):
                stream.add([arrays[index] for index in bucket], compression)
            with self.waiting():
                stream.finish()
            return
        small = [array for array in arrays if array.nbytes < PACK_BELOW_BYTES]
        for array in arrays:
            if array.nbytes >= PACK_BELOW_BYTES:
                self._mean_in_place(array)
        if small:
            packed = self._pack(small)
            self._mean_in_place(packed)
            start = 0
            for array in small:
                array[...] = packed[start:start + array.size].reshape(array.shape)
                start += array.size

    def stream(self) -> MeanStream:
        if self._exchange is None:
            # On one host only what is compressed is exchanged, and between all ranks.
            groups = self.hosts if self.has_several_hosts else [str(rank) for rank in range(self.size)]
            self._exchange = Exchange(self._mpi, self._world, groups)
        return self._exchange.stream()

    def sum(self, values: Sequence[float]) -> np.ndarray:
        total = np.array(values, np.float64)
        with self.waiting():
            self._world.Allreduce(self._mpi.IN_PLACE, total, self._mpi.SUM)
        return total

    def broadcast_(self, arrays: Sequence[np.ndarray]) -> None:
        with self.waiting():
            for array in arrays:
                self._world.Bcast(array, root=0)

    def from_root(self, value: T) -> T:
        with self.waiting():
            return self._world.bcast(value, root=0)

    def gather(self, value: T) -> list[T]:
        with self.waiting():
            return self._world.allgather(value)

    def barrier(self) -> None:
        with self.waiting():
            self._world.Barrier()

    def watch_for_stalls(self, timeout_s: float) -> None:
        self._watchdog = StallWatchdog(self, self._mpi, timeout_s)
        self._watchdog.start()

    def close(self) -> None:
        """Leave MPI, when every rank does; no other method may be called after."""
        if self._watchdog is not None:
            self._watchdog.stop()
        self._mpi.Finalize()

    def local_peers(self) -> list[int]:
        host, mine = self.places[self.rank]
        return [pid for name, pid in self.places if name == host and pid != mine]

    @contextmanager
    def waiting(self) -> Iterator[None]:
        self.waiting_since = time.monotonic()
        try:
            yield
        finally:
            self.waiting_since = None

    def _mean_in_place(self, array: np.ndarray) -> None:
        with self.waiting():
            self._world.Allreduce(self._mpi.IN_PLACE, array, self._mpi.SUM)
        array *= np.float32(1 / self.size)

    def _pack(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        count = sum(array.size for array in arrays)
        if self._packed.size < count:
            self._packed = np.empty(count, np.float32)
        packed, start = self._packed[:count], 0
        for array in arrays:
            packed[start:start + array.size] = array.reshape(-1)
            start += array.size
        return packed


def _unlink_shared_memory(ranks: int) -> None:
    """Remove the names of Open MPI's shared memory once all ``ranks`` of this machine have mapped it: killed ranks leave none."""
    mapped = set(re.findall(r"/dev/shm/sm_segment\S+", Path("/proc/self/maps").read_text()))
    if len(mapped) == ranks:
        for name in mapped:
            Path(name).unlink(missing_ok=True)


def connect(run_distribute: bool | None) -> Communicator:
    """The communicator that fits how this process was started.

    Args:
        run_distribute: True if the user asked for several ranks, False for one, None for whatever it is.

    Raises:
        UserError: if that contradicts how the process was started, or MPI cannot be had.
    """
    ranks = launched_ranks()
    if run_distribute and not started_by_mpirun():
        raise UserError("run_distribute=1 needs mpirun: start it as 'mpirun -n 8 python3 train.py --run_distribute=1 ...', "
                        "or use --run_distribute=0 for one process")
    if run_distribute is False and ranks > 1:
        raise UserError(f"mpirun started {ranks} processes but run_distribute=0 would have each of them do the same work; "
                        "use --run_distribute=1, or start it without mpirun")
    if ranks == 1 and not run_distribute:
        return Communicator()
    if on_one_machine():
        # Shared memory is enough there, and no rank opens a port.
        os.environ.setdefault("OMPI_MCA_btl", "self,sm")
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as failure:
        raise UserError(f"MPI cannot be loaded ({str(failure).splitlines()[0]}); run 'bash scripts/setup.sh', "
                        "then 'source .venv/bin/activate'") from None
    communicator = MpiCommunicator(MPI)
    # mpi4py would finalise MPI too, but only in Python's own finalisation, which run_main leaves out.
    atexit.register(communicator.close)
    return communicator
