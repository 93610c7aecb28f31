"""What a network says of each image of a set, and where it is wrong."""

import base64
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from scipy.special import softmax

from src.dataset.augmentations import Augmenter
from src.dataset.batches import UNDECODABLE_LABEL, EvalBatches, prefetch
from src.dataset.image_set import ImageSet
from src.inference.engines import Engine
from src.parallel.long_task import LongTask
from src.utils.config import Config

_BATCH = 32
_THUMBNAIL = 160


@dataclass(frozen=True)
class Judgement:
    """Of each image that could be decoded, (N,): its index in the set, its label, the likeliest class and the probability of both."""

    indices: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    probability: np.ndarray
    probability_of_label: np.ndarray

    def confusion(self, classes: int) -> np.ndarray:
        """(classes, classes): images by label and likeliest class."""
        return np.bincount(self.labels * classes + self.predicted, minlength=classes ** 2).reshape(classes, classes)

    def worst(self, count: int) -> np.ndarray:
        """Positions of so many mistakes, those that the network was surest of first."""
        wrong = np.flatnonzero(self.predicted != self.labels)
        return wrong[np.argsort(-self.probability[wrong], kind="stable")][:count]


def judge(images: ImageSet, engine: Engine, config: Config, log: Callable[[str], None] = lambda text: None) -> Judgement:
    """The Judgement of ``engine`` on a set, on one process; ``log`` is called with a line every 30 s."""
    batches = EvalBatches(images, config, 0, 1, min(_BATCH, len(images)))
    parts: list[tuple[np.ndarray, ...]] = []
    with LongTask("looked at", len(images), "image", log) as task:
        for number, batch in enumerate(prefetch(batches)):
            rows = batch.labels >= 0
            probabilities = softmax(engine(batch.images)[rows], axis=1)
            predicted, labels = probabilities.argmax(axis=1), batch.labels[rows].astype(np.int64)
            every, first = np.arange(len(labels)), number * batches.batch
            places = np.flatnonzero(rows | (batch.labels == UNDECODABLE_LABEL))
            indices = batches.indices[first + places][rows[places]]
            parts.append((indices, labels, predicted, probabilities[every, predicted], probabilities[every, labels]))
            task.advance(len(places))
    return Judgement(*map(np.concatenate, zip(*parts)))


def most_confused(confusion: np.ndarray, count: int) -> list[tuple[int, int, int]]:
    """(label, what it was taken for, how often) of a confusion matrix, the most frequent first."""
    off = confusion - np.diag(np.diag(confusion))
    order = np.argsort(-off, axis=None, kind="stable")[:count]
    return [(int(place // len(off)), int(place % len(off)), int(off.flat[place])) for place in order if off.flat[place]]


def augmented(images: ImageSet, config: Config, count: int) -> list[tuple[np.ndarray, int]]:
    """(image as the training sees it in its first epoch, its label) of ``count`` images, spread over the set.

    Where samples are mixed the label is the one that has the most of it.
    """
    augmenter = Augmenter(config, len(images), images.num_classes)
    found = []
    for index in np.unique(np.linspace(0, len(images) - 1, count).astype(int)).tolist():
        image, label = augmenter.sample(lambda at: (images.load(at), int(images.labels[at])), 0, index)
        found.append((image, int(np.argmax(label)) if augmenter.mixes else int(label)))
    return found


def thumbnail(image: np.ndarray) -> str:
    """An image (H, W, 3) uint8 RGB, at most 160 pixels wide and high, as a data: URL of a JPEG."""
    scale = min(_THUMBNAIL / max(image.shape[:2]), 1.0)
    small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else image
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 85])
    return "data:image/jpeg;base64," + base64.b64encode(encoded.tobytes()).decode()
