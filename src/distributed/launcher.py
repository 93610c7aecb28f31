"""The launcher of this process (mpirun, or srun with PMIx): its environment, and messages to it.

Nothing here needs MPI to have started.
"""

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

from src.utils.errors import UserError
from src.utils.files import write_atomically
from src.utils.log import WARNING

_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")
_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")


def launched_ranks() -> int:
    """Number of processes that were started together; 1 without a launcher."""
    sizes = _SIZES + (
        ("SLURM_NTASKS",) if "SLURM_STEP_ID" in os.environ and "PMIX_RANK" in os.environ else ()
    )
    return _first_number(sizes, 1)


def launched_rank() -> int:
    """This process's rank; 0 without a launcher."""
    return _first_number(_RANKS, 0)


def launched_here() -> int:
    """Number of those processes on this machine; 0 if the launcher does not say."""
    return _first_number(("OMPI_COMM_WORLD_LOCAL_SIZE",), 0)


def on_one_machine() -> bool:
    """True if the launcher says that all processes are on this machine."""
    return launched_here() == launched_ranks()


def single_process_warning(script: str) -> str | None:
    """A warning if a launcher started several processes of a script that does not share its work.

    For one of them, else None.
    """
    if launched_ranks() == 1 or launched_rank() > 0:
        return None
    return (
        f"{WARNING}{script}.py does not share its work: each of the {launched_ranks()} processes "
        "that the launcher started does all that it is given"
    )


def has_launcher() -> bool:
    """True under a launcher, even of a single process."""
    return any(name in os.environ for name in (*_SIZES, "PMIX_RANK"))


def _first_number(names: Sequence[str], default: int) -> int:
    return next(
        (int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), default
    )


# Environment variable that names the file through which a run informs scripts/launch.py.
FACTS_FILE = "ACNET_FACTS_FILE"
STATE_SUFFIX = ".state"
LAUNCHERS = ("prterun", "prted", "mpirun", "orted", "mpiexec")
# System call of Linux 5.6 and later, the same number on x86-64 and aarch64.
_PIDFD_GETFD = 438
# Time for a launcher to clean up its job.
LAUNCHER_GRACE_S = 20
_LAUNCH = Path(__file__).resolve().parents[2] / "scripts" / "launch.py"


def process_name(process: int) -> str:
    """Name of a process, or "" if it has ended."""
    try:
        return (Path("/proc") / str(process) / "comm").read_text().strip()
    except OSError:
        return ""


def launcher_stdout() -> int | None:
    """A duplicate of the standard output of the parent, if the parent is a launcher.

    None if it is not, or if the system does not allow it.
    """
    if process_name(os.getppid()) not in LAUNCHERS:
        return None
    try:
        duplicate = ctypes.CDLL(None).syscall(_PIDFD_GETFD, os.pidfd_open(os.getppid()), 1, 0)
    except (OSError, AttributeError):
        return None
    return duplicate if duplicate >= 0 else None


def show_hidden_output() -> None:
    """Show on the terminal what this process prints, if mpirun writes it only to files.

    In Open MPI 4, ``--output-filename`` and ``--output file=NAME`` also copied the output to the
    terminal; in Open MPI 5 they do not. Without such a flag, or if it says nocopy, nothing changes.
    """
    if hides_output(_argv_of(os.getppid())):
        output = launcher_stdout()
        if output is not None:
            shown = os.fdopen(output, "w", buffering=1, errors="backslashreplace")
            sys.stdout, sys.stderr = _Tee(sys.stdout, shown), _Tee(sys.stderr, shown)


def end_launcher_later() -> None:
    """End the launcher of this process within LAUNCHER_GRACE_S.

    A launcher waits forever for a daemon that has lost its connection. A process that outlives this
    one asks the launcher to end, and then kills it and its ssh.
    """
    parent = os.getppid()
    name = process_name(parent)
    if name in LAUNCHERS:
        there = f'[ "$(cat /proc/{parent}/comm 2>/dev/null)" = {name} ]'
        script = (
            f"sleep {LAUNCHER_GRACE_S - 5}; {there} || exit; "
            f"children=$(cat /proc/{parent}/task/*/children); kill -TERM {parent}; sleep 5; "
            f"{there} && kill -KILL {parent}; kill -TERM $children"
        )
        subprocess.Popen(
            ["sh", "-c", script],
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


def tell_launcher(**facts: Any) -> None:
    """Tell scripts/launch.py what it needs to restart this run, if it asked for that."""
    file = os.environ.get(FACTS_FILE)
    if file:
        with suppress(OSError):  # on a host that shares no folder with the launcher's
            write_atomically(
                file, lambda partial: partial.write_text(json.dumps(facts), encoding="utf-8")
            )


def read_facts(file: Path) -> dict[str, Any]:
    """The facts that a run passed to ``tell_launcher``; {} if none."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def tell_launcher_state(state: str) -> None:
    """Tell scripts/launch.py that a command has ``begun``, or has reached its ``end``.

    The status of mpirun does not tell: it is 0 if one of its daemons dies.
    """
    file = os.environ.get(FACTS_FILE)
    if file:
        with suppress(OSError):
            Path(file + STATE_SUFFIX).write_text(state, encoding="utf-8")


def hides_output(command: Sequence[str]) -> bool:
    """Whether a launcher sends the output only to files, without an explicit nocopy.

    Args:
        command: the launcher's command line.
    """
    if not command or os.path.basename(command[0]) not in LAUNCHERS:
        return False
    for word, following in zip(command, [*command[1:], ""]):
        name, has_value, value = word.partition("=") if word.startswith("-") else ("", "", "")
        value = value if has_value else following
        to_files = name.lstrip("-") == "output-filename" or (
            name.lstrip("-") == "output" and value.startswith(("file", "dir"))
        )
        if to_files and "nocopy" not in value:
            return True
    return False


def exec_launcher_under_torchrun() -> None:
    """Under torch.distributed.launch or torchrun, become scripts/launch.py with as many ranks.

    The first of several processes does so. The others end, and nothing waits for them.

    Raises:
        UserError: if they were started on several machines.
    """
    size, on_this_machine = (
        int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
    )
    if size == 1 or "TORCHELASTIC_RUN_ID" not in os.environ or has_launcher():
        return
    if size != on_this_machine:
        raise UserError(
            f"torch's launcher started {size} processes on several machines; start this program "
            "there with mpirun"
        )
    if os.environ["LOCAL_RANK"] != "0":
        os._exit(0)
    if os.environ.get("OMP_NUM_THREADS") == "1":
        # Torch's launcher sets it; ranks here take the cores that they are given.
        del os.environ["OMP_NUM_THREADS"]
    exec_launcher(size, sys.argv)


def exec_launcher(ranks: int, argv: Sequence[str]) -> NoReturn:
    """Become scripts/launch.py, which starts ``ranks`` ranks of the command ``argv``."""
    sys.stdout.flush()
    # A new program inherits the blocked signals, and the launcher must receive them itself.
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.execv(
        sys.executable,
        [sys.executable, str(_LAUNCH), "--quiet", f"--nproc_per_node={ranks}", *argv],
    )


def _argv_of(process: int) -> list[str]:
    try:
        return (Path("/proc") / str(process) / "cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return []


class _Tee(io.TextIOBase):
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
