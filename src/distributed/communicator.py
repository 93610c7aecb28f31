"""Communication between ranks.

A single process has rank 0 and size 1, and every operation leaves its values as they are. So no
caller needs to know whether there are other ranks.
"""

import atexit
import json
import os
import re
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from src.distributed.allreduce import (
    BUCKET_BYTES,
    AllReducePipeline,
    Compression,
    HierarchicalAllReduce,
    make_buckets,
    unflatten,
)
from src.distributed.launcher import has_launcher, launched_ranks, on_one_machine
from src.distributed.watchdog import StallWatchdog
from src.utils.errors import UserError

T = TypeVar("T")
_SHOWN_CHARACTERS, _SHOWN_RANKS = 60, 4
_ABORT_DELAY_S = "2"


class Communicator:
    """The interface of communicators, implemented for a single process.

    Arrays are C-contiguous numpy arrays; methods ending in _ change them in place.
    """

    rank, size = 0, 1
    local_rank, local_size = 0, 1

    def all_reduce_mean_(
        self, arrays: Sequence[np.ndarray], compression: Compression | None = None
    ) -> None:
        """Replace each float32 array by its mean over ranks, with the same bits on each rank."""

    def pipeline(self) -> AllReducePipeline:
        """Averages arrays that are added one by one. Only for several hosts."""
        raise TypeError("there is only one host")

    def all_reduce_sum(self, values: Sequence[float]) -> np.ndarray:
        """Element-wise sum of ``values`` over ranks, as a float64 array."""
        return np.asarray(values, np.float64)

    def broadcast_(self, arrays: Sequence[np.ndarray]) -> None:
        """Replace each array by rank 0's."""

    def broadcast_object(self, value: T) -> T:
        """Rank 0's small picklable ``value``, on every rank."""
        return value

    def all_gather(self, value: T) -> list[T]:
        """The small picklable values of all ranks, in order of rank, on every rank."""
        return [value]

    def barrier(self) -> None:
        """Wait until every rank is here."""

    def waiting(self) -> AbstractContextManager[None]:
        """Marks the time in which this rank may be waiting for others."""
        return nullcontext()

    def watch_for_stalls(self, timeout_s: float) -> None:
        """From now on abort the job if the others wait longer than this for one rank."""

    def local_peers(self) -> list[int]:
        """Process ids of the other ranks on this machine."""
        return []

    @property
    def is_root(self) -> bool:
        return self.rank == 0

    @property
    def has_terminal(self) -> bool:
        """Whether a person sees this rank's standard error, so that a progress bar makes sense.

        mpirun may put a terminal of its own in front of ranks whose output goes to files.
        """
        return self.is_root and sys.stderr.isatty() and not has_launcher()

    @property
    def hosts(self) -> list[str]:
        """Name of each rank's machine."""
        return [socket.gethostname()] * self.size

    @property
    def host_names(self) -> list[str]:
        """Each machine's name once."""
        return list(dict.fromkeys(self.hosts))

    @property
    def has_several_hosts(self) -> bool:
        return len(self.host_names) > 1


