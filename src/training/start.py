"""What a run starts from: a checkpoint to resume, pretrained weights, or random weights."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from src.cli.config import Affects, Config, default_values, keys_affecting
from src.cli.flags import current_keys
from src.dataset.batches import global_batch_size
from src.dataset.image_set import ImageSet, are_numbers_sorted_as_text, shared_images
from src.distributed.communicator import Communicator
from src.inference.checkpoint_model import (
    infer_model_settings,
    open_recorded_training_images,
    recorded_classes,
)
from src.models.networks import count_classes
from src.models.published_weights import local_weights
from src.models.weight_files import Arrays, read_weights
from src.models.weights import Head, assign_weights
from src.runs.checkpoint import TrainingState, read_training_state
from src.runs.run_folder import NO_POSITION, RunFolder, checkpoint_position, run_date
from src.training.schedules import create_schedule
from src.training.trainer import Trainer
from src.utils.errors import UserError
from src.utils.log import WARNING
from src.utils.machine import software_versions

_KEYS_SHOWN = 3


@dataclass(frozen=True)
class RandomWeights:
    """The weights that the network was created with."""

    run_folder = None

    def load_into(self, trainer: Trainer) -> str | None:
        """Start a new run. Returns a message for the log, or None."""
        trainer.recorder.start(trainer.class_to_index)
        return None


@dataclass(frozen=True)
class PretrainedWeights:
    """A file of weights.

    Attributes:
        settings: {key: value} of its network and preprocessing, as far as the file tells. Without
            num_classes: the data decides how many classes are trained.
        class_to_index: its class map, if it has one.
        metadata: what the file records of the run that wrote it; {} if that is another program's.
    """

    path: str
    arrays: Arrays
    settings: dict[str, Any]
    class_to_index: dict[str, int] | None
    metadata: Mapping[str, Any]
    run_folder = None

    def load_into(self, trainer: Trainer) -> str:
        """Start a new run from the weights. Returns a message for the log.

        With allow_head_mismatch the classifier starts from random weights if the weights are for
        other classes, even if there are as many.

        Raises:
            UserError: if the weights do not fit.
        """
        config = trainer.config
        other_classes = self.class_to_index not in (None, trainer.class_to_index)
        if self.class_to_index is None:
            # Nobody knows in which order the classes of such weights are.
            other_classes = are_numbers_sorted_as_text(trainer.class_to_index)
        if other_classes and not config.allow_head_mismatch:
            raise UserError(
                f"the classifier of '{self.path}' is for other classes than the data; "
                "--allow_head_mismatch=1 starts with a new classifier"
            )
        head = Head.LEAVE_OUT if other_classes else Head.LOAD_IF_IT_FITS
        if not config.allow_head_mismatch:
            head = Head.LOAD
        left_out = assign_weights(trainer.network, self.arrays, self.path, head)
        trainer.recorder.start(trainer.class_to_index)
        trainer.has_pretrained_classifier = not left_out
        message = f"starting from {self.path}"
        if not left_out and self.class_to_index is None:
            names = ", ".join([*trainer.class_to_index][:_KEYS_SHOWN])
            message += f", which records no class names; assuming {names}, ... in this order"
        if left_out:
            message += (
                f" without {', '.join(left_out)}: the classifier starts from random weights, for "
                f"{config.num_classes} classes"
            )
            before = count_classes(self.arrays, config.network)
            if set(self.class_to_index or ()) == set(trainer.class_to_index):
                message += f", which '{self.path}' has in another order"
            elif before is not None:
                other = " other" if before == config.num_classes else ""
                message += f" instead of {before}{other}"
        # Rank 0 reads the files, and only its lines are seen.
        if trainer.communicator.is_root and trainer.data.validation is not None:
            trainer.seen_before = self._seen_images(trainer, trainer.data.validation)
        if trainer.seen_before:
            message += (
                f"\n{WARNING}{trainer.seen_before} of {len(trainer.data.validation or ())} "
                f"validation images are among those that {self.path} was trained on; the accuracy "
                "says little about unseen images"
            )
        return message

    def _seen_images(self, trainer: Trainer, validation: ImageSet) -> int:
        """How many validation images the weights were trained on, as far as is known."""
        trained = open_recorded_training_images(self.metadata, self.class_to_index)
        seen = len(shared_images(trained, validation)) if trained is not None else 0
        is_same = self.metadata.get("validation") == trainer.fingerprints[1]
        # Those that the weights before these were trained on.
        return max(seen, self.metadata.get("seen_before", 0) if is_same else 0)


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to resume from.

    Attributes:
        skipped: newer checkpoints that are damaged or belong to another run.
    """

    path: Path
    state: TrainingState
    arrays: Arrays
    skipped: tuple[str, ...] = ()

    @property
    def run_folder(self) -> RunFolder:
        """The folder of the run, in which it continues."""
        return RunFolder.of_checkpoint(self.path)

    def load_into(self, trainer: Trainer) -> str:
        """Continue the run. Returns a message for the log.

        Raises:
            UserError: if the run would form other global batches than before.
        """
        check_images(self, trainer)
        state, lines = self._set_aside_later_checkpoints(trainer)
        evaluates = trainer.data.validation is not None
        is_same = state.validation in (None, trainer.fingerprints[1])
        if state.best_top1 >= 0 and evaluates and not is_same:
            # Accuracies on other images cannot be compared.
            state = replace(state, best_top1=-1.0, best_loss=math.inf, since_best=0)
            lines.append(
                f"{WARNING}the validation images have changed, so the best accuracy starts again"
            )
        if state.best_top1 >= 0 and not evaluates:
            lines.append(
                f"{WARNING}best.ckpt stays as it was, because the run no longer evaluates; its "
                f"last weights are in {self.run_folder.latest}"
            )
        # A run can be killed after it wrote best.ckpt and before it wrote the epoch's checkpoint.
        is_best = self.path.name == "best.ckpt"
        trainer.restore(state, self.arrays, self.path, is_unsaved=is_best)
        if trainer.config.input_pipeline == "mindspore" and not state.finished_epoch:
            lines.append(
                f"{WARNING}input_pipeline=mindspore: augmentations in the rest of the epoch differ "
                "from those of an uninterrupted run"
            )
        if trainer.finished_reason:
            lines.append(f"nothing is left to train: {trainer.finished_reason}")
        elif trainer.communicator.is_root and not trainer.config.dry_run:
            lines += self._set_aside_fused()
        message = resume_message(
            self, trainer.communicator.size, trainer.threads, trainer.kernels.name
        )
        return "\n".join([message, *lines])

    def _set_aside_fused(self) -> list[str]:
        """Set the deployed network aside, which is not that of the weights to come."""
        folder = self.run_folder
        if not folder.fused.is_file():
            return []
        folder.set_aside([folder.fused])
        return [
            f"moved {folder.fused.name} to {folder.superseded}: it is not of the weights to come"
        ]

    def _set_aside_later_checkpoints(self, trainer: Trainer) -> tuple[TrainingState, list[str]]:
        """The state after checkpoints of later steps are set aside, and messages on that.

        The run does those steps again, and the next --resume=auto must not take the former ones.
        """
        folder, position = self.run_folder, self.state.position
        saved = folder.saved_checkpoints()
        later = [file for file in saved if checkpoint_position(file) > position]
        best_is_later = folder.best.is_file() and _position_of_best(folder.best) > position
        later += [folder.best] * best_is_later
        # Only rank 0's folder counts, as other hosts may have none.
        later, best_is_later = trainer.communicator.broadcast_object((later, best_is_later))
        if not later or trainer.config.dry_run:
            return self.state, []
        if trainer.communicator.is_root:
            folder.set_aside(later)
            folder.point_latest_at(self.path)
        names = ", ".join(file.name for file in later)
        message = f"{WARNING}moved checkpoints of later steps to {folder.superseded}: {names}"
        if not best_is_later:
            return self.state, [message]
        return replace(self.state, best_top1=-1.0, best_loss=math.inf, since_best=0), [message]


