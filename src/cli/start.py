"""Starts a command: from the command line to connected ranks, before MindSpore is imported."""

import os
import sys
import warnings
from collections.abc import Callable, Sequence

from src.cli.command import Command
from src.cli.config import Affects, Config, keys_affecting
from src.cli.flags import misplaced_flags, parse_flags
from src.cli.help import help_text, key_help_text, list_text
from src.cli.recipes import check_default_config, load_config
from src.dataset.augmentations import check_augmentations
from src.dataset.batches import global_batch_size
from src.dataset.sources import check_source
from src.distributed.communicator import Communicator, check_ranks_agree, connect
from src.distributed.launcher import (
    exec_launcher,
    exec_launcher_under_torchrun,
    has_launcher,
    launched_here,
    launched_ranks,
    single_process_warning,
)
from src.distributed.reducers import check_reducer
from src.distributed.shutdown import Signals
from src.inference.formats import check_format
from src.kernels.library import choose_kernels, last_error
from src.models.blocks import find_block
from src.models.networks import check_network
from src.models.published_weights import fetch_weights
from src.training.losses import check_loss
from src.training.schedules import create_schedule
from src.training.update_rules import create_update_rule
from src.utils.device import prepare_process
from src.utils.errors import DamagedImage, UserError
from src.utils.machine import available_cores, set_cpu_affinity, software_versions
from src.utils.progress import print_status


def start(
    arguments: Sequence[str], signals: Signals, positional: str = "", distributed: bool = False
) -> Command:
    """Resolve the command line, connect the ranks and prepare this process.

    Args:
        positional: what to type for the positional arguments; "" for commands without.
        distributed: whether the command runs on several ranks.

    Raises:
        UserError: for a wrong command line, one that contradicts how the process was started, or
            one that differs between ranks.
    """
    if distributed:
        exec_launcher_under_torchrun()
    flags, names = parse_flags(arguments)
    _check_positional(names, positional)
    check_default_config()
    config = load_config(flags)
    _check_names(config)
    fetch_weights(config.checkpoint_file_path)
    if distributed and config.ranks and not has_launcher():
        _launch_ranks(config)
    if distributed and isinstance(config.ranks, int) and has_launcher():
        _check_rank_count(config.ranks)
    communicator = connect(config.run_distribute) if distributed else Communicator()
    communicator.watch_for_stalls(config.stall_timeout_s)
    may_differ = keys_affecting(Affects.IMAGES, Affects.PROCESS)
    check_ranks_agree(communicator, config.model_dump(mode="json", exclude=may_differ))
    check_ranks_agree(
        communicator, software_versions(), "install the same on every host, or share one folder"
    )
    prepare_rank(communicator, config.device_target, config.threads)
    if config.strict:
        warnings.simplefilter("error", DamagedImage)
    check_ranks_agree(
        communicator,
        {"cores of each rank": available_cores()},
        "pass the same --threads=N to all of them, such as --threads=1",
    )
    kernels = choose_kernels(config)
    check_ranks_agree(
        communicator,
        {"kernels": kernels.name},
        "build them on every host, or pass --kernels=mindspore; a limit such as "
        "ONEDNN_MAX_CPU_ISA=AVX2 makes processors of different age compute the same",
    )
    command = Command(flags, names, config, communicator, kernels, signals)
    messages = misplaced_flags(flags, _command_name())
    if not distributed and (warning := single_process_warning(_command_name())):
        messages.append(warning)
    if communicator.is_root:
        for message in messages:
            command.checked(print_status)(message)
    return command


def print_help(about: str, rank: int) -> bool:
    """Print, on rank 0, the help that the command line asks for.

    Returns:
        Whether it asks for any.
    """
    arguments = sys.argv[1:]
    wants_help = (arg.partition("=")[0] in ("-h", "--help") for arg in arguments)
    index = next((index for index, wants in enumerate(wants_help) if wants), None)
    if index is None and "--list" not in arguments:
        return False
    if rank != 0:
        return True
    if index is None:
        print(list_text())
        return True
    _, _, key = arguments[index].partition("=")
    following = arguments[index + 1 : index + 2]
    if not key and following and not following[0].startswith("-"):
        key = following[0]
    print(key_help_text(key) if key else help_text(about, _command_name()))
    return True


