"""Temperature scaling: probabilities that fit the accuracy (Guo et al., arXiv:1706.04599)."""

from dataclasses import dataclass

import numpy as np
from mindspore import Tensor
from scipy.optimize import minimize_scalar

from src.dataset.batches import EvalBatches, prefetch
from src.inference.backends import OpenedModel
from src.inference.evaluation import held_out_message
from src.inference.metrics import (
    calibration_error,
    count_confidence,
    count_nonfinite,
    cross_entropy_sum,
    nonfinite_message,
)
from src.models.layers import ImageClassifier
from src.utils.errors import UserError
from src.utils.log import Log

_BATCH = 16
_LOWEST, _HIGHEST = 0.05, 20.0


@dataclass(frozen=True)
class Calibration:
    """A temperature, and what it does on the images that it was found on.

    Attributes:
        temperature: what outputs are divided by.
        images: number of images.
        before, after: expected calibration error in percent.
    """

    temperature: float
    images: int
    before: float
    after: float


def calibrate(opened: OpenedModel, log: Log) -> Calibration:
    """Find the temperature with the lowest cross-entropy on the model's validation images.

    Args:
        log: gets a warning if training has seen some of the images.

    Raises:
        UserError: if there are no such images, training has seen all of them, or they are
            unsuitable: none can be decoded, outputs are not finite, every prediction is right, or
            the calibration would get worse.
    """
    config = opened.model.config
    images = opened.model.open_images()
    batches = EvalBatches(images, config, 0, 1, min(_BATCH, len(images)))
    if images.fingerprint() == opened.metadata.get("images"):
        raise UserError(
            "temperature=auto needs images that training has not seen; pass --data_path=DIR with "
            "others, or a number"
        )
    if message := held_out_message(opened.model, opened.metadata, images):
        log(message)
    parts = []
    for batch in prefetch(batches):
        decoded = batch.labels >= 0
        parts.append((opened.backend(batch.images)[decoded], batch.labels[decoded]))
    return calibration_of(*(np.concatenate(arrays) for arrays in zip(*parts)))


def calibration_of(logits: np.ndarray, labels: np.ndarray) -> Calibration:
    """The best temperature of logits (N, C) for images of these labels, (N,) int.

    Raises:
        UserError: if they are unsuitable; see ``calibrate``.
    """
    if not len(labels):
        raise UserError("temperature=auto: none of the validation images can be decoded")
    if nonfinite := count_nonfinite(logits):
        raise UserError(nonfinite_message(nonfinite, len(logits)))
    if (logits.argmax(axis=1) == labels).all():
        raise UserError(
            f"temperature=auto cannot be fitted to {len(labels)} images that are all right: no "
            "confidence is then too high; pass --data_path=DIR with more images, or a number"
        )
    temperature = best_temperature(logits, labels)
    before, after = (
        calibration_error(count_confidence(scaled, labels))
        for scaled in (logits, logits / np.float32(temperature))
    )
    if after > before:
        raise UserError(
            f"temperature=auto found {temperature:.3f}, but with it the probabilities of "
            f"{len(labels)} images are off by {after:.1f} percentage points on average, and "
            f"without it by {before:.1f}: these are too few images, or the network has hardly "
            "learned; pass --data_path=DIR with more, or a number"
        )
    return Calibration(temperature, len(labels), before, after)


def best_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature, from 0.05 to 20, with the lowest cross-entropy of logits (N, C)."""

    def loss(logarithm: float) -> float:
        return float(cross_entropy_sum(logits / np.exp(logarithm), labels)[0])

    bounds = (np.log(_LOWEST), np.log(_HIGHEST))
    return float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x))


def scale_outputs(network: ImageClassifier, temperature: float) -> None:
    """Divide the outputs of ``network`` by ``temperature``: the last layer's weights and biases."""
    for parameter in network.classifier.get_parameters():
        parameter.set_data(Tensor(parameter.asnumpy() / np.float32(temperature)))
