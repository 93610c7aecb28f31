"""Ends a job if the other ranks wait too long for one rank, and names that rank."""

import threading
import time
from types import ModuleType
from typing import Any, Protocol

from src.distributed.launcher import end_launcher_later
from src.distributed.shutdown import end_process

_LOOK_EVERY_S = 1.0
# Time for the watchdogs of all healthy ranks to answer, after the first rank has asked.
_ANSWER_S = 3.0
_QUESTION, _WAITING, _BUSY = b"?", b"w", b"b"


class Watched(Protocol):
    """The attributes of a communicator that the watchdog reads."""

    rank: int
    size: int
    processes: list[tuple[str, int]]
    waiting_since: float | None


class StallWatchdog(threading.Thread):
    """A thread that checks whether its rank has waited in a collective operation for too long.

    The first rank to notice asks the other watchdogs whether their ranks are waiting too. The rank
    at fault is one that answers that it is busy, or does not answer at all (stopped, or lost with
    its machine).

    Args:
        communicator: this rank's.
        mpi: mpi4py.MPI.
        timeout_s: the longest wait in seconds.
    """

    def __init__(self, communicator: Watched, mpi: ModuleType, timeout_s: float) -> None:
        super().__init__(daemon=True, name="stall watchdog")
        self._communicator, self._mpi, self._timeout_s = communicator, mpi, timeout_s
        # Its own, so that its messages never meet the collectives of the main thread.
        self._world = mpi.COMM_WORLD.Dup()
        self._talks = mpi.Query_thread() == mpi.THREAD_MULTIPLE
        self._sent: list[Any] = []
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(_LOOK_EVERY_S):
            self._answer_others()
            if self._waited() > self._timeout_s:
                answers = self._ask_others()
                if self._waited() > self._timeout_s:
                    self._end(answers)

    def stop(self) -> None:
        """Watch no longer, and call MPI no more once this returns."""
        self._stopped.set()
        self.join()

    def _waited(self) -> float:
        since = self._communicator.waiting_since
        return time.monotonic() - since if since is not None else 0.0

    def _ask_others(self) -> dict[int, bytes]:
        """{rank: its answer} of those that answer in time."""
        answers: dict[int, bytes] = {}
        for rank in range(self._communicator.size):
            if rank != self._communicator.rank:
                self._send(_QUESTION, rank)
        deadline = time.monotonic() + _ANSWER_S
        while time.monotonic() < deadline:
            answers.update(self._answer_others())
            time.sleep(_LOOK_EVERY_S / 10)
        return answers

    def _answer_others(self) -> dict[int, bytes]:
        """Answer the questions that have arrived. Returns the answers that have: {rank: answer}."""
        answers: dict[int, bytes] = {}
        status = self._mpi.Status()
        while self._talks and self._world.Iprobe(status=status):
            note, source = bytearray(1), status.Get_source()
            self._world.Recv(note, source=source)
            if bytes(note) == _QUESTION:
                self._send(_WAITING if self._waited() else _BUSY, source)
            else:
                answers[source] = bytes(note)
        return answers

    def _send(self, note: bytes, rank: int) -> None:
        if self._talks:
            # Not waited for: a stopped rank never receives.
            self._sent.append(self._world.Isend(note, dest=rank))

    def _end(self, answers: dict[int, bytes]) -> None:
        processes, rank = self._communicator.processes, self._communicator.rank
        missed = [
            other
            for other in range(len(processes))
            if other != rank and answers.get(other) != _WAITING
        ]
        who = "the ranks have"
        if missed and self._talks:
            host, pid = processes[missed[0]]
            state = "is busy" if answers.get(missed[0]) == _BUSY else "gives no sign of life"
            who = f"rank {missed[0]} (process {pid} on {host}) {state}; the others have"
        line = (
            f"error: {who} waited for more than stall_timeout_s={self._timeout_s:g} s; continue "
            "from the last checkpoint with --resume=auto"
        )
        if len({host for host, _ in processes}) > 1:
            # The launcher's daemon may be as lost as the rank.
            end_launcher_later()
        first_to_speak = not any(answers.get(other) == _WAITING for other in range(rank))
        end_process(line, 1, 0 if first_to_speak else rank)
