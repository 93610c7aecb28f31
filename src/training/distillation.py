"""Learning from a trained network's predictions as well as from labels."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from scipy.special import softmax

from src.cli.config import Config
from src.dataset.batches import Batch
from src.dataset.image_set import are_numbers_sorted_as_text
from src.inference.backends import Backend, open_backend
from src.kernels.library import KernelChoice
from src.runs.run_folder import choose_checkpoint
from src.utils.errors import UserError
from src.utils.files import checksum
from src.utils.log import Log

_NAMED = 3


class Teacher:
    """Mixes the teacher's predictions for a batch's augmented images into its targets.

    targets <- (1 - weight) targets + weight softmax(logits): the loss is then the weighted sum of
    the two cross-entropies (Hinton et al., arXiv:1503.02531, section 2, with temperature 1).

    Args:
        backend: (B, S, S, 3) uint8 images -> (B, C) logits.
        checksum: checksum of its file, which a resumed run must match.
    """

    def __init__(self, backend: Backend, weight: float, checksum: int = 0) -> None:
        self._backend, self._weight, self.checksum = backend, np.float32(weight), checksum

    def __call__(self, batch: Batch) -> Batch:
        predicted = softmax(self._backend(batch.images).astype(np.float32), axis=1)
        targets = batch.labels
        if targets.ndim == 1:
            targets = np.eye(predicted.shape[1], dtype=np.float32)[targets]
        return replace(batch, labels=(1 - self._weight) * targets + self._weight * predicted)


def open_teacher(
    config: Config, class_to_index: Mapping[str, int], kernels: KernelChoice, log: Log
) -> Teacher:
    """The network that the key ``teacher`` names.

    Raises:
        UserError: if it cannot be read, or predicts other classes or for another size of images.
    """
    path = choose_checkpoint(config.teacher, log)
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
    if teacher.class_to_index is None and are_numbers_sorted_as_text(class_to_index):
        raise UserError(
            f"teacher={path} records no class names, and the data's classes are numbers sorted as "
            "text (0, 1, 10, 11, 2), so the order of its outputs is ambiguous; put a "
            "class_indexing.json next to it"
        )
    if teacher.class_to_index is None:
        names = ", ".join([*class_to_index][:_NAMED])
        log(f"teacher={path} records no class names; assuming {names}, ... in this order")
    elif teacher.class_to_index != class_to_index:
        raise UserError(f"teacher={path} was trained on other classes, or in another order")
    return Teacher(opened.backend, config.teacher_weight, checksum(path))
