"""The predictions of a network for a set of images, and its mistakes."""

import base64
from dataclasses import dataclass

import cv2
import numpy as np
from scipy.special import softmax

from src.cli.config import Config
from src.dataset.augmentations import Augmenter
from src.dataset.batches import UNDECODABLE_LABEL, EvalBatches, prefetch
from src.dataset.image_set import ImageSet
from src.inference.backends import Backend
from src.utils.log import Log, no_log
from src.utils.progress import ProgressBar

_BATCH = 32
_THUMBNAIL = 160


@dataclass(frozen=True)
class SetPredictions:
    """Predictions for the N images of a set that can be decoded; each array is (N,).

    Attributes:
        indices: index of the image in the set.
        labels, predicted: its label, and its likeliest class.
        probability, probability_of_label: the probabilities of these two.
    """

    indices: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    probability: np.ndarray
    probability_of_label: np.ndarray

    def confusion(self, classes: int) -> np.ndarray:
        """(classes, classes): images by label and likeliest class."""
        pairs = self.labels * classes + self.predicted
        return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)

    def worst(self, count: int) -> np.ndarray:
        """Rows of up to ``count`` mistakes, the most confident ones first."""
        wrong = np.flatnonzero(self.predicted != self.labels)
        return wrong[np.argsort(-self.probability[wrong], kind="stable")][:count]


def predict_set(
    images: ImageSet, backend: Backend, config: Config, log: Log = no_log
) -> SetPredictions:
    """Predict every image of a set, on one process. ``log`` gets a line every 30 s."""
    batches = EvalBatches(images, config, 0, 1, min(_BATCH, len(images)))
    parts: list[tuple[np.ndarray, ...]] = []
    with ProgressBar("predicted", len(images), "image", log) as progress:
        for number, batch in enumerate(prefetch(batches)):
            decoded = batch.labels >= 0
            probabilities = softmax(backend(batch.images)[decoded], axis=1)
            predicted = probabilities.argmax(axis=1)
            labels = batch.labels[decoded].astype(np.int64)
            slots = np.flatnonzero(decoded | (batch.labels == UNDECODABLE_LABEL))
            indices = batches.indices[number * batches.batch + slots][decoded[slots]]
            rows = np.arange(len(labels))
            parts.append(
                (
                    indices,
                    labels,
                    predicted,
                    probabilities[rows, predicted],
                    probabilities[rows, labels],
                )
            )
            progress.advance(len(slots))
    return SetPredictions(*map(np.concatenate, zip(*parts)))


def most_confused(confusion: np.ndarray, count: int) -> list[tuple[int, int, int]]:
    """(label, predicted class, images) of the most frequent confusions, in order."""
    off_diagonal = confusion - np.diag(np.diag(confusion))
    order = np.argsort(-off_diagonal, axis=None, kind="stable")[:count]
    pairs = (divmod(int(cell), len(off_diagonal)) for cell in order)
    found = [(label, other, int(off_diagonal[label, other])) for label, other in pairs]
    return [entry for entry in found if entry[2]]


def augmented_samples(images: ImageSet, config: Config, count: int) -> list[tuple[np.ndarray, int]]:
    """(augmented image, label) of ``count`` images spread over the set, as in the first epoch.

    A mixed sample has the label with the largest part.
    """
    augmenter = Augmenter(config, len(images), images.num_classes)
    samples = []
    for index in np.unique(np.linspace(0, len(images) - 1, count).astype(int)).tolist():
        image, label = augmenter.sample(
            lambda i: (images.load(i), int(images.labels[i])), epoch=0, index=index
        )
        samples.append((image, int(np.argmax(label)) if augmenter.mixes else int(label)))
    return samples


def thumbnail(image: np.ndarray) -> str:
    """An image (H, W, 3) uint8 RGB of at most 160 pixels, as a data: URL of a JPEG."""
    scale = min(_THUMBNAIL / max(image.shape[:2]), 1.0)
    if scale < 1:
        size = (max(round(image.shape[1] * scale), 1), max(round(image.shape[0] * scale), 1))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    _, encoded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 85])
    return "data:image/jpeg;base64," + base64.b64encode(encoded.tobytes()).decode()
