"""Learning from a trained network's predictions as well as from labels."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from scipy.special import softmax

from src.cli.config import Config
from src.dataset.batches import Batch
from src.inference.backends import Backend, open_backend
from src.kernels.library import KernelChoice
from src.runs.checkpoint import choose_checkpoint
from src.utils.errors import UserError
from src.utils.progress import print_status


class Teacher:
    """Mixes predictions for a batch's images, as they are augmented, into its targets.

    targets <- (1 - weight) targets + weight softmax(logits): the loss is then the weighted sum of
    the two cross-entropies (Hinton et al., arXiv:1503.02531, section 2, with temperature 1).

    Args:
        backend: (B, S, S, 3) uint8 images -> (B, C) logits.
    """

    def __init__(self, backend: Backend, weight: float) -> None:
        self._backend, self._weight = backend, np.float32(weight)

    def __call__(self, batch: Batch) -> Batch:
        predicted = softmax(self._backend(batch.images).astype(np.float32), axis=1)
        targets = batch.labels
        if targets.ndim == 1:
            targets = np.eye(predicted.shape[1], dtype=np.float32)[targets]
        return replace(batch, labels=(1 - self._weight) * targets + self._weight * predicted)


def open_teacher(
    config: Config, class_to_index: Mapping[str, int], kernels: KernelChoice
) -> Teacher:
    """The network that the key ``teacher`` names.

    Raises:
        UserError: if it cannot be read, or predicts other classes or for another size of images.
    """
    path = choose_checkpoint(config.teacher, print_status)
    opened = open_backend(path, {"device_target": config.device_target}, kernels)
    teacher = opened.model
    if teacher.config.image_size != config.image_size:
        raise UserError(
            f"teacher={path} takes images of {teacher.config.image_size} pixels, and "
            f"image_size={config.image_size}; both must be the same"
        )
    if teacher.config.num_classes != config.num_classes:
        raise UserError(
            f"teacher={path} has {teacher.config.num_classes} classes, and the training images "
            f"have {config.num_classes}"
        )
    if teacher.class_to_index is not None and teacher.class_to_index != class_to_index:
        raise UserError(f"teacher={path} was trained on other classes, or in another order")
    return Teacher(opened.backend, config.teacher_weight)
