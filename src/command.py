"""What the commands have in common: how they begin, and how they end."""

import atexit
import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.parallel.ending import PATIENCE_S, end_process
from src.parallel.environment import on_one_machine, started_by_mpirun
from src.parallel.launcher import show_hidden_output, tell_launcher_state
from src.utils.errors import Stopped, UserError
from src.utils.signals import Signals

_WORDS: dict[int, str] = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


@dataclass(frozen=True)
class Command:
    """A command that has begun.

    Attributes:
        flags: {key: value as typed}, which win over what checkpoints record.
        names: positional arguments.
        config: the resolved src.utils.config.Config.
        communicator: the src.parallel.communicator.Communicator of this process.
    """

    flags: Mapping[str, str]
    names: Sequence[str]
    config: Any
    communicator: Any

    def select_device(self, collectives: bool = False) -> None:
        """Choose the device of this rank: ``device_id``, or the rank's number on its machine. Imports MindSpore."""
        from src.utils.device import select_device
        device = self.config.device_id if self.config.device_id is not None else self.communicator.local_rank
        if self.config.device_target == "GPU":
            if self.communicator.local_rank == 0:
                compile_gpu_kernels(device)
            self.communicator.barrier()
        select_device(self.config.device_target, device, collectives)


def compile_gpu_kernels(device_id: int) -> None:
    """Compile MindSpore's kernels for a GPU that is newer than they are, once for a machine; one rank of it calls this."""
    from contextlib import contextmanager
    from importlib.util import find_spec

    from src.parallel.long_task import LongTask, note
    from src.utils.gpu_kernels import compile_kernels

    @contextmanager
    def watch(count: int) -> Iterator[LongTask]:
        note("this GPU is newer than MindSpore's kernels: they are compiled for it, once for this machine (10 minutes of one core)")
        with LongTask("compiled", count, "kernel module") as task:
            yield task

    mindspore = find_spec("mindspore")
    if mindspore is not None and mindspore.origin:
        compile_kernels(Path(mindspore.origin).parent / "lib" / "plugin" / "gpu" / "libcuda_ops.so.11", device_id, watch)


def begin(arguments: Sequence[str], names: str = "", distributed: bool = True) -> Command:
    """Resolve the command line, connect the ranks and prepare this process, before MindSpore is imported.

    Args:
        names: for commands that need positional arguments, what to type before and for them; "" for commands without.
        distributed: False for commands that run as one process.

    Raises:
        UserError: for a wrong command line, one that contradicts how the process was started, or one that differs between ranks.
    """
    from src.dataset.augmentations import check_augmentations
    from src.dataset.sources import check_source
    from src.models.blocks import find_block
    from src.models.networks import check_network
    from src.parallel.agreement import agree
    from src.parallel.communicator import Communicator, connect
    from src.parallel.launcher import hand_over_from_torch
    from src.training.update_rules import make_rule
    from src.utils.config import Affects, keys_affecting, load_config, parse_flags
    from src.utils.device import available_cores
    from src.utils.versions import software

    if distributed:
        hand_over_from_torch()
    flags, found = parse_flags(arguments)
    if found and not names:
        raise UserError(f"'{found[0]}' is not a flag; write --KEY=VALUE")
    if names and not found:
        what = names.rpartition(" ")[2].lower().partition("_")[0]
        raise UserError(f"no {what} given: python3 {os.path.basename(sys.argv[0])} {names}...")
    config = load_config(flags)
    check_network(config.network)
    find_block(config.block)
    check_source(config.dataset_format)
    check_augmentations(config)
    make_rule(config)
    if distributed and config.ranks and not started_by_mpirun():
        start_ranks(config)
    communicator = connect(config.run_distribute) if distributed else Communicator()
    communicator.watch_for_stalls(config.stall_timeout_s)
    agree(communicator, config.model_dump(mode="json", exclude=keys_affecting(Affects.IMAGES, Affects.PROCESS)))
    agree(communicator, software(), "install the same on every host, or share one folder")
    prepare_rank(communicator, config.device_target, config.threads)
    agree(communicator, {"cores of each rank": available_cores()}, "--threads=1, or more, gives all of them the same")
    return Command(flags, found, config, communicator)


def start_ranks(config: Any) -> None:
    """Become scripts/launch.py with the ranks that the key ``ranks`` asks for, and the global batch of one process; return for one rank.

    Raises:
        UserError: if there are fewer cores, or none to count, or ``run_distribute`` forbids it.
    """
    from src.dataset.batches import global_batch
    from src.parallel.launcher import hand_over
    from src.utils.device import available_cores

    # Before there are ranks, around whose errors mpirun has words of its own.
    if config.checkpoint_file_path and not os.path.exists(config.checkpoint_file_path):
        raise UserError(f"checkpoint '{config.checkpoint_file_path}' does not exist")
    if config.data_path not in ("", "digits") and not os.path.exists(config.data_path):
        raise UserError(f"data_path '{config.data_path}' does not exist; pass --data_path=DIR, or link your data to that name")
    if config.run_distribute is False:
        raise UserError(f"ranks={config.ranks} and run_distribute=0 contradict each other")
    if config.ranks == "auto" and config.device_target != "CPU":
        raise UserError("ranks=auto counts cores; on devices give their number, as in --ranks=8")
    if config.ranks != "auto" and config.device_target == "CPU" and config.ranks > available_cores():
        raise UserError(f"ranks={config.ranks}, but this process may use {available_cores()} cores; mpirun -n {config.ranks} makes ranks "
                        "share them")
    batch, ranks = global_batch(config, 1), config.ranks
    if ranks == "auto":
        forward = batch // config.accumulation_steps
        ranks = max(number for number in range(1, available_cores() + 1) if forward % number == 0)
    if ranks > 1:
        hand_over(ranks, [*sys.argv, "--run_distribute=1", f"--global_batch_size={batch}"])


