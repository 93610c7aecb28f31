"""How every command starts and ends.

Imports no third-party package, so that a missing one is reported in one line. Imports nothing that
starts threads either, as numpy does: ``run_process`` must block the signals first, because threads
inherit the signal mask.
"""

import atexit
import io
import itertools
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from src.distributed.launcher import (
    launched_rank,
    on_one_machine,
    show_hidden_output,
    tell_launcher_state,
)
from src.distributed.shutdown import PATIENCE_S, Signals, end_process
from src.utils.errors import DamagedImage, TrainingInterrupted, UserError
from src.utils.log import WARNING, escaped

if TYPE_CHECKING:
    from src.cli.command import Command

_MEMORY_WORDS = (
    "failed to map segment",
    "Memory not enough",
    "Memory isn't enough",
    "std::bad_alloc",
    "Cannot allocate memory",
)
_THREAD_WORDS = ("can't start new thread", "Resource temporarily unavailable")
_MEMORY_HINT = (
    "free some, or use a smaller --per_batch_size, fewer --num_parallel_workers or a smaller "
    "--max_pixels"
)
# How many damaged images each process names.
_DAMAGED_NAMED = 10
_SIGNAL_WORDS: dict[int, str] = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


def run(
    main: "Callable[[Command], object]",
    about: str | None,
    positional: str = "",
    distributed: bool = False,
    translate: Callable[[list[str]], list[str]] = list,
) -> None:
    """Start the command, run ``main``, and end the process.

    Args:
        about: the text that ``--help`` begins with.
        positional: what to type for the positional arguments; "" for commands without.
        distributed: whether the command runs on several ranks.
        translate: changes the command line before it is parsed.
    """
    rank = launched_rank() if distributed else 0
    action = partial(_start_and_run, main, about or "", positional, distributed, translate, rank)
    run_process(action, rank)


def _start_and_run(
    main: "Callable[[Command], object]",
    about: str,
    positional: str,
    distributed: bool,
    translate: Callable[[list[str]], list[str]],
    rank: int,
    signals: Signals,
) -> None:
    from src.cli.start import print_help, run_main, start

    if not print_help(about, rank):
        run_main(main, start(translate(sys.argv[1:]), signals, positional, distributed))


def run_process(action: Callable[[Signals], object], rank: int = 0) -> None:
    """Run ``action`` and end the process.

    The exit status is 0; 2 after a UserError; 1 after a PartialFailure or a defect; 128 plus the
    number of a signal. An error is one line from one rank, and ends all ranks.
    """
    _open_standard_streams()
    _show_damaged_images()
    show_hidden_output()
    signals = Signals(
        lambda number: end_process(
            f"error: {_SIGNAL_WORDS.get(number, 'stopped')}", 128 + number, rank
        )
    )
    if rank == 0:
        tell_launcher_state("begun")
    try:
        action(signals)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has gone, as in `| head`: the status that a shell gives such a command.
        os._exit(128 + signal.SIGPIPE)
    except UserError as failure:
        end_process(f"error: {_prefix(rank)}{failure}", failure.status, rank)
    except TrainingInterrupted as stop:
        sys.stdout.flush()
        if rank != 0:
            # Rank 0 first: the launcher reports the status of the rank that ends first.
            time.sleep(PATIENCE_S)
        os._exit(128 + stop.signal)
    except Exception as failure:  # one line, and no rank hangs
        text, status = _explain(failure)
        whose = _prefix(rank) or ("rank 0: " if status == 1 else "")
        end_process(f"error: {whose}{text}", status, rank)
    # Run the exit handlers of Python and the libraries, such as MPI's finalisation. Skip
    # MindSpore's teardown of its libraries, which takes 0.5 s.
    atexit._run_exitfuncs()
    if rank == 0:
        tell_launcher_state("end")
    os._exit(0)


def _explain(failure: Exception) -> tuple[str, int]:
    """The text and the exit status of an exception that no command expects: 1 for a defect."""
    # Each library says in its own words that it got no memory or no thread.
    if isinstance(failure, MemoryError) or any(words in str(failure) for words in _MEMORY_WORDS):
        return f"too little memory; {_MEMORY_HINT}", 2
    if isinstance(failure, RuntimeError) and any(words in str(failure) for words in _THREAD_WORDS):
        return "no more threads can start; allow more processes (ulimit -u), or free memory", 2
    if isinstance(failure, ImportError):
        return f"{failure}; run 'bash scripts/setup.sh', then 'source .venv/bin/activate'", 2
    if isinstance(failure, OSError):
        path = f" '{failure.filename}'" if failure.filename else ""
        return f"cannot access{path}: {failure.strerror or failure}", 2
    if os.environ.get("ACNET_TRACEBACK"):
        traceback.print_exception(failure)
    return f"{type(failure).__name__}: {_reason(failure)} (ACNET_TRACEBACK=1 shows where)", 1


def _reason(failure: Exception) -> str:
    """The message of an exception as one line."""
    # MindSpore's messages have headings between dashes.
    lines = str(failure).splitlines()
    return next((line for line in lines if line.strip() and line[0] != "-"), "")


def _prefix(rank: int) -> str:
    """Names a rank other than 0, and its host if there are several hosts."""
    if rank == 0:
        return ""
    return f"rank {rank}: " if on_one_machine() else f"rank {rank} on {os.uname().nodename}: "


def _show_damaged_images() -> None:
    """Print a line for each DamagedImage that is warned of, up to a number of them."""
    show_other, numbers = warnings.showwarning, itertools.count(1)

    def show(message: object, category: type[Warning], *place: Any, **options: Any) -> None:
        if not issubclass(category, DamagedImage):
            show_other(message, category, *place, **options)  # type: ignore[arg-type]
            return
        number = next(numbers)
        if number <= _DAMAGED_NAMED:
            print(f"{WARNING}{escaped(message)}", file=sys.stderr, flush=True)
        elif number == _DAMAGED_NAMED + 1:
            print(
                f"{WARNING}more images are damaged; scripts/check_dataset.py lists all of them",
                file=sys.stderr,
                flush=True,
            )

    warnings.showwarning = show


def _open_standard_streams() -> None:
    """Make sure that the standard streams exist and can print any file name.

    If a standard descriptor is closed, the next file that is opened gets its number, and then also
    receives what libraries print there.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    # Python has no stream for a descriptor that was closed when it started.
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
