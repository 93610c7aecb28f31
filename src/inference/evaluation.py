"""Evaluation: every image counted exactly once, whatever the number of ranks."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import log_softmax

from src.dataset.batches import PADDING_LABEL, UNDECODABLE_LABEL, EvalBatches, prefetch
from src.dataset.image_set import ImageSet, class_names
from src.dataset.sources import left_out_line, split_share
from src.inference.engines import Engine, open_engine, with_flip
from src.parallel.agreement import agree
from src.parallel.communicator import Communicator
from src.parallel.long_task import LongTask
from src.runs.checkpoint import in_order
from src.utils.config import Config
from src.utils.errors import UserError
from src.utils.files import checksum, write_whole
from src.utils.log import LINE_S
from src.utils.text import escaped

_TOP = 5
_LARGEST_BATCH = 64
_NAMED = 5
_CLASSES_SHOWN = 24


@dataclass(frozen=True)
class Accuracy:
    """What an evaluation found.

    Attributes:
        top1, top5: accuracy in percent over ``images`` images.
        images_per_second: the rate at which they were evaluated.
        loss: mean cross-entropy, without smoothing, over the images that the network has finite outputs for.
        class_hits, class_images: of each class, images that were found (top-1) and images that could be decoded.
        undecodable: a message for each image that could not be decoded and counts as wrong.
        nonfinite: number of images with outputs that are not finite, which count as wrong too.
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
        return [round(100 * hits / images, 2) if images else None for hits, images in zip(self.class_hits, self.class_images)]


