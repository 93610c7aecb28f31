"""Going on with a run from its checkpoint, as if it had never stopped."""

from dataclasses import dataclass
from pathlib import Path

from src.models.formats import Arrays
from src.parallel.communicator import Communicator
from src.runs.run_folder import RunFolder
from src.runs.training_state import TrainingState, read_training_state
from src.utils.config import Affects, Config, keys_affecting
from src.utils.errors import UserError

_KEYS_SHOWN = 3


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to go on from, and those that were passed over for it."""

    path: Path
    state: TrainingState
    arrays: Arrays
    passed_over: tuple[str, ...] = ()

    @property
    def run_folder(self) -> RunFolder:
        """The folder of the run, in which it goes on."""
        parent = self.path.parent
        return RunFolder(parent.parent if parent.name == "ckpt_0" else parent)


def find_resume_point(config: Config, communicator: Communicator) -> ResumePoint:
    """The ResumePoint that ``config.resume`` names: a file, or "auto", the newest checkpoint under output_path.

    Rank 0 lists the checkpoints; the first that every rank can read is the one that all take.

    Raises:
        UserError: if there is none, or the run differs from ``config`` in what it computes (the keys are named).
    """
    found = communicator.from_root(_newest_first(config.output_path) if config.resume == "auto" else [config.resume])
    if not found:
        raise UserError(f"resume=auto finds no checkpoint under output_path '{config.output_path}'")
    failures: list[str] = []
    for number, path in enumerate(found):
        read, failure = _try_to_read(path)
        failures += [message for message in communicator.gather(failure) if message][:1]
        if read is not None and len(failures) == number:
            state, arrays = read
            _check_same_training(path, state, config)
            return ResumePoint(Path(path), state, arrays, tuple(found[:number]))
    raise UserError(failures[-1])


def check_batches(point: ResumePoint, steps_per_epoch: int, labels: int) -> None:
    """Raise UserError if the continued run would form other global batches than the run that stopped.

    Args:
        labels: checksum of the labels of the training images.
    """
    if point.state.labels != labels:
        raise UserError(f"'{point.path}' was trained on other images than data_path holds now; give the same data, or start "
                        f"anew from its weights with --checkpoint_file_path={point.path}")
    if point.state.steps_per_epoch != steps_per_epoch:
        raise UserError(f"'{point.path}' made {point.state.steps_per_epoch} steps per epoch and this run would make "
                        f"{steps_per_epoch}; keep the data and the global batch (--global_batch_size)")


def resume_line(point: ResumePoint, size: int) -> str:
    """What to say about a resumed run on ``size`` ranks."""
    text = f"going on from {point.path} after step {point.state.step}"
    if point.passed_over:
        text += f"; passed over, as damaged: {', '.join(point.passed_over)}"
    if point.state.world_size != size:
        text += (f"; it ran on {point.state.world_size} ranks and goes on with {size}: the same global batches, but sums are "
                 "rounded in another order and batch norm sees other shares")
    return text


def _newest_first(output_path: str) -> list[str]:
    files = [*Path(output_path).glob("*/ckpt_0/*.ckpt"), *Path(output_path).glob("*/best.ckpt")]
    found = sorted((file for file in files if not file.name.startswith(".")), key=lambda file: -file.stat().st_mtime_ns)
    return [str(file) for file in found]


def _try_to_read(path: str) -> tuple[tuple[TrainingState, Arrays] | None, str]:
    """(what the checkpoint holds, "") or (None, why it cannot be read)."""
    try:
        return read_training_state(path), ""
    except UserError as failure:
        return None, str(failure)


def _check_same_training(path: str, state: TrainingState, config: Config) -> None:
    """Raise UserError if a key that changes what is computed differs."""
    fixed = keys_affecting(Affects.MODEL, Affects.GRAPH, Affects.TRAINING)
    present = config.model_dump(mode="json", include=fixed)
    differing = [key for key in Config.model_fields if key in fixed and state.config.get(key) != present[key]]
    if differing:
        shown = ", ".join(f"{key}={state.config.get(key)} there and {present[key]} here" for key in differing[:_KEYS_SHOWN])
        more = " ..." if len(differing) > _KEYS_SHOWN else ""
        raise UserError(f"'{path}' is of another training: {shown}{more}")