class MpiCommunicator(Communicator):
    """Ranks under mpirun, through mpi4py; MPI reads and writes the arrays' own memory.

    Attributes:
        waiting_since: time.monotonic() at which this rank entered the collective operation that it
            is in, or None.
        processes: (host name, process id) of each rank.
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
        self._topology: HierarchicalAllReduce | None = None
        self.waiting_since: float | None = None
        self._watchdog: StallWatchdog | None = None
        self.processes = self._world.allgather((socket.gethostname(), os.getpid()))

    @property
    def hosts(self) -> list[str]:
        return [host for host, _ in self.processes]

    def all_reduce_mean_(
        self, arrays: Sequence[np.ndarray], compression: Compression | None = None
    ) -> None:
        if self.has_several_hosts or compression is not None:
            pipeline = self.pipeline()
            for bucket in make_buckets([array.nbytes for array in arrays]):
                pipeline.add([arrays[index] for index in bucket], compression)
            with self.waiting():
                pipeline.finish()
            return
        for array in arrays:
            if array.nbytes >= BUCKET_BYTES:
                self._all_reduce_mean_one(array)
        small = [array for array in arrays if array.nbytes < BUCKET_BYTES]
        if small:
            packed = self._pack(small)
            self._all_reduce_mean_one(packed)
            unflatten(packed, small)

    def pipeline(self) -> AllReducePipeline:
        if self._topology is None:
            # On one host only compressed arrays use the pipeline, and each rank is then its own
            # group.
            several = self.has_several_hosts
            groups = self.hosts if several else [str(rank) for rank in range(self.size)]
            self._topology = HierarchicalAllReduce(self._mpi, self._world, groups)
        return self._topology.pipeline()

    def all_reduce_sum(self, values: Sequence[float]) -> np.ndarray:
        total = np.array(values, np.float64)
        with self.waiting():
            self._world.Allreduce(self._mpi.IN_PLACE, total, self._mpi.SUM)
        return total

    def broadcast_(self, arrays: Sequence[np.ndarray]) -> None:
        with self.waiting():
            for array in arrays:
                self._world.Bcast(array, root=0)

    def broadcast_object(self, value: T) -> T:
        with self.waiting():
            return self._world.bcast(value, root=0)

    def all_gather(self, value: T) -> list[T]:
        with self.waiting():
            return self._world.allgather(value)

    def barrier(self) -> None:
        with self.waiting():
            self._world.Barrier()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        self.waiting_since = time.monotonic()
        try:
            yield
        finally:
            self.waiting_since = None

    def watch_for_stalls(self, timeout_s: float) -> None:
        self._watchdog = StallWatchdog(self, self._mpi, timeout_s)
        self._watchdog.start()

    def close(self) -> None:
        """Leave MPI together with all ranks. No other method may be called afterwards."""
        if self._watchdog is not None:
            self._watchdog.stop()
        self._mpi.Finalize()

    def local_peers(self) -> list[int]:
        host, own_pid = self.processes[self.rank]
        return [pid for name, pid in self.processes if name == host and pid != own_pid]

    def _all_reduce_mean_one(self, array: np.ndarray) -> None:
        with self.waiting():
            self._world.Allreduce(self._mpi.IN_PLACE, array, self._mpi.SUM)
        array *= np.float32(1 / self.size)

    def _pack(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        count = sum(array.size for array in arrays)
        if self._packed.size < count:
            self._packed = np.empty(count, np.float32)
        packed, start = self._packed[:count], 0
        for array in arrays:
            packed[start : start + array.size] = array.reshape(-1)
            start += array.size
        return packed


def connect(run_distribute: bool | None) -> Communicator:
    """The communicator that fits how this process was started.

    Args:
        run_distribute: True if the user wants several ranks, False for one, None for either.

    Raises:
        UserError: if that contradicts how the process was started, or MPI is missing.
    """
    ranks = launched_ranks()
    if run_distribute and not has_launcher():
        raise UserError(
            "run_distribute=1 needs mpirun: start it as 'mpirun -n 8 python3 train.py "
            "--run_distribute=1 ...', or use --run_distribute=0 for one process"
        )
    if run_distribute is False and ranks > 1:
        raise UserError(
            f"mpirun started {ranks} processes but run_distribute=0 would have each of them do the "
            "same work; use --run_distribute=1, or start it without mpirun"
        )
    if ranks == 1 and not run_distribute:
        return Communicator()
    if on_one_machine():
        # Shared memory is enough there, and no rank opens a port.
        os.environ.setdefault("OMPI_MCA_btl", "self,sm")
    else:
        # When a rank ends with an error, Open MPI sees its connections close on other hosts and
        # aborts there. The launcher then reports whichever it hears of first, so the abort has to
        # wait. Not longer, because it also waits if the launcher itself is killed.
        os.environ.setdefault("OMPI_MCA_opal_abort_delay", _ABORT_DELAY_S)
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as failure:
        reason = str(failure).splitlines()[0]
        raise UserError(
            f"MPI cannot be loaded ({reason}); "
            "run 'bash scripts/setup.sh', then 'source .venv/bin/activate'"
        ) from None
    communicator = MpiCommunicator(MPI)
    # mpi4py would finalise MPI too, but only in Python's own finalisation, which ``run`` skips.
    atexit.register(communicator.close)
    return communicator


def check_ranks_agree(
    communicator: Communicator,
    values: Mapping[str, Any],
    remedy: str = "start all of them with the same command on the same data",
) -> None:
    """Compare {name: value} over all ranks; a mismatch would otherwise be silent or deadlock.

    Every rank calls it, with JSON-serialisable values.

    Args:
        remedy: how to fix a difference.

    Raises:
        UserError: on every rank, if a value differs. Names the value, its ranks and, if there are
            several, their hosts.
    """
    all_values = communicator.all_gather(dict(values))
    for name in dict.fromkeys(name for one in all_values for name in one):
        ranks: dict[str, list[int]] = {}
        for rank, one in enumerate(all_values):
            text = json.dumps(one[name], ensure_ascii=False) if name in one else "(nothing)"
            ranks.setdefault(text, []).append(rank)
        if len(ranks) > 1:
            groups = " and ".join(
                f"{name}={_shortened(text)} on {_ranks_text(group, communicator.hosts)}"
                for text, group in ranks.items()
            )
            raise UserError(f"the ranks do not agree: {groups}; {remedy}")


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def _ranks_text(ranks: list[int], hosts: Sequence[str]) -> str:
    more = " ..." if len(ranks) > _SHOWN_RANKS else ""
    text = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:_SHOWN_RANKS]))}{more}"
    if len(set(hosts)) > 1:
        names = dict.fromkeys(hosts[rank] for rank in ranks)
        text += f" ({', '.join(names)})"
    return text


def _unlink_shared_memory(ranks: int) -> None:
    """Remove the names of Open MPI's shared memory once all ranks of this machine have mapped it.

    So killed ranks leave none behind.
    """
    maps = Path("/proc/self/maps").read_text()
    names = set(re.findall(r"/dev/shm/sm_segment\S+", maps))
    if len(names) == ranks:
        for name in names:
            Path(name).unlink(missing_ok=True)
