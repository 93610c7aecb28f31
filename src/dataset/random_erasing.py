"""Random erasing (Zhong et al., arXiv:1708.04896, algorithm 1)."""

import math

import numpy as np
import pydantic

from src.dataset.augmentations import Augmentation, Probability
from src.utils.named import STRICT

_ATTEMPTS = 100


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class RandomErasing(Augmentation):
    """With ``probability``, random pixels in a rectangle of ``scale`` of the area and ``ratio`` of height to width."""

    probability: Probability = 0.5
    scale: tuple[Probability, Probability] = (0.02, 0.4)
    ratio: tuple[float, float] = (0.3, 1 / 0.3)

    def __call__(self, image: np.ndarray, random: np.random.Generator) -> np.ndarray:
        if random.random() >= self.probability:
            return image
        height, width = image.shape[:2]
        for _ in range(_ATTEMPTS):
            area, aspect = height * width * random.uniform(*self.scale), random.uniform(*self.ratio)
            rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < rows <= height and 0 < columns <= width:
                top, left = int(random.integers(height - rows, endpoint=True)), int(random.integers(width - columns, endpoint=True))
                image = image.copy()
                image[top:top + rows, left:left + columns] = random.integers(0, 256, (rows, columns, 3), np.uint8)
                break
        return image
