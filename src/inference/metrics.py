"""Sums, metrics and report lines of an evaluation."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import log_softmax, softmax

from src.dataset.batches import PADDING_LABEL, UNDECODABLE_LABEL
from src.distributed.communicator import Communicator
from src.utils.files import write_atomically
from src.utils.log import escaped

_TOP = 5
_CLASSES_SHOWN = 24
# A confusion matrix of more classes is neither counted nor written.
_MAX_CONFUSED_CLASSES = 100
_MAX_PRINTED_COLUMNS = 12
# Ranges of probabilities that are compared with accuracies.
_BINS = 15
# The normal distribution's 97.5 % quantile.
_Z = 1.959964


@dataclass(frozen=True)
class EvalResult:
    """The result of an evaluation.

    Attributes:
        top1, top5: accuracy in percent over ``images`` images.
        images_per_second: the speed of the evaluation.
        loss: mean cross-entropy without smoothing, over the images with finite outputs.
        class_hits: for each class, images with the right top-1 prediction.
        class_images: for each class, images that could be decoded.
        class_predicted: for each class, images that were predicted to be of it.
        confusion: images by class and predicted class; None with more than 100 classes.
        calibration_error: expected calibration error in percent (Guo et al., arXiv:1706.04599,
            equation 3): how far, on average, the probability of the first class is from the part
            that is right.
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
    class_predicted: tuple[int, ...] = ()
    confusion: tuple[tuple[int, ...], ...] | None = None
    calibration_error: float = 0.0
    undecodable: tuple[str, ...] = ()
    nonfinite: int = 0

    @property
    def correct(self) -> int:
        """Images with the right top-1 prediction."""
        return round(self.top1 * self.images / 100)

    @property
    def text(self) -> str:
        """The top-1 accuracy in percent and in images."""
        return f"acc={self.top1:.2f}%(TOP1) ({self.correct} of {self.images} images)"

    @property
    def class_top1(self) -> list[float | None]:
        """Top-1 accuracy of each class in percent, by label; None for a class without images."""
        pairs = zip(self.class_hits, self.class_images)
        return [round(100 * hits / images, 2) if images else None for hits, images in pairs]

    @property
    def balanced(self) -> float:
        """Mean over the classes that have images of their top-1 accuracy, in percent."""
        pairs = zip(self.class_hits, self.class_images)
        known = [100 * hits / images for hits, images in pairs if images]
        return sum(known) / max(len(known), 1)

    def by_class(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """{name: its images, precision, recall and F1 (percent)}; None where nothing is counted."""
        counts = zip(self.class_hits, self.class_images, self.class_predicted)
        return {name: class_figures(*of_class) for name, of_class in zip(names, counts)}


@dataclass
class EvalSums:
    """Sums over images, which ranks add up.

    Attributes:
        correct: (top-1 hits, top-5 hits, images).
        loss: (sum of losses, images with finite outputs).
        nonfinite: images with outputs that are not finite.
        rate: images per second.
        classes: (top-1 hits, images, predictions) of each class, (3, classes).
        confusion: images by class and predicted class, (classes, classes); (0, 0) for many classes.
        confidence: see ``count_confidence``.
    """

    correct: np.ndarray
    loss: np.ndarray
    nonfinite: int
    rate: float
    classes: np.ndarray
    confusion: np.ndarray
    confidence: np.ndarray

    @classmethod
    def zero(cls, classes: int) -> "EvalSums":
        side = classes if classes <= _MAX_CONFUSED_CLASSES else 0
        return cls(
            np.zeros(3),
            np.zeros(2),
            0,
            0.0,
            np.zeros((3, classes)),
            np.zeros((side, side)),
            np.zeros((3, _BINS)),
        )

    def add(self, logits: np.ndarray, labels: np.ndarray) -> None:
        """Add a batch: logits (N, C) and labels (N,)."""
        self.correct += count_correct(logits, labels)
        self.loss += cross_entropy_sum(logits, labels)
        self.nonfinite += count_nonfinite(logits[labels != PADDING_LABEL])
        self.classes += count_by_class(logits, labels, self.classes.shape[1])
        self.confusion += count_confusion(logits, labels, len(self.confusion))
        self.confidence += count_confidence(logits, labels)

    def over_ranks(self, communicator: Communicator) -> "EvalSums":
        """The sums over all ranks."""
        rest = np.array([self.nonfinite, self.rate])
        arrays = (self.correct, self.loss, rest, self.confidence, self.classes, self.confusion)
        parts = [array.ravel() for array in arrays]
        total = communicator.all_reduce_sum(np.concatenate(parts).tolist())
        ends = np.cumsum([part.size for part in parts[:-1]])
        correct, loss, rest, confidence, classes, confusion = np.split(np.asarray(total), ends)
        return EvalSums(
            correct,
            loss,
            int(rest[0]),
            rest[1],
            classes.reshape(self.classes.shape),
            confusion.reshape(self.confusion.shape),
            confidence.reshape(self.confidence.shape),
        )

    def result(self, undecodable: tuple[str, ...]) -> EvalResult:
        """The result that these sums make."""
        top1, top5, images = self.correct
        hits, class_images, predicted = self.classes.astype(np.int64).tolist()
        rows = tuple(map(tuple, self.confusion.astype(np.int64).tolist()))
        return EvalResult(
            top1=100 * top1 / images,
            top5=100 * top5 / images,
            images=int(images),
            images_per_second=self.rate,
            loss=self.loss[0] / max(self.loss[1], 1),
            class_hits=tuple(hits),
            class_images=tuple(class_images),
            class_predicted=tuple(predicted),
            confusion=rows or None,
            calibration_error=calibration_error(self.confidence),
            undecodable=undecodable,
            nonfinite=self.nonfinite,
        )


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
    """(top-1 hits, images, predictions) of each label below ``classes``, (3, classes)."""
    rows = labels >= 0
    valid, predicted = rows & ~np.isnan(logits).any(axis=1), logits.argmax(axis=1)
    found = (labels[valid & (predicted == labels)], labels[rows], predicted[valid])
    return np.stack([np.bincount(chosen, minlength=classes)[:classes] for chosen in found])


def count_confusion(logits: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Images by label and predicted class, (classes, classes), without those that have a NaN."""
    valid, predicted = ~np.isnan(logits).any(axis=1), logits.argmax(axis=1)
    return confusion_matrix(labels[valid], predicted[valid], classes)


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Images by label and predicted class, (classes, classes); larger labels are ignored."""
    rows = (labels >= 0) & (labels < classes) & (predicted < classes)
    pairs = labels[rows] * classes + predicted[rows]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def count_confidence(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """``confidence_ranges`` of logits (N, C). Only finite rows with a label count."""
    rows = (labels >= 0) & np.isfinite(logits).all(axis=1)
    probabilities = softmax(logits[rows].astype(np.float64), axis=1)
    return confidence_ranges(
        probabilities.max(axis=1), probabilities.argmax(axis=1) == labels[rows]
    )


def confidence_ranges(highest: np.ndarray, hits: np.ndarray) -> np.ndarray:
    """(images, sum of probabilities, top-1 hits) by the first class's probability, (3, 15).

    The 15 ranges are equally wide: 0 to 1/15, above that to 2/15, and so on.

    Args:
        highest, hits: (N,) the first class's probability, and whether it is right.
    """
    ranges = np.clip(np.ceil(highest * _BINS).astype(int) - 1, 0, _BINS - 1)
    weights = (np.ones(len(hits)), highest, hits)
    return np.stack([np.bincount(ranges, weight, _BINS) for weight in weights])


def calibration_error(confidence: np.ndarray) -> float:
    """The expected calibration error in percent of what ``confidence_ranges`` counts."""
    images, probabilities, hits = confidence
    return 100 * float(np.abs(hits - probabilities).sum() / max(images.sum(), 1))


def count_nonfinite(logits: np.ndarray) -> int:
    """Number of rows of logits (N, C) with an infinity or NaN."""
    return int(np.count_nonzero(~np.isfinite(logits).all(axis=1)))


def class_figures(hits: int, images: int, predicted: int) -> dict[str, Any]:
    """A class's images, precision, recall and F1 (percent); None where nothing is counted.

    Args:
        hits: images of the class that were predicted to be of it.
        images, predicted: images of the class, and images that were predicted to be of it.
    """
    both = images + predicted
    return {
        "images": images,
        "precision": round(100 * hits / predicted, 2) if predicted else None,
        "recall": round(100 * hits / images, 2) if images else None,
        "f1": round(200 * hits / both, 2) if images and both else None,
    }


def interval(correct: int, images: int) -> tuple[float, float]:
    """95 % confidence interval of an accuracy in percent (Wilson, 1927).

    It says how far the accuracy may be off because these images are a sample.
    """
    share, z2 = correct / images, _Z**2 / images
    middle = (share + z2 / 2) / (1 + z2)
    half = _Z * np.sqrt(share * (1 - share) / images + z2 / (4 * images)) / (1 + z2)
    return 100 * max(middle - half, 0.0), 100 * min(middle + half, 1.0)


def summary_lines(result: Mapping[str, Any]) -> list[str]:
    """The lines after the accuracy: its interval, and the figures of each class."""
    low, high = result["top1_interval"]
    names, others = list(result["classes"]), result["other_predictions"]
    return [
        f"{result['correct']} of {result['images']} images are right (95 % interval {low:.1f} to "
        f"{high:.1f} %); mean over classes {result['balanced_top1']:.2f} %",
        *class_table(result["classes"]),
        *confusion_table(result["confusion"], names),
        *([f"  {others} images were taken for classes that the data lacks"] if others else []),
        f"probabilities are off by {result['calibration_error']:.1f} percentage points on average "
        "(expected calibration error)",
    ]


def class_table(classes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines with what is known of each class, the lowest recall first, up to a limit.

    Args:
        classes: what ``EvalResult.by_class`` returns.
    """
    rows = [(values, escaped(name)) for name, values in classes.items() if values["images"]]
    rows.sort(key=lambda row: (row[0]["recall"], row[1]))
    shown = rows if len(rows) <= _CLASSES_SHOWN else rows[: _CLASSES_SHOWN // 2]
    width = max(len(name) for name in ("class", *(name for _, name in shown)))
    lines = [f"  {'class':<{width}}  images  {'precision':>9}  {'recall':>7}  {'F1':>7}"]
    for values, name in shown:
        precision, recall, f1 = (
            f"{values[key]:.1f} %" if values[key] is not None else "-"
            for key in ("precision", "recall", "f1")
        )
        lines.append(
            f"  {name:<{width}}  {values['images']:>6}  {precision:>9}  {recall:>7}  {f1:>7}"
        )
    if len(rows) > len(shown):
        highest = shown[-1][0]["recall"]
        lines.append(f"  and {len(rows) - len(shown)} classes with a recall of {highest} % or more")
    return lines


def confusion_table(confusion: Sequence[Sequence[int]] | None, names: Sequence[str]) -> list[str]:
    """Lines of the confusion matrix; none if it is too wide for a terminal."""
    if confusion is None or len(names) > _MAX_PRINTED_COLUMNS:
        return []
    shown = [escaped(name) for name in names]
    width = max(map(len, shown))
    cells = [
        max(len(name[:8]), *(len(str(row[column])) for row in confusion))
        for column, name in enumerate(shown)
    ]
    head = " ".join(f"{name[:8]:>{cell}}" for name, cell in zip(shown, cells))
    lines = ["  rows: true class, columns: predicted", f"  {'':<{width}}  {head}"]
    for name, row in zip(shown, confusion):
        values = " ".join(f"{value:>{cell}}" for value, cell in zip(row, cells))
        lines.append(f"  {name:<{width}}  {values}")
    return lines


def tops(top1: float, top5: float) -> str:
    """Two accuracies in percent, or their differences, in the words of the ACNet repository."""
    return f"top1={top1:.5f},top5={top5:.5f}"


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


def nonfinite_message(count: int, images: int) -> str:
    """Message for images with outputs that are not finite."""
    return (
        f"the network's outputs for {count} of {images} images are not finite; its weights are too "
        "large or damaged"
    )


def write_results(path: str, results: Sequence[Mapping[str, Any]]) -> None:
    """Write results as a JSON list. Raises UserError if the file cannot be written."""
    text = json.dumps(results, indent=1, allow_nan=False)
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))
