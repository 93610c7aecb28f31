"""Graceful shutdown on SIGTERM, Ctrl-C, or SIGUSR1, which mpirun passes on without killing."""

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

from src.distributed.communicator import Communicator
from src.distributed.launcher import LAUNCHERS, launcher_stdout, process_name
from src.distributed.shutdown import Signals
from src.utils.errors import TrainingInterrupted

# Schedulers give 30 s between SIGTERM and SIGKILL.
_GRACE_S = 25
# scripts/launch.py sends SIGUSR1 for any signal, and writes into this file which one it received.
SENT_SIGNAL_FILE = "ACNET_SENT_SIGNAL_FILE"


class GracefulStop:
    """A context in which a signal is recorded, so that training can finish its step and save.

    mpirun passes SIGTERM and Ctrl-C on to its ranks and kills them 0.1 s later (Open MPI 5.0). It
    does the same to the remaining ranks when one has died. The two are told apart by looking for
    the other ranks on this machine: if one is gone, this process ends at once, for its step can
    never end. Otherwise one rank per machine suspends the launcher until the checkpoint is written,
    for at most 25 s. Without other ranks a second Ctrl-C ends the process at once.

    Attributes:
        signal: number of the signal that was sent, or 0.
    """

    def __init__(self, signals: Signals, communicator: Communicator) -> None:
        self.signal = 0
        self._signals, self._communicator = signals, communicator
        self._suspended_launcher: int | None = None
        self._guard: subprocess.Popen | None = None

    def __enter__(self) -> "GracefulStop":
        self._signals.defer_to(self._record)
        return self

    def __exit__(self, *exception: object) -> None:
        self._signals.defer_to(None)
        if self._suspended_launcher is not None and self._guard is not None:
            if self._communicator.is_root and isinstance(exception[1], TrainingInterrupted):
                _print_past_mpirun(str(exception[1]))
            os.kill(self._suspended_launcher, signal.SIGCONT)
            os.killpg(self._guard.pid, signal.SIGKILL)

    def _record(self, number: int) -> None:
        alone_and_interrupted = number == signal.SIGINT and self._communicator.size == 1
        if self.signal:
            if alone_and_interrupted:
                self._signals.end(number)
            return
        if alone_and_interrupted:
            sys.stderr.write(
                "\nfinishing the step, then saving; Ctrl-C again ends at once, without saving\n"
            )
        if not all(_is_alive(pid) for pid in self._communicator.local_peers()):
            os._exit(128 + number)
        self.signal = _sent_signal(number)
        if self._communicator.size > 1 and self._communicator.is_root:
            name = signal.Signals(self.signal).name
            if number == signal.SIGTERM:
                name += ", which mpirun sends on Ctrl-C too"
            _print_past_mpirun(f"told to stop ({name}): finishing the step, then saving")
        if self._communicator.size > 1 and number != signal.SIGUSR1:
            # If a rank on another machine is gone, this step never ends.
            threading.Timer(_GRACE_S, lambda: os._exit(128 + number)).start()
            if self._communicator.local_rank == 0:
                self._suspend_launcher()

    def _suspend_launcher(self) -> None:
        parent = os.getppid()
        if process_name(parent) in LAUNCHERS:
            os.kill(parent, signal.SIGSTOP)
            self._suspended_launcher = parent
            # If this process dies meanwhile, the launcher must not stay suspended.
            self._guard = subprocess.Popen(
                ["sh", "-c", f"sleep {_GRACE_S}; kill -CONT {parent}"],
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )


def _sent_signal(received: int) -> int:
    """The signal that a person or scheduler sent, as far as this process can know."""
    if received != signal.SIGUSR1:
        return received
    try:
        return int(Path(os.environ[SENT_SIGNAL_FILE]).read_text())
    except (KeyError, OSError, ValueError):
        return received


def _print_past_mpirun(text: str) -> None:
    """Print on the launcher's own standard output.

    mpirun passes on nothing that ranks print after it received SIGTERM.
    """
    output = launcher_stdout()
    with suppress(OSError):  # nobody reads
        os.write(output if output is not None else 1, f"{text}\n".encode(errors="backslashreplace"))


def _is_alive(pid: int) -> bool:
    try:
        state = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"  # a zombie has ended
