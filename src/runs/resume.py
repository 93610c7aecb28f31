"""Going on with a run from its checkpoint, as if it had never stopped."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.models.formats import Arrays
from src.parallel.communicator import Communicator
from src.runs.run_folder import RunFolder
from src.runs.training_state import TrainingState, read_training_state
from src.utils.config import DEFAULT_CONFIG, Affects, Config, keys_affecting, read_layer
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
    def is_best(self) -> bool:
        """Whether it is a best.ckpt, behind which the run was killed before it saved the epoch's own checkpoint."""
        return self.path.parent.name != "ckpt_0"

    @property
    def run_folder(self) -> RunFolder:
        """The folder of the run, in which it goes on."""
        return RunFolder(self.path.parent if self.is_best else self.path.parent.parent)


def find_resume_point(config: Config, communicator: Communicator) -> ResumePoint:
    """The ResumePoint that ``config.resume`` names: a file, or "auto", the newest checkpoint under output_path.

    With "auto" the newest run comes first, and in it the checkpoint with the most steps, whatever the time of its file. The first
    that every rank can read, and that is of the same training, is the one that all ranks take.

    Raises:
        UserError: if there is none; says of the newest why it is not taken.
    """
    found = communicator.from_root(_newest_first(config.output_path) if config.resume == "auto" else [config.resume])
    if not found:
        raise UserError(f"resume=auto finds no checkpoint under output_path '{config.output_path}'")
    passed_over: list[str] = []
    reasons: list[str] = []
    for path in found:
        read, reason = _try_to_read(path, config)
        failures = [text for text in communicator.gather(reason) if text]
        if read is not None and not failures:
            state, arrays = read
            return ResumePoint(Path(path), state, arrays, tuple(passed_over))
        passed_over.append(path)
        reasons += failures[:1]
    raise UserError(reasons[0])


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


def resume_line(point: ResumePoint, size: int, threads: Sequence[int], kernels: str) -> str:
    """What to say about a resumed run on ``size`` ranks with so many ``threads`` and such ``kernels``."""
    text = f"going on from {point.path} after step {point.state.step}"
    if point.passed_over:
        text += f"; passed over, as damaged or of another training: {', '.join(point.passed_over)}"
    if point.state.world_size != size:
        text += (f"; it ran on {point.state.world_size} ranks and goes on with {size}: the same global batches, but sums are "
                 "rounded in another order and batch norm sees other shares")
    elif point.state.threads != list(threads):
        text += (f"; its ranks computed with {_numbers(point.state.threads)} threads and go on with {_numbers(threads)}, which rounds sums "
                 "in another order (--threads keeps the number)")
    if point.state.kernels != kernels:
        text += f"; it computed with the kernels of {point.state.kernels} and goes on with those of {kernels}, which round differently"
    return text


def _numbers(threads: Sequence[int]) -> str:
    return str(threads[0]) if len(set(threads)) == 1 else ", ".join(map(str, threads))


def _newest_first(output_path: str) -> list[str]:
    """Checkpoints of the runs under ``output_path``: the newest run first by its name, which is its date, the most steps first."""
    runs = sorted((folder for folder in Path(output_path).glob("*/") if (folder / "ckpt_0").is_dir()), reverse=True)
    found: list[Path] = []
    for run in runs:
        numbered = {file: _place_in_name(file) for file in (run / "ckpt_0").glob("*.ckpt") if not file.name.startswith(".")}
        files = sorted(numbered, key=lambda file: numbered[file], reverse=True)
        best = run / "best.ckpt"
        if best.is_file():
            step = _place_of_best(best)
            files.insert(sum(numbered[file] >= step for file in files), best)
        found += files
    return [str(file) for file in found]


def _place_in_name(file: Path) -> tuple[int, int]:
    """(epoch, steps of it) of NETWORK-EPOCH_STEPS.ckpt; (0, 0) for another name."""
    numbers = re.search(r"-(\d+)_(\d+)$", file.stem)
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)


def _place_of_best(file: Path) -> tuple[int, int]:
    """The same of best.ckpt, by what it records; (0, 0) if that cannot be read."""
    try:
        state, _ = read_training_state(str(file))
    except UserError:
        return 0, 0
    return state.epoch, state.step - (state.epoch - 1) * state.steps_per_epoch


def _try_to_read(path: str, config: Config) -> tuple[tuple[TrainingState, Arrays] | None, str]:
    """(what the checkpoint holds, "") or (None, why it is not one to go on from)."""
    try:
        state, arrays = read_training_state(path)
        _check_same_training(path, state, config)
    except UserError as failure:
        return None, str(failure)
    return (state, arrays), ""


def _check_same_training(path: str, state: TrainingState, config: Config) -> None:
    """Raise UserError if a key differs that changes what was computed up to here."""
    fixed = keys_affecting(Affects.MODEL, Affects.GRAPH, Affects.TRAINING)
    # A key that there was not yet had the meaning of its default.
    present, stored = config.model_dump(mode="json"), {**read_layer(DEFAULT_CONFIG), **state.config}
    differing = [key for key in Config.model_fields if key in fixed and stored.get(key) != present[key]]
    if set(differing) & {"max_epoch", "T_max"} and state.step <= config.max_epoch * state.steps_per_epoch:
        if config.lr_scheduler != "cosine_annealing" or _cosine_length(stored) == _cosine_length(present):
            differing = [key for key in differing if key not in ("max_epoch", "T_max")]
        elif differing == ["max_epoch"]:
            raise UserError(f"'{path}' is of a training with max_epoch={stored['max_epoch']}, on which its learning rates depend; to go on "
                            f"for longer add --T_max={_cosine_length(stored):g}, which keeps them as they were")
    if differing:
        shown = ", ".join(f"{key}={stored.get(key)} there and {present[key]} here" for key in differing[:_KEYS_SHOWN])
        more = " ..." if len(differing) > _KEYS_SHOWN else ""
        raise UserError(f"'{path}' is of another training: {shown}{more}")


def _cosine_length(config: Mapping[str, Any]) -> float:
    """Epochs over which cosine_annealing falls."""
    return config["T_max"] or config["max_epoch"]