Start = RandomWeights | PretrainedWeights | ResumePoint


def read_pretrained(name: str, flags: Mapping[str, Any]) -> PretrainedWeights:
    """Read weights to start from: a file, or published weights that were fetched.

    Raises:
        UserError: if the file cannot be read, or holds a fused network, which has no batch norms to
            train with.
    """
    path = local_weights(name)
    arrays, metadata = read_weights(path)
    if metadata.get("fused"):
        raise UserError(
            f"'{path}' is a fused network, for deployment only; train the checkpoint that it was "
            "exported from"
        )
    settings = infer_model_settings(arrays, metadata, Path(path), flags)
    # How the new run prepares images is for its own flags to say.
    for name in ("num_classes", "input_pipeline"):
        settings.pop(name, None)
    classes = count_classes(arrays, settings.get("network", flags.get("network", "")))
    class_to_index = recorded_classes(metadata, Path(path), classes) if classes else None
    return PretrainedWeights(path, arrays, settings, class_to_index, metadata)


def choose_start(
    config: Config, pretrained: PretrainedWeights | None, communicator: Communicator
) -> Start:
    """What to start from; the order is important. Every rank calls it.

    1. A run to resume: its checkpoint has everything, also with --pretrained in the command.
    2. Pretrained weights.
    3. The random weights that ``seed`` drew.
    """
    if config.resume:
        return find_resume_point(config, communicator)
    return pretrained or RandomWeights()