def ranks_hint(config: Any, size: int, kernels: str) -> str | None:
    """What to say to a user who could train faster on ranks of this machine, or None.

    oneDNN's kernels use the cores of one process as well as ranks do; MindSpore's own do not (docs/distributed.md).
    """
    from src.utils.device import available_cores

    cores = available_cores()
    if config.device_target != "CPU" or kernels != "mindspore" or size > 1 or cores < 2 or config.run_distribute is False:
        return None
    return (f"one process computes on {cores} cores; --ranks=auto, a rank on each, trains 1.1 to 1.5 times as fast with these kernels on "
            "2 cores")


def prepare_rank(communicator: Any, device_target: str = "CPU", threads: int = 0) -> None:
    """Place this rank on its cores and set what MindSpore and other libraries read when they are imported.

    Raises:
        UserError: if a driver or library of the device, or a core, is missing.
    """
    from src.parallel.placement import pin_to_own_cores
    from src.utils.device import prepare_process
    pin_to_own_cores(communicator.local_rank, communicator.local_size, threads)
    prepare_process(device_target)


def run_main(main: Callable[..., object], rank: int = 0, defers_signals: bool = False, takes_keys: bool = False) -> None:
    """Run ``main(arguments)``, or ``main(arguments, signals)`` with ``defers_signals``, and end the process.

    Status 0; 2 after a UserError; 1 after an Incomplete or a defect; 128 + the number of a signal after that signal. Errors are one
    line, on one rank, and end every rank. ``--help`` prints the text of main's module and, with ``takes_keys``, what the keys mean.

    Args:
        main: takes the list of command-line arguments.
        rank: this process's number as its launcher gave it.
        defers_signals: also give it a Signals, by which it can finish what it is doing when it is told to stop.
        takes_keys: whether every key of the configuration is a flag.
    """
    _open_standard_streams()
    show_hidden_output()
    arguments = sys.argv[1:]
    about = sys.modules[main.__module__].__doc__ or ""
    if takes_keys:
        main = _with_help(main, about, rank)
    elif arguments[:1] in (["-h"], ["--help"]):
        print(about)
        return
    signals = Signals(lambda number: end_process(f"error: {_WORDS.get(number, 'stopped')}", 128 + number, rank))
    if rank == 0:
        tell_launcher_state("begun")
    try:
        main(arguments, *([signals] if defers_signals else []))
        sys.stdout.flush()
    except BrokenPipeError:
        # Nobody reads the output any more, as behind `| head`: the status that a shell gives such a command.
        os._exit(128 + signal.SIGPIPE)
    except UserError as failure:
        whose = _whose(rank)
        end_process(f"error: {whose}{failure}", failure.status, rank)
    except Stopped as stop:
        sys.stdout.flush()
        if rank != 0:
            # Rank 0 first: the launcher reports the status of the first that ends.
            time.sleep(PATIENCE_S)
        os._exit(128 + stop.signal)
    except ImportError as failure:
        end_process(f"error: {failure}; run 'bash scripts/setup.sh', then 'source .venv/bin/activate'", 2, rank)
    except OSError as failure:
        whose = _whose(rank)
        place = f" '{failure.filename}'" if failure.filename else ""
        end_process(f"error: {whose}the system refuses{place}: {failure.strerror or failure}", 2, rank)
    except Exception as failure:  # a defect or an exhausted machine: still one line, and no rank left waiting
        if os.environ.get("ACNET_TRACEBACK"):
            traceback.print_exc()
        reason = _reason(failure)
        end_process(f"error: {_whose(rank) or 'rank 0: '}{type(failure).__name__}: {reason} (ACNET_TRACEBACK=1 shows where)", 1, rank)
    # What Python and the libraries registered for the end, MPI's finalisation too, but not the 0.5 s in which MindSpore takes
    # its libraries down piece by piece: the operating system does that at once.
    atexit._run_exitfuncs()
    if rank == 0:
        tell_launcher_state("end")
    os._exit(0)


def _with_help(main: Callable[..., object], about: str, rank: int) -> Callable[..., object]:
    """``main``, or in its place what prints, on rank 0, the help that its arguments ask for."""
    def helpful(arguments: Sequence[str], *others: Any) -> object:
        asked = next((number for number, word in enumerate(arguments) if word.partition("=")[0] in ("-h", "--help")), None)
        if asked is None and "--list" not in arguments:
            return main(arguments, *others)
        from src.help import help_text, list_text
        if rank:
            return None
        if asked is None:
            return print(list_text())
        _, _, key = arguments[asked].partition("=")
        following = arguments[asked + 1:asked + 2]
        if not key and following and not following[0].startswith("-"):
            key = following[0]
        return print(help_text(about, key, os.path.splitext(os.path.basename(sys.argv[0]))[0]))
    return helpful


def _reason(failure: Exception) -> str:
    """One line of a failure's text."""
    text = str(failure)
    if "CPU AOT kernel" in text:
        from src.kernels.library import last_error
        return last_error()
    # MindSpore's messages have headings between dashes.
    return next((line for line in text.splitlines() if line.strip() and line[0] != "-"), "")


def _whose(rank: int) -> str:
    """Whose error it is, for errors of other ranks than 0, and their host if there are several."""
    return "" if not rank else f"rank {rank}: " if on_one_machine() else f"rank {rank} on {os.uname().nodename}: "


def _open_standard_streams() -> None:
    """Make sure that there are standard streams, and that no name is too strange for them.

    A file that is opened while one of the first three descriptors is free gets its number, and whatever a library writes there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    # Python has none for a descriptor that was closed when it started.
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
