"""Evaluation: every image counts exactly once, for any number of ranks."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import log_softmax

from src.cli.command import Command
from src.cli.config import Config
from src.dataset.batches import PADDING_LABEL, UNDECODABLE_LABEL, EvalBatches, prefetch
from src.dataset.image_set import ImageSet, class_names
from src.dataset.imagefolder import MindSporeEvalBatches
from src.dataset.splits import empty_classes_message, left_out_message, split_fraction
from src.distributed.communicator import Communicator, check_ranks_agree
from src.inference.backends import (
    Backend,
    OpenedModel,
    faster_backend_hint,
    open_backend,
    with_flip,
)
from src.inference.checkpoint_model import CheckpointModel
from src.runs.checkpoint import find_checkpoints, in_order
from src.utils.errors import PartialFailure, UserError
from src.utils.files import checksum, write_whole
from src.utils.log import LINE_S, WARNING, Log, create_log, escaped, no_log
from src.utils.progress import ProgressBar

_TOP = 5
_LARGEST_BATCH = 64
_NAMED = 5
_CLASSES_SHOWN = 24


def evaluate(command: Command) -> None:
    """The command eval.py: evaluate the checkpoints that the command line names."""
    config, communicator = command.config, command.communicator
    log = command.checked(create_log()) if communicator.is_root else no_log
    paths = find_checkpoints(config.checkpoint_file_path)
    if hint := faster_backend_hint(config, command.kernels):
        log(hint)
    results, failures = evaluate_checkpoints(paths, command, log)
    best = max(results, key=lambda result: result["top1"])
    if len(results) > 1:
        log("best: " + report_line(best))
    log(seeds_line(best))
    if communicator.is_root and config.result_path:
        write_results(config.result_path, results)
        log(f"results in {config.result_path}")
    if failures:
        raise PartialFailure(
            f"{len(failures)} of {len(paths)} checkpoints could not be evaluated, the first is "
            f"{failures[0]}"
        )


@dataclass(frozen=True)
class EvalResult:
    """The result of an evaluation.

    Attributes:
        top1, top5: accuracy in percent over ``images`` images.
        images_per_second: the speed of the evaluation.
        loss: mean cross-entropy without smoothing, over the images with finite outputs.
        class_hits: for each class, images with the right top-1 prediction.
        class_images: for each class, images that could be decoded.
        undecodable: a message for each image that cannot be decoded; it counts as wrong.
        nonfinite: number of images with outputs that are not finite; they count as wrong too.
    """

    top1: float
    top5: float
    images: int
    images_per_second: float
    loss: float
    class_hits: tuple[int, ...]
    class_images: tuple[int, ...]
    undecodable: tuple[str, ...] = ()
    nonfinite: int = 0

    @property
    def class_top1(self) -> list[float | None]:
        """Top-1 accuracy of each class in percent, by label; None for a class without images."""
        pairs = zip(self.class_hits, self.class_images)
        return [round(100 * hits / images, 2) if images else None for hits, images in pairs]


@dataclass
class EvalSums:
    """Sums over images, which ranks add up.

    Attributes:
        correct: (top-1 hits, top-5 hits, images).
        loss: (sum of losses, images with finite outputs).
        nonfinite: images with outputs that are not finite.
        rate: images per second.
        classes: (top-1 hits, images) of each class, (2, classes).
    """

    correct: np.ndarray
    loss: np.ndarray
    nonfinite: int
    rate: float
    classes: np.ndarray

    @classmethod
    def zero(cls, classes: int) -> "EvalSums":
        return cls(np.zeros(3), np.zeros(2), 0, 0.0, np.zeros((2, classes)))

    def add(self, logits: np.ndarray, labels: np.ndarray) -> None:
        """Add a batch: logits (N, C) and labels (N,)."""
        self.correct += count_correct(logits, labels)
        self.loss += cross_entropy_sum(logits, labels)
        self.nonfinite += count_nonfinite(logits[labels != PADDING_LABEL])
        self.classes += count_by_class(logits, labels, self.classes.shape[1])

    def over_ranks(self, communicator: Communicator) -> "EvalSums":
        """The sums over all ranks."""
        rest = np.array([self.nonfinite, self.rate])
        parts = (self.correct, self.loss, rest, self.classes.reshape(-1))
        total = communicator.all_reduce_sum(np.concatenate(parts).tolist())
        correct, loss, rest, classes = np.split(total, np.cumsum([3, 2, 2]))
        return EvalSums(correct, loss, int(rest[0]), rest[1], classes.reshape(2, -1))


class Evaluator:
    """Evaluates backends on a set of images, in batches of one size for one compiled graph.

    Args:
        images: the same ImageSet on every rank; each rank takes its shard.
        log: called with a line of text every ``line_s`` seconds.

    Attributes:
        batches: the rank's shard.
    """

    def __init__(
        self,
        images: ImageSet,
        config: Config,
        communicator: Communicator,
        log: Log = no_log,
        line_s: float = LINE_S,
    ) -> None:
        self._communicator, self._log, self._line_s = communicator, log, line_s
        self._classes = images.num_classes
        shard = max(-(-len(images) // communicator.size), 1)
        batch = min(config.per_batch_size, _LARGEST_BATCH, shard)
        batches = EvalBatches if config.input_pipeline == "own" else MindSporeEvalBatches
        self.batches = batches(images, config, communicator.rank, communicator.size, batch)

    def __call__(self, backend: Backend) -> EvalResult:
        """Evaluate on all ranks' images. Raises UserError if none can be decoded."""
        sums = EvalSums.zero(self._classes)
        messages: list[str] = []
        untimed, started = 0.0, time.perf_counter()
        with self._progress_bar() as progress:
            for number, batch in enumerate(prefetch(self.batches)):
                sums.add(backend(batch.images), batch.labels)
                messages += batch.undecodable
                progress.advance(int(np.count_nonzero(batch.labels != PADDING_LABEL)))
                if number == 0 and len(self.batches) > 1:
                    # The first batch compiles the graph, so leave it out of the rate.
                    untimed, started = sums.correct[2], time.perf_counter()
        seconds = max(time.perf_counter() - started, 1e-9)
        sums.rate = (sums.correct[2] - untimed) / seconds
        total = sums.over_ranks(self._communicator)
        all_messages = self._communicator.all_gather(messages)
        undecodable = tuple(message for one in all_messages for message in one)
        top1, top5, images = total.correct
        if len(undecodable) == images:
            raise UserError(
                f"none of the {len(undecodable)} images can be decoded: {undecodable[0]}"
            )
        hits, class_images = total.classes.astype(np.int64).tolist()
        return EvalResult(
            top1=100 * top1 / images,
            top5=100 * top5 / images,
            images=int(images),
            images_per_second=total.rate,
            loss=total.loss[0] / max(total.loss[1], 1),
            class_hits=tuple(hits),
            class_images=tuple(class_images),
            undecodable=undecodable,
            nonfinite=total.nonfinite,
        )

    def _progress_bar(self) -> ProgressBar:
        count, bar = len(self.batches.indices), self._communicator.has_terminal
        return ProgressBar("evaluated", count, "image", self._log, self._line_s, bar)