def run_main(main: Callable[[Command], object], command: Command) -> None:
    """Run ``main``. If a kernel fails, raise its own message: MindSpore's does not say why."""
    try:
        main(command)
    except RuntimeError as failure:
        if "CPU AOT kernel" not in str(failure):
            raise
        raise RuntimeError(last_error()) from failure


def prepare_rank(communicator: Communicator, device_target: str = "CPU", threads: int = 0) -> None:
    """Bind this rank to its cores, and set what libraries read when they are imported.

    Raises:
        UserError: if a driver or library of the device, or a core, is missing.
    """
    set_cpu_affinity(communicator.local_rank, communicator.local_size, threads)
    prepare_process(device_target)


def _command_name() -> str:
    """The name of the script that runs, without its ending."""
    return os.path.splitext(os.path.basename(sys.argv[0]))[0]


def _check_positional(names: Sequence[str], positional: str) -> None:
    if names and not positional:
        raise UserError(f"'{names[0]}' is not a flag; write --KEY=VALUE")
    if positional and not names:
        what = positional.rpartition(" ")[2].lower().partition("_")[0]
        script = os.path.basename(sys.argv[0])
        raise UserError(f"no {what} given: python3 {script} {positional}...")


def _check_names(config: Config) -> None:
    """Raise UserError for a name that is in none of the tables."""
    check_network(config.network)
    find_block(config.block)
    create_update_rule(config)
    create_schedule(config)
    check_loss(config)
    check_source(config.dataset_format)
    check_augmentations(config)
    check_reducer(config)
    check_format(config.file_format)


def _check_rank_count(ranks: int) -> None:
    """Raise UserError if the launcher started another number of ranks, in all and here."""
    if launched_here() and ranks not in (0, launched_ranks(), launched_here()):
        raise UserError(
            f"ranks={ranks}, but the launcher started {launched_ranks()}; pass the number to one "
            "of them only"
        )


def _launch_ranks(config: Config) -> None:
    """Re-execute under scripts/launch.py with ``config.ranks`` ranks and the same global batch.

    Returns if one rank is enough.

    Raises:
        UserError: if there are fewer cores, if the number of ranks cannot be found automatically,
            or if run_distribute=0.
    """
    # Check these before launching: mpirun buries the error of a rank in its own output.
    if config.data_path not in ("", "digits") and not os.path.exists(config.data_path):
        raise UserError(
            f"data_path '{config.data_path}' does not exist; pass --data_path=DIR, or link your "
            "data to that name"
        )
    if config.run_distribute is False:
        raise UserError(f"ranks={config.ranks} and run_distribute=0 contradict each other")
    cores = available_cores()
    if config.ranks == "auto" and config.device_target != "CPU":
        raise UserError("ranks=auto counts CPU cores; on devices pass a number, as in --ranks=8")
    if config.ranks != "auto" and config.device_target == "CPU" and config.ranks > cores:
        raise UserError(
            f"ranks={config.ranks}, but this process may use {cores} cores; "
            f"mpirun -n {config.ranks} makes ranks share them"
        )
    batch = global_batch_size(config, 1)
    micro_batch = batch // config.accumulation_steps
    ranks = config.ranks
    if ranks == "auto":
        ranks = max(count for count in range(1, cores + 1) if micro_batch % count == 0)
    assert isinstance(ranks, int)
    trains = _command_name() != "eval"
    if trains and micro_batch % ranks and not config.fit_batch:
        raise UserError(
            f"{batch} images per step cannot be divided evenly among ranks={ranks}; pass "
            f"--global_batch_size=N, a multiple of {ranks * config.accumulation_steps}"
        )
    if ranks > 1:
        same_batch = [f"--global_batch_size={batch}"] if trains else []
        exec_launcher(ranks, [*sys.argv, "--run_distribute=1", *same_batch])
