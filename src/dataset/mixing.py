"""Augmentations that mix two samples and their targets. A mixed sample costs the decoding of a second image."""

from typing import Annotated

import cv2
import numpy as np
import pydantic

from src.dataset.augmentations import Augmentation, Draw, Probability
from src.utils.named import STRICT

Alpha = Annotated[float, pydantic.Field(gt=0)]


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Mixup(Augmentation):
    """Weighted mean of two images and of their targets (Zhang et al., arXiv:1710.09412): weight w ~ Beta(alpha, alpha)."""

    alpha: Alpha = 0.2
    probability: Probability = 1.0
    mixes = True

    def mix(self, image: np.ndarray, target: np.ndarray, random: np.random.Generator, draw: Draw) -> tuple[np.ndarray, np.ndarray]:
        if random.random() >= self.probability:
            return image, target
        weight = random.beta(self.alpha, self.alpha)
        other, other_target = draw()
        return (cv2.addWeighted(image, weight, other, 1 - weight, 0),
                (weight * target + (1 - weight) * other_target).astype(np.float32))


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class CutMix(Augmentation):
    """A rectangle of another image in this one (Yun et al., arXiv:1905.04899); targets are weighted by visible area.

    The rectangle has the image's aspect and a share 1 - w of its area, w ~ Beta(alpha, alpha), around a uniformly drawn centre,
    and is cut off at the image's borders.
    """

    alpha: Alpha = 1.0
    probability: Probability = 1.0
    mixes = True

    def mix(self, image: np.ndarray, target: np.ndarray, random: np.random.Generator, draw: Draw) -> tuple[np.ndarray, np.ndarray]:
        if random.random() >= self.probability:
            return image, target
        height, width = image.shape[:2]
        share = np.sqrt(1 - random.beta(self.alpha, self.alpha))
        rows, columns = (_interval(random, length, share) for length in (height, width))
        other, other_target = draw()
        image = image.copy()
        image[rows, columns] = other[rows, columns]
        weight = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
        return image, (weight * target + (1 - weight) * other_target).astype(np.float32)


def _interval(random: np.random.Generator, length: int, share: float) -> slice:
    centre, half = int(random.integers(length)), int(length * share) // 2
    return slice(max(centre - half, 0), min(centre + half, length))