def count_correct(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(top-1 hits, top-5 hits, images) of logits (N, C) and labels (N,), without padding.

    The rank of the true class is the number of classes with a larger logit; of equal logits the
    lower index comes first. A row with a NaN counts as wrong.
    """
    rows = labels != PADDING_LABEL
    logits, labels = logits[rows], labels[rows]
    valid = ~np.isnan(logits).any(axis=1) & (labels != UNDECODABLE_LABEL)
    own = logits[np.arange(len(labels)), np.maximum(labels, 0)][:, None]
    earlier = np.arange(logits.shape[1])[None, :] < labels[:, None]
    rank = ((logits > own) | ((logits == own) & earlier)).sum(axis=1)
    return np.array([((rank < 1) & valid).sum(), ((rank < _TOP) & valid).sum(), len(labels)], float)


def cross_entropy_sum(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(sum of -log p[label], images) over finite rows of logits (N, C) with a label, (N,)."""
    rows = (labels >= 0) & np.isfinite(logits).all(axis=1)
    log_p = log_softmax(logits[rows].astype(np.float64), axis=1)
    return np.array([-log_p[np.arange(len(log_p)), labels[rows]].sum(), len(log_p)])


def count_by_class(logits: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """(top-1 hits, images) of each label below ``classes``, (2, classes)."""
    rows = labels >= 0
    hit = rows & ~np.isnan(logits).any(axis=1) & (logits.argmax(axis=1) == labels)
    return np.stack([np.bincount(labels[chosen], minlength=classes) for chosen in (hit, rows)])


def count_nonfinite(logits: np.ndarray) -> int:
    """Number of rows of logits (N, C) with an infinity or NaN."""
    return int(np.count_nonzero(~np.isfinite(logits).all(axis=1)))


def evaluate_checkpoints(
    paths: Sequence[Path], command: Command, log: Log
) -> tuple[list[dict[str, Any]], list[str]]:
    """Evaluate checkpoint files in the order of their epochs.

    If one of several cannot be evaluated, the others still are.

    Args:
        log: called with a line per checkpoint.

    Returns:
        A {name: value} result per checkpoint, and the files that could not be evaluated.
    """
    communicator = command.communicator
    if communicator.size > 1:
        check_ranks_agree(communicator, {"number of checkpoints": len(paths)})
        sums = {f"checksum of {path.name}": checksum(path) for path in in_order(paths)}
        check_ranks_agree(communicator, sums)
    results: list[dict[str, Any]] = []
    failures: list[str] = []
    opened: OpenedModel | None = None
    data: _EvalData | None = None

    def leave_out(path: Path, failure: UserError) -> None:
        if len(paths) == 1:
            raise failure
        failures.append(str(path))
        log(f"{path} is left out: {failure}")

    for path in in_order(paths):
        # Only the checkpoint itself may fail; bad images concern all checkpoints.
        try:
            opened = open_backend(path, command.flags, command.kernels, opened)
        except UserError as failure:
            leave_out(path, failure)
            continue
        if data is None or not data.fits(opened):
            data = _EvalData(opened, communicator, log)
        result = data.evaluate(opened)
        if result.nonfinite:
            leave_out(path, UserError(nonfinite_message(result.nonfinite, result.images)))
            continue
        if result.undecodable:
            log(undecodable_message(result))
        results.append(data.values(path, opened, result))
        log(report_line(results[-1]))
    if not results:
        raise UserError(f"none of the {len(paths)} checkpoints can be evaluated")
    return results, failures


class _EvalData:
    """The images that checkpoints of one model are evaluated on."""

    def __init__(self, opened: OpenedModel, communicator: Communicator, log: Log) -> None:
        self._model = opened.model
        config = opened.model.config
        self.images = opened.model.open_images()
        check_ranks_agree(communicator, self.images.summary("validation"))
        for describe in (left_out_message, empty_classes_message):
            if message := describe(self.images, "validation"):
                log(message)
        if message := split_message(opened.model, opened.metadata, self.images):
            log(message)
        self._evaluator = Evaluator(self.images, config, communicator, log)

    def fits(self, opened: OpenedModel) -> bool:
        return opened.model == self._model

    def evaluate(self, opened: OpenedModel) -> EvalResult:
        flip = opened.model.config.test_flip
        return self._evaluator(with_flip(opened.backend) if flip else opened.backend)

    def values(self, path: Path, opened: OpenedModel, result: EvalResult) -> dict[str, Any]:
        """{name: value} of a checkpoint's result, as the result file has it."""
        names = class_names(self.images.class_to_index, self.images.num_classes)
        values = {
            "checkpoint": str(path),
            "epoch": opened.metadata.get("epoch"),
            "step": opened.metadata.get("step"),
            "top1": result.top1,
            "top5": result.top5,
            "images": result.images,
            "images_per_second": result.images_per_second,
            "loss": result.loss,
            "class_top1": dict(zip(names, result.class_top1)),
        }
        if result.undecodable:
            values["undecodable"] = len(result.undecodable)
        return values


def class_table(result: EvalResult, images: ImageSet) -> list[str]:
    """Lines with the images and top-1 accuracy of classes, the worst first, up to a limit."""
    names = class_names(images.class_to_index, images.num_classes)
    rows = [
        (accuracy, name, count)
        for accuracy, name, count in zip(result.class_top1, names, result.class_images)
        if accuracy is not None
    ]
    rows.sort(key=lambda row: row[:2])
    shown = rows if len(rows) <= _CLASSES_SHOWN else rows[: _CLASSES_SHOWN // 2]
    width = max(len(escaped(name)) for _, name, _ in shown)
    lines = [
        f"  {escaped(name):<{width}}  {accuracy:6.2f} % of {count} images"
        for accuracy, name, count in shown
    ]
    if shown is rows:
        return lines
    return [*lines, f"  and {len(rows) - len(shown)} classes above {shown[-1][0]:.2f} %"]


def report_line(result: Mapping[str, Any]) -> str:
    """A result in one line, in the words of the model zoo."""
    return (
        f"{result['checkpoint']}: acc={result['top1']:.2f}%(TOP1) acc={result['top5']:.2f}%(TOP5) "
        f"{result['images']} images, {result['images_per_second']:.2f} images/s"
    )


def seeds_line(result: Mapping[str, Any]) -> str:
    """A result in the words of the other two seeds, to compare with their tables."""
    return (
        f"Top1/Top5 {result['top1']:.2f}%/{result['top5']:.2f}%, "
        f"{tops(result['top1'], result['top5'])}, FPS {result['images_per_second']:.2f} img/s"
    )


def tops(top1: float, top5: float) -> str:
    """Two accuracies in percent, or their differences, in the words of the ACNet repository."""
    return f"top1={top1:.5f},top5={top5:.5f}"


def split_message(
    model: CheckpointModel, metadata: Mapping[str, Any], images: ImageSet
) -> str | None:
    """A message on whether ``images`` are those that training held out; None without a split.

    Args:
        metadata: what the checkpoint records, among it the fingerprint of the training images.
    """
    config, recorded = model.config, metadata.get("config", {})
    trained = metadata.get("images")
    if split_fraction(config):
        if trained is None:
            return f"evaluating on {len(images)} images split off from {config.data_path}"
        if model.open_training_images().fingerprint() == trained:
            return (
                f"evaluating on the {len(images)} images of {config.data_path} that training held "
                "out for validation"
            )
        return (
            f"{WARNING}the {len(images)} images that --val_split takes from {config.data_path} are "
            "not those that training held out: it has seen some of them"
        )
    fraction = recorded.get("val_split")
    if trained is not None and isinstance(fraction, float) and fraction:
        used, _ = images.split(fraction, recorded["seed"])
        if used.fingerprint() == trained:
            return (
                f"{WARNING}training used these images and held some of them out; "
                f"--val_split={fraction:g} evaluates on those only"
            )
    return None


def undecodable_message(result: EvalResult) -> str:
    """Message for images that cannot be decoded; names the first ones."""
    shown = "; ".join(result.undecodable[:_NAMED])
    more = " ..." if len(result.undecodable) > _NAMED else ""
    return (
        f"{WARNING}{len(result.undecodable)} of {result.images} images cannot be decoded and count "
        f"as wrong: {shown}{more}"
    )


def nonfinite_message(count: int, images: int) -> str:
    """Message for images with outputs that are not finite."""
    return (
        f"the network's outputs for {count} of {images} images are not finite; its weights are too "
        "large or damaged"
    )


def write_results(path: str, results: Sequence[Mapping[str, Any]]) -> None:
    """Write results as a JSON list. Raises UserError if the file cannot be written."""
    text = json.dumps(results, indent=1, allow_nan=False)
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))