class Evaluator:
    """Evaluates engines on a set of images; its batches are all of one size, so that one compiled graph serves them.

    Args:
        images: the ImageSet, the same on every rank; each rank takes its share.
        log: called with a line of text every ``line_s`` seconds of an evaluation.

    Attributes:
        batches: the rank's share.
    """

    def __init__(self, images: ImageSet, config: Config, communicator: Communicator, log: Callable[[str], None] = lambda text: None,
                 line_s: float = LINE_S) -> None:
        self._communicator, self._log, self._line_s, self._classes = communicator, log, line_s, images.num_classes
        batch = min(config.per_batch_size, _LARGEST_BATCH,
                    max(-(-len(images) // communicator.size), 1))
        self.batches = EvalBatches(images, config, communicator.rank, communicator.size, batch)

    def __call__(self, engine: Engine) -> Accuracy:
        """Accuracy of ``engine`` over all ranks' images. Raises UserError if none can be decoded."""
        counts, sums, untimed, nonfinite = np.zeros(3), np.zeros(2), 0.0, 0
        of_classes = np.zeros((2, self._classes))
        messages: list[str] = []
        started = time.perf_counter()
        with LongTask("evaluated", len(self.batches.indices), "image", self._log, self._line_s, self._communicator.is_root) as task:
            for number, batch in enumerate(prefetch(self.batches)):
                logits = engine(batch.images)
                counts += count_correct(logits, batch.labels)
                sums += cross_entropy_sum(logits, batch.labels)
                of_classes += count_classes(logits, batch.labels, self._classes)
                nonfinite += count_nonfinite(logits[batch.labels != PADDING_LABEL])
                messages += batch.undecodable
                task.advance(int(np.count_nonzero(batch.labels != PADDING_LABEL)))
                if number == 0 and len(self.batches) > 1:
                    # The first batch compiles the graph; a rate that counts it says nothing about the network.
                    untimed, started = counts[2], time.perf_counter()
        seconds = max(time.perf_counter() - started, 1e-9)
        timed = counts[2] - untimed
        top1, top5, seen, rate, nonfinite_of_all, loss, finite, *classes = self._communicator.sum(
            [*counts, timed / seconds, nonfinite, *sums, *of_classes.reshape(-1)])
        hits, images = np.array(classes, np.int64).reshape(2, -1).tolist()
        undecodable = tuple(message for of_rank in self._communicator.gather(messages) for message in of_rank)
        if len(undecodable) == seen:
            raise UserError(f"none of the {len(undecodable)} images can be decoded: {undecodable[0]}")
        return Accuracy(100 * top1 / seen, 100 * top5 / seen, int(seen), rate, loss / max(finite, 1), tuple(hits), tuple(images),
                        undecodable, int(nonfinite_of_all))


def count_nonfinite(logits: np.ndarray) -> int:
    """Number of rows of logits (N, C) that hold an infinity or NaN: such a network says nothing about its images."""
    return int(np.count_nonzero(~np.isfinite(logits).all(axis=1)))


def cross_entropy_sum(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(sum of -log p[label], number of images) over the rows of logits (N, C) that are finite and have a label, (N,)."""
    rows = (labels >= 0) & np.isfinite(logits).all(axis=1)
    log_p = log_softmax(logits[rows].astype(np.float64), axis=1)
    return np.array([-log_p[np.arange(len(log_p)), labels[rows]].sum(), len(log_p)])


def count_classes(logits: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """(top-1 hits, images) of each label below ``classes``, (2, classes), from logits (N, C) and labels (N,)."""
    rows = labels >= 0
    hit = rows & ~np.isnan(logits).any(axis=1) & (logits.argmax(axis=1) == labels)
    return np.stack([np.bincount(labels[chosen], minlength=classes) for chosen in (hit, rows)])


def nonfinite_line(count: int, images: int) -> str:
    """What to say about them."""
    return f"the network's outputs for {count} of {images} images are not finite; its weights are too large or damaged"


def count_correct(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(top-1 hits, top-5 hits, images) of logits (N, C) and labels (N,); rows labelled PADDING_LABEL do not count.

    The rank of the true class is the number of classes with a larger logit, ties counting for the lower index. A row that
    contains a NaN counts as wrong.
    """
    rows = labels != PADDING_LABEL
    logits, labels = logits[rows], labels[rows]
    valid = ~np.isnan(logits).any(axis=1) & (labels != UNDECODABLE_LABEL)
    own = logits[np.arange(len(labels)), np.maximum(labels, 0)][:, None]
    earlier = np.arange(logits.shape[1])[None, :] < labels[:, None]
    rank = ((logits > own) | ((logits == own) & earlier)).sum(axis=1)
    return np.array([((rank < 1) & valid).sum(), ((rank < _TOP) & valid).sum(), len(labels)], np.float64)


def evaluate_checkpoints(paths: Sequence[Path], flags: Mapping[str, Any], communicator: Communicator,
                         log: Callable[[str], None]) -> tuple[list[dict[str, Any]], list[str]]:
    """Evaluate checkpoint files in order of epoch.

    Args:
        flags: the command line's {key: value}, which win over what each checkpoint records.
        log: called with a line per checkpoint.

    Returns:
        List of {checkpoint, epoch, step, top1, top5, images, images_per_second}, and the files that could not be read or do not
        fit: one of several does not keep the others from being evaluated.
    """
    if communicator.size > 1:
        agree(communicator, {"number of checkpoints": len(paths)})
        agree(communicator, {f"checksum of {path.name}": checksum(path) for path in in_order(paths)})
    results: list[dict[str, Any]] = []
    failures: list[str] = []
    opened = evaluated = evaluator = None

    def leave_out(path: Path, failure: UserError) -> None:
        if len(paths) == 1:
            raise failure
        failures.append(str(path))
        log(f"{path} is left out: {failure}")

    for path in in_order(paths):
        try:
            opened = open_engine(path, flags, opened)
        except UserError as failure:
            leave_out(path, failure)
            continue
        model, engine, metadata = opened
        if evaluator is None or model != evaluated:
            images = model.open_images()
            agree(communicator, images.facts("validation"))
            if line := left_out_line(images, "validation"):
                log(line)
            if split_share(model.config):
                log(f"evaluating on the {len(images)} images of {model.config.data_path} that the training split off for validation")
            evaluator, evaluated = Evaluator(images, model.config, communicator, log), model
        accuracy = evaluator(with_flip(engine) if model.config.test_flip else engine)
        if accuracy.nonfinite:
            leave_out(path, UserError(nonfinite_line(accuracy.nonfinite, accuracy.images)))
            continue
        results.append({"checkpoint": str(path), "epoch": metadata.get("epoch"), "step": metadata.get("step"),
                        "top1": accuracy.top1, "top5": accuracy.top5, "images": accuracy.images,
                        "images_per_second": accuracy.images_per_second, "loss": accuracy.loss,
                        "class_top1": dict(zip(class_names(images.class_to_index, images.num_classes), accuracy.class_top1))})
        if accuracy.undecodable:
            results[-1]["undecodable"] = len(accuracy.undecodable)
            log(undecodable_line(accuracy))
        log(report_line(results[-1]))
    if not results:
        raise UserError(f"none of the {len(paths)} checkpoints can be evaluated")
    return results, failures


def class_table(accuracy: Accuracy, images: ImageSet) -> list[str]:
    """Lines of the classes with their images and top-1 accuracy, the worst first; of many classes the worst ones."""
    names = class_names(images.class_to_index, images.num_classes)
    found = [(share, name, count) for share, name, count in zip(accuracy.class_top1, names, accuracy.class_images)
             if share is not None]
    found.sort(key=lambda line: line[:2])
    shown = found if len(found) <= _CLASSES_SHOWN else found[:_CLASSES_SHOWN // 2]
    width = max(len(escaped(name)) for _, name, _ in shown)
    lines = [f"  {escaped(name):<{width}}  {share:6.2f} % of {count} images" for share, name, count in shown]
    return lines if shown is found else [*lines, f"  and {len(found) - len(shown)} classes above {shown[-1][0]:.2f} %"]


def report_line(result: Mapping[str, Any]) -> str:
    """A result in one line, in the words of the model zoo."""
    return (f"{result['checkpoint']}: acc={result['top1']:.2f}%(TOP1) acc={result['top5']:.2f}%(TOP5) "
            f"{result['images']} images, {result['images_per_second']:.2f} images/s")


def seeds_line(result: Mapping[str, Any]) -> str:
    """The same in the words of AlexNet for MindSpore and of the ACNet repository, to be put beside their tables."""
    return (f"Top1/Top5 {result['top1']:.2f}%/{result['top5']:.2f}%, {tops(result['top1'], result['top5'])}, "
            f"FPS {result['images_per_second']:.2f} img/s")


def tops(top1: float, top5: float) -> str:
    """Two accuracies in percent, or their differences, in the words of the ACNet repository."""
    return f"top1={top1:.5f},top5={top5:.5f}"


def undecodable_line(accuracy: Accuracy) -> str:
    """What to say about images that could not be decoded; the first are named."""
    shown = accuracy.undecodable[:_NAMED]
    return (f"{len(accuracy.undecodable)} of {accuracy.images} images cannot be decoded and count as wrong: {'; '.join(shown)}"
            + (" ..." if len(accuracy.undecodable) > _NAMED else ""))


def write_results(path: str, results: Sequence[Mapping[str, Any]]) -> None:
    """Write results as a JSON list. Raises UserError if the file cannot be written."""
    text = json.dumps(results, indent=1, allow_nan=False)
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))
