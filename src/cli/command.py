"""The object that every command receives."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from src.cli.config import Config
from src.distributed.placement import choose_device
from src.distributed.shutdown import Signals
from src.kernels.library import KernelChoice
from src.utils.device import select_device
from src.utils.log import Log, refuse_warnings
from src.utils.progress import print_status

if TYPE_CHECKING:  # it imports numpy, which starts threads (see run.py)
    from src.distributed.communicator import Communicator


@dataclass(frozen=True)
class Command:
    """A command that has started: its flags are checked and its ranks connected.

    Attributes:
        flags: {key: value as typed}; they win over what checkpoints record.
        positional: positional arguments.
        config: the configuration from the command line.
        communicator: connects this process to the other ranks.
        kernels: what this process computes convolutions with on CPU.
        signals: receives signals to stop.
    """

    flags: Mapping[str, str]
    positional: Sequence[str]
    config: Config
    communicator: "Communicator"
    kernels: KernelChoice
    signals: Signals

    def checked(self, log: Log) -> Log:
        """``log`` itself, or with --strict=1 a log that turns warnings into errors."""
        return refuse_warnings(log) if self.config.strict else log

    def start_mindspore(self, collectives: bool = False) -> None:
        """Import MindSpore and select this rank's device.

        Args:
            collectives: connect the devices of all ranks, for their own collective operations.
        """
        if self.communicator.is_root and self.config.checkpoint_file_path:
            print_status(f"loading {self.config.checkpoint_file_path}")
        device = 0
        if self.config.device_target != "CPU":
            device = choose_device(self.config, self.communicator, collectives)
        prepare = self.communicator.local_rank == 0
        select_device(
            self.config.device_target, device, prepare, self.communicator.barrier, collectives
        )
