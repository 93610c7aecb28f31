"""The launcher that started this process: what it shows of the process's output, and torch's launcher, which is not ours."""

import ctypes
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

from src.parallel.environment import started_by_mpirun
from src.utils.errors import UserError
from src.utils.files import write_whole

# Where scripts/launch.py reads what a training told it.
FACTS_FILE = "ACNET_FACTS_FILE"
STATE_ENDING = ".state"
LAUNCHERS = ("prterun", "prted", "mpirun", "orted", "mpiexec")
# System call of Linux 5.6 and later, the same number on x86-64 and aarch64.
_PIDFD_GETFD = 438
# Time for a launcher to end what is left of its job.
ENDING_S = 20
_LAUNCH = Path(__file__).resolve().parents[2] / "scripts" / "launch.py"


def name_of(process: int) -> str:
    """Name of a process, or "" if it has ended."""
    try:
        return (Path("/proc") / str(process) / "comm").read_text().strip()
    except OSError:
        return ""


def launchers_output() -> int | None:
    """A duplicate of the parent's standard output if that is a launcher and the system allows it."""
    if name_of(os.getppid()) not in LAUNCHERS:
        return None
    try:
        duplicate = ctypes.CDLL(None).syscall(_PIDFD_GETFD, os.pidfd_open(os.getppid()), 1, 0)
    except (OSError, AttributeError):
        return None
    return duplicate if duplicate >= 0 else None


def show_hidden_output() -> None:
    """Let a person see what this process prints if mpirun writes it to files only.

    ``--output-filename`` and ``--output file=NAME`` copied it to the terminal in Open MPI 4, and do not in Open MPI 5. Without such a
    flag, or with one that says nocopy, nothing changes.
    """
    if hides_output(_words_of(os.getppid())):
        output = launchers_output()
        if output is not None:
            shown = os.fdopen(output, "w", buffering=1, errors="backslashreplace")
            sys.stdout, sys.stderr = _Both(sys.stdout, shown), _Both(sys.stderr, shown)


def end_launcher_later() -> None:
    """See to it that the launcher of this process ends within ENDING_S, for it waits without end for a daemon that has no connection.

    By a process of its own, which outlives this one: it asks first, then kills, and the launcher's ssh with it.
    """
    parent = os.getppid()
    name = name_of(parent)
    if name in LAUNCHERS:
        there = f'[ "$(cat /proc/{parent}/comm 2>/dev/null)" = {name} ]'
        script = (f"sleep {ENDING_S - 5}; {there} || exit; children=$(cat /proc/{parent}/task/*/children); kill -TERM {parent}; sleep 5; "
                  f"{there} && kill -KILL {parent}; kill -TERM $children")
        subprocess.Popen(["sh", "-c", script], start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                         stderr=subprocess.DEVNULL)


def tell_launcher(**facts: Any) -> None:
    """Let scripts/launch.py know what it needs to start this training again, if it asked for that."""
    file = os.environ.get(FACTS_FILE)
    if file:
        with suppress(OSError):  # on a host that shares no folder with the launcher's
            write_whole(file, lambda partial: partial.write_text(json.dumps(facts), encoding="utf-8"))


def tell_launcher_state(state: str) -> None:
    """Let scripts/launch.py know that a command has ``begun``, or has come to its ``end``: mpirun's status is 0 if a daemon of it dies."""
    file = os.environ.get(FACTS_FILE)
    if file:
        with suppress(OSError):
            Path(file + STATE_ENDING).write_text(state, encoding="utf-8")


def hides_output(command: Sequence[str]) -> bool:
    """Whether a launcher's command line has what it runs print to files only, and does not ask for that in so many words."""
    if not command or os.path.basename(command[0]) not in LAUNCHERS:
        return False
    for word, following in zip(command, [*command[1:], ""]):
        name, has_value, value = word.partition("=") if word.startswith("-") else ("", "", "")
        value = value if has_value else following
        to_files = name.lstrip("-") == "output-filename" or (name.lstrip("-") == "output" and value.startswith(("file", "dir")))
        if to_files and "nocopy" not in value:
            return True
    return False


def hand_over_from_torch() -> None:
    """Under torch.distributed.launch or torchrun with several processes: become scripts/launch.py with as many ranks, or end.

    Their first process does so, the others end, and are not waited for.

    Raises:
        UserError: if they were started on several machines.
    """
    size, on_this_machine = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if size == 1 or "TORCHELASTIC_RUN_ID" not in os.environ or started_by_mpirun():
        return
    if size != on_this_machine:
        raise UserError(f"torch's launcher started {size} processes on several machines; start this program there with mpirun")
    if os.environ["LOCAL_RANK"] != "0":
        os._exit(0)
    if os.environ.get("OMP_NUM_THREADS") == "1":
        # Torch's launcher sets it; ranks here take the cores that they are given.
        del os.environ["OMP_NUM_THREADS"]
    hand_over(size, sys.argv)


def hand_over(ranks: int, words: Sequence[str]) -> NoReturn:
    """Become scripts/launch.py, which starts ``ranks`` ranks of the command ``words``."""
    sys.stdout.flush()
    # What this process has its own thread receive, the launcher receives itself, and a new program inherits what is blocked.
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.execv(sys.executable, [sys.executable, str(_LAUNCH), f"--nproc_per_node={ranks}", *words])


def _words_of(process: int) -> list[str]:
    try:
        return (Path("/proc") / str(process) / "cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return []


class _Both(io.TextIOBase):
    """Writes to two streams; the second may fail."""

    def __init__(self, first: TextIO, second: TextIO) -> None:
        self._first, self._second = first, second

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._second.write(text)
        return self._first.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._second.flush()
        self._first.flush()

    def fileno(self) -> int:
        return self._first.fileno()