def find_resume_point(config: Config, communicator: Communicator) -> ResumePoint:
    """The ResumePoint that ``config.resume`` names. Every rank calls it.

    That is a file, the folder of a run, or "auto" for the newest run under output_path. Of a run
    it is the checkpoint with the most steps, whatever the time of its file. All ranks take the
    first one that every rank can read and that belongs to the same run.

    Raises:
        UserError: if there is none; gives the reason for the newest.
    """
    paths = communicator.broadcast_object(_candidates(config))
    if not paths and config.resume == "auto":
        raise UserError(f"resume=auto finds no checkpoint under output_path '{config.output_path}'")
    if not paths:
        raise UserError(f"resume={config.resume} is not the folder of a run with checkpoints")
    skipped: list[str] = []
    reasons: list[str] = []
    for path in paths:
        read, reason = _try_to_read(path, config)
        failures = [text for text in communicator.all_gather(reason) if text]
        if read is not None and not failures:
            state, arrays = read
            return ResumePoint(Path(path), state, arrays, tuple(skipped))
        skipped.append(path)
        reasons += failures[:1]
    raise UserError(reasons[0])


def check_images(point: ResumePoint, trainer: Trainer) -> None:
    """Raise UserError if the resumed run would form other global batches or targets than before."""
    state, steps_per_epoch = point.state, trainer.steps_per_epoch
    is_other = (
        state.class_to_index != trainer.class_to_index
        or state.labels != trainer.labels_checksum
        or state.images not in (None, trainer.fingerprints[0])
    )
    if is_other:
        raise UserError(
            f"'{point.path}' was trained on other images than data_path has now; give the same "
            f"data, or start a new run from its weights with --checkpoint_file_path={point.path}"
        )
    teacher = trainer.teacher.checksum if trainer.teacher is not None else None
    if state.teacher not in (None, teacher):
        raise UserError(
            f"the file teacher={trainer.config.teacher} is not the network that '{point.path}' "
            "learned from; give the same file, or start a new run from its weights with "
            f"--checkpoint_file_path={point.path}"
        )
    before, now = _global_batch(state), trainer.batches.global_batch_size
    if before != now:
        raise UserError(
            f"'{point.path}' made steps of {before} images and this run would make steps of {now}; "
            f"keep the global batch: --global_batch_size={before}"
        )
    if state.steps_per_epoch != steps_per_epoch:
        raise UserError(
            f"'{point.path}' made {state.steps_per_epoch} steps per epoch and this run would "
            f"make {steps_per_epoch}; keep the data"
        )


def resume_message(point: ResumePoint, size: int, threads: Sequence[int], kernels: str) -> str:
    """Lines on a run that resumes on ``size`` ranks with these ``threads`` and ``kernels``.

    A difference that prevents bit-identical results is a warning.
    """
    state = point.state
    lines = [f"resuming from {point.path} after step {state.step}"]
    if point.skipped:
        lines.append(f"{WARNING}skipped, as damaged or of another run: {', '.join(point.skipped)}")
    if state.world_size != size:
        lines.append(
            f"{WARNING}it ran on {state.world_size} ranks and continues on {size}: the same global "
            "batches, but sums are rounded in another order and batch norm sees other shards"
        )
    elif state.threads != list(threads):
        lines.append(
            f"{WARNING}its ranks computed with {_counts(state.threads)} threads and continue with "
            f"{_counts(threads)}, which rounds sums in another order (--threads keeps the number)"
        )
    if state.kernels != kernels:
        lines.append(
            f"{WARNING}it computed with the kernels of {state.kernels} and continues with those of "
            f"{kernels}, which round differently"
        )
    software, now = state.software or {}, software_versions()
    changed = [name for name in software if name in now and software[name] != now[name]]
    for name in changed:
        # Any edit changes the program's version.
        weight = "" if name == "program" else WARNING
        lines.append(
            f"{weight}it ran with {name} {software[name]} and continues with {now[name]}, so "
            "results may differ"
        )
    return "\n".join(lines)


def _global_batch(state: TrainingState) -> int:
    """Images per step of the run that wrote ``state``."""
    config = Config(**current_keys({**default_values(), **state.config}))
    return global_batch_size(config, state.world_size)


