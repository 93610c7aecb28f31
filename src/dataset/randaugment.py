"""RandAugment (Cubuk et al., arXiv:1909.13719): a few operations, drawn uniformly, all of one strength."""

from collections.abc import Callable
from typing import Annotated

import numpy as np
import pydantic
from PIL import Image, ImageEnhance, ImageOps

from src.dataset.augmentations import Augmentation
from src.utils.named import STRICT

_LARGEST = 30
_GREY = (128, 128, 128)
Operation = Callable[[Image.Image, float], Image.Image]


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class RandAugment(Augmentation):
    """``layers`` operations of strength ``magnitude``, 0 to 30 (the paper's N and M), one after the other.

    Strengths have the ranges of AutoAugment (Cubuk et al., arXiv:1805.09501, table 6); those with a sign draw it.
    """

    layers: Annotated[int, pydantic.Field(ge=1)] = 2
    magnitude: Annotated[float, pydantic.Field(ge=0, le=_LARGEST)] = 9

    def __call__(self, image: np.ndarray, random: np.random.Generator) -> np.ndarray:
        picture = Image.fromarray(image)
        for _ in range(self.layers):
            operation = OPERATIONS[int(random.integers(len(OPERATIONS)))]
            sign = 1 if random.random() < 0.5 else -1
            picture = operation(picture, sign * self.magnitude / _LARGEST)
        return np.asarray(picture)


def _affine(picture: Image.Image, *coefficients: float) -> Image.Image:
    return picture.transform(picture.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR, fillcolor=_GREY)


def _enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    return lambda picture, strength: kind(picture).enhance(1 + 0.9 * strength)


def _posterize(picture: Image.Image, strength: float) -> Image.Image:
    return ImageOps.posterize(picture, 8 - round(4 * abs(strength)))


def _solarize(picture: Image.Image, strength: float) -> Image.Image:
    return ImageOps.solarize(picture, round(256 * (1 - abs(strength))))


def _rotate(picture: Image.Image, strength: float) -> Image.Image:
    return picture.rotate(30 * strength, Image.Resampling.BILINEAR, fillcolor=_GREY)


# Each takes a picture and a strength from -1 to 1.
OPERATIONS: tuple[Operation, ...] = (
    lambda picture, strength: picture,
    lambda picture, strength: _affine(picture, 1, 0.3 * strength, 0, 0, 1, 0),
    lambda picture, strength: _affine(picture, 1, 0, 0, 0.3 * strength, 1, 0),
    lambda picture, strength: _affine(picture, 1, 0, 0.45 * strength * picture.width, 0, 1, 0),
    lambda picture, strength: _affine(picture, 1, 0, 0, 0, 1, 0.45 * strength * picture.height),
    _rotate,
    _enhanced(ImageEnhance.Brightness),
    _enhanced(ImageEnhance.Color),
    _enhanced(ImageEnhance.Contrast),
    _enhanced(ImageEnhance.Sharpness),
    _posterize,
    _solarize,
    lambda picture, strength: ImageOps.autocontrast(picture),
    lambda picture, strength: ImageOps.equalize(picture),
)
