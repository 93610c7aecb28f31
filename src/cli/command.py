"""The object that every command receives, and the device that each of its ranks takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from src.cli.config import Config
from src.distributed.shutdown import Signals
from src.kernels.library import KernelChoice
from src.utils.device import select_device
from src.utils.errors import UserError
from src.utils.gpu import visible_gpus
from src.utils.log import Log, refuse_warnings
from src.utils.machine import check_address_space
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

    @property
    def needs_mindspore(self) -> bool:
        """Whether the command needs MindSpore. ONNX files do not, on CPU."""
        config = self.config
        return config.device_target != "CPU" or not config.checkpoint_file_path.endswith(".onnx")

    def start_mindspore(self, collectives: bool = False) -> None:
        """Import MindSpore and select this rank's device.

        Args:
            collectives: connect the devices of all ranks, for their own collective operations.

        Raises:
            UserError: if MindSpore cannot run in this process, or cannot use the device.
        """
        check_address_space()
        if self.communicator.is_root and self.config.checkpoint_file_path:
            print_status(f"loading {self.config.checkpoint_file_path}")
        device = 0
        if self.config.device_target != "CPU":
            device = choose_device(self.config, self.communicator, collectives)
        prepare = self.communicator.local_rank == 0
        select_device(
            self.config.device_target, device, prepare, self.communicator.barrier, collectives
        )


def choose_device(config: Config, communicator: "Communicator", collectives: bool) -> int:
    """Index of this rank's device among those that it sees. Every rank calls it.

    It is ``device_id``. Without that key, a rank that sees one GPU takes it, as under
    `srun --gpus-per-task=1`; others take the one with the rank's index on its machine.

    Args:
        collectives: whether NCCL or HCCL will connect the devices: each rank needs its own then.

    Raises:
        UserError: on every rank, if a rank's device does not exist or is another rank's too.
    """
    device = communicator.local_rank if config.device_id is None else config.device_id
    name, problem = str(device), ""
    if config.device_target == "GPU":
        gpus = visible_gpus()
        if config.device_id is None and len(gpus) == 1:
            device = 0
        if device < len(gpus):
            name = gpus[device]
        else:
            problem = (
                f"device_target=GPU: there is no GPU number {device}; this machine has "
                f"{len(gpus)}; start one rank per GPU, or choose with --device_id"
            )
    places = communicator.all_gather((problem, communicator.hosts[communicator.rank], name))
    for found, _, _ in places:
        if found:
            raise UserError(found)
    for rank, place in enumerate(places):
        first = places.index(place)
        if collectives and first < rank:
            raise UserError(
                f"ranks {first} and {rank} would both compute on {config.device_target} {place[2]} "
                f"of {place[1]}, and NCCL needs one for each; leave --device_id out, start fewer "
                "ranks, or add --reducer=mpi"
            )
    return device