def _counts(threads: Sequence[int]) -> str:
    return str(threads[0]) if len(set(threads)) == 1 else ", ".join(map(str, threads))


def _candidates(config: Config) -> list[str]:
    """Checkpoints that ``config.resume`` may mean, the newest first."""
    if config.resume == "auto":
        files = [file for run in _newest_first(config.output_path) for file in _checkpoints_of(run)]
    elif Path(config.resume).is_dir():
        folder = Path(config.resume)
        files = _checkpoints_of(folder.parent if folder.name == "ckpt_0" else folder)
    else:
        return [config.resume]
    return [str(file) for file in files]


def _newest_first(output_path: str) -> list[Path]:
    """The folders of the runs under ``output_path``.

    The newest run comes first, judging from its name, which begins with its date; of copies of a
    run the one with the most steps.
    """
    runs = [
        RunFolder(folder) for folder in Path(output_path).glob("*/") if (folder / "ckpt_0").is_dir()
    ]

    def age(run: RunFolder) -> tuple[Any, ...]:
        positions = map(checkpoint_position, run.saved_checkpoints())
        return *run_date(run.path), max(positions, default=NO_POSITION), run.path.name

    return [run.path for run in sorted(runs, key=age, reverse=True)]


def _checkpoints_of(run: Path) -> list[Path]:
    """The checkpoints in the folder of a run, those with the most steps first."""
    files = [f for f in (run / "ckpt_0").glob("*.ckpt") if not f.name.startswith(".")]
    files.sort(key=checkpoint_position, reverse=True)
    best = run / "best.ckpt"
    if best.is_file():
        position = _position_of_best(best)
        files.insert(sum(checkpoint_position(file) >= position for file in files), best)
    return files


def _position_of_best(file: Path) -> tuple[int, int]:
    """(epoch, steps in it) that best.ckpt records; NO_POSITION if it cannot be read."""
    try:
        state, _ = read_training_state(str(file))
    except UserError:
        return NO_POSITION
    return state.position


def _try_to_read(path: str, config: Config) -> tuple[tuple[TrainingState, Arrays] | None, str]:
    """(contents of the checkpoint, "") or (None, why it cannot be resumed)."""
    try:
        state, arrays = read_training_state(path)
        _check_same_training(path, state, config)
        RunFolder.of_checkpoint(Path(path))
    except UserError as failure:
        return None, str(failure)
    return (state, arrays), ""


def _check_same_training(path: str, state: TrainingState, config: Config) -> None:
    """Raise UserError if a key that affects the computation has changed."""
    fixed = keys_affecting(Affects.MODEL, Affects.GRAPH, Affects.TRAINING)
    if config.bad_samples == "replace":
        # It decides which images are replaced.
        fixed |= {"max_pixels"}
    # A key that did not exist yet had the meaning of its default.
    stored = current_keys({**default_values(), **state.config})
    present = config.model_dump(mode="json")
    if "reduced_decoding" not in state.config:
        # Before this key images were decoded whole; without antialias they still are.
        stored["reduced_decoding"] = "never" if stored["antialias"] else present["reduced_decoding"]
    differing = [
        key for key in Config.model_fields if key in fixed and stored.get(key) != present[key]
    ]
    # The size of images depends on max_epoch too.
    may_be_longer = _has_steps_left(state, config) and not config.progressive_size
    if set(differing) & {"max_epoch", "T_max"} and may_be_longer:
        before, now = _schedule_horizon(stored), _schedule_horizon(present)
        if before == now:
            differing = [key for key in differing if key not in ("max_epoch", "T_max")]
        elif differing == ["max_epoch"] and config.lr_scheduler == "cosine_annealing":
            raise UserError(
                f"'{path}' belongs to a run with max_epoch={stored['max_epoch']}, which its "
                f"learning rates depend on; to train longer, add --T_max={before:g}, which keeps "
                "the schedule"
            )
    if differing:
        shown = ", ".join(
            f"{key}={stored.get(key)} there and {present[key]} here"
            for key in differing[:_KEYS_SHOWN]
        )
        more = " ..." if len(differing) > _KEYS_SHOWN else ""
        raise UserError(f"'{path}' is of another run: {shown}{more}")


def _has_steps_left(state: TrainingState, config: Config) -> bool:
    return state.step <= config.max_epoch * state.steps_per_epoch


def _schedule_horizon(values: Mapping[str, Any]) -> float | None:
    """Number of epochs on which the learning rates depend, or None."""
    return create_schedule(Config(**values)).horizon_epochs
