"""Augmentation as an ordered list of entries, uint8 RGB images in and out.

Each entry draws from its own stream of random numbers, a function of (seed, epoch, sample, entry).
So the images of an epoch do not depend on resumes, on the number of ranks or threads, or on the
other entries in the list.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import cv2
import numpy as np
import pydantic
from PIL import Image, ImageEnhance, ImageOps

from src.cli.config import Config
from src.dataset.transforms import (
    REDUCED_MARGIN,
    Resizing,
    color_jitter,
    padded_crop,
    random_resized_crop,
)
from src.utils.errors import UserError
from src.utils.specs import FORBID_EXTRA, create_from_spec, parse_spec

Probability = Annotated[float, pydantic.Field(ge=0, le=1)]
Draw = Callable[[], tuple[np.ndarray, np.ndarray]]
Load = Callable[[int], tuple[np.ndarray, int]]


class Augmentation:
    """An entry of the list. A subclass defines ``__call__``, or ``mix`` if ``mixes`` is True."""

    mixes = False

    @classmethod
    def of(cls, config: Config, **arguments: Any) -> "Augmentation":
        """The entry with the arguments that the list gives it."""
        return cls(**arguments)

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(H, W, 3) -> (H', W', 3)."""
        return image

    def mix(
        self, image: np.ndarray, target: np.ndarray, rng: np.random.Generator, draw: Draw
    ) -> tuple[np.ndarray, np.ndarray]:
        """Image (S, S, 3) and target, class probabilities (C,), mixed with those of another sample.

        Args:
            draw: returns image and target of another sample, augmented by the entries before this.
        """
        return image, target


def _check_rising(interval: tuple[float, float]) -> tuple[float, float]:
    if interval[0] > interval[1]:
        raise ValueError("the first number must not be above the second")
    return interval


Alpha = Annotated[float, pydantic.Field(gt=0)]
Rising = pydantic.AfterValidator(_check_rising)


@pydantic.dataclasses.dataclass(frozen=True, config=FORBID_EXTRA)
class Crop(Augmentation):
    """A crop in the network's image size.

    From the keys train_crop, crop_scale, crop_ratio, crop_padding, interpolation and antialias.
    """

    kind: str
    size: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    padding: int
    resize: Resizing

    @classmethod
    def of(cls, config: Config, **arguments: Any) -> "Crop":
        return cls(
            config.train_crop,
            config.image_size,
            config.crop_scale,
            config.crop_ratio,
            config.crop_padding,
            Resizing.of(config),
            **arguments,
        )

    @property
    def min_side(self) -> float:
        """The shorter side, in pixels, of images whose smallest part need not be enlarged."""
        if self.kind != "random_resized":
            return self.size
        narrowest = max(self.ratio[1], 1 / self.ratio[0])
        return self.size / math.sqrt(self.scale[0] / narrowest)

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if self.kind == "random_resized":
            return random_resized_crop(image, rng, self.size, self.scale, self.ratio, self.resize)
        image = self.resize(image, self.size, self.size)
        return padded_crop(image, rng, self.padding) if self.kind == "padded" else image


@pydantic.dataclasses.dataclass(frozen=True, config=FORBID_EXTRA)
class Flip(Augmentation):
    """Flip left and right with ``probability`` (default: the key flip_probability)."""

    probability: Probability

    @classmethod
    def of(cls, config: Config, **arguments: Any) -> "Flip":
        return cls(**{"probability": config.flip_probability, **arguments})

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return cv2.flip(image, 1) if rng.random() < self.probability else image


@pydantic.dataclasses.dataclass(frozen=True, config=FORBID_EXTRA)
class ColorJitter(Augmentation):
    """Random brightness, contrast and saturation (default strengths: the key color_jitter)."""

    brightness: Probability
    contrast: Probability
    saturation: Probability

    @classmethod
    def of(cls, config: Config, **arguments: Any) -> "ColorJitter":
        return cls(
            **{
                **dict(zip(("brightness", "contrast", "saturation"), config.color_jitter)),
                **arguments,
            }
        )

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        strengths = self.brightness, self.contrast, self.saturation
        return color_jitter(image, rng, *strengths) if any(strengths) else image


MAX_MAGNITUDE = 30
_GREY = (128, 128, 128)
Operation = Callable[[Image.Image, float], Image.Image]


def _affine(picture: Image.Image, *coefficients: float) -> Image.Image:
    return picture.transform(
        picture.size,
        Image.Transform.AFFINE,
        coefficients,
        Image.Resampling.BILINEAR,
        fillcolor=_GREY,
    )


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


@pydantic.dataclasses.dataclass(frozen=True, config=FORBID_EXTRA)
class RandAugment(Augmentation):
    """``layers`` operations of strength ``magnitude``, 0 to 30 (N and M in the paper).

    Strengths have the ranges of AutoAugment (Cubuk et al., arXiv:1805.09501, table 6). The sign of
    a signed strength is random.
    """

    layers: Annotated[int, pydantic.Field(ge=1)] = 2
    magnitude: Annotated[float, pydantic.Field(ge=0, le=MAX_MAGNITUDE)] = 9

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        picture = Image.fromarray(image)
        for _ in range(self.layers):
            operation = OPERATIONS[int(rng.integers(len(OPERATIONS)))]
            sign = 1 if rng.random() < 0.5 else -1
            picture = operation(picture, sign * self.magnitude / MAX_MAGNITUDE)
        return np.asarray(picture)


_ATTEMPTS = 100


@pydantic.dataclasses.dataclass(frozen=True, config=FORBID_EXTRA)
class RandomErasing(Augmentation):
    """With ``probability``, fills a rectangle with random pixels.

    The rectangle covers ``scale`` of the area, with a height-to-width ratio in ``ratio``.
    """

    probability: Probability = 0.5
    scale: Annotated[tuple[Probability, Probability], Rising] = (0.02, 0.4)
    ratio: Annotated[tuple[Alpha, Alpha], Rising] = (0.3, 1 / 0.3)

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if rng.random() >= self.probability:
            return image
        height, width = image.shape[:2]
        for _ in range(_ATTEMPTS):
            area, aspect = height * width * rng.uniform(*self.scale), rng.uniform(*self.ratio)
            rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < rows <= height and 0 < columns <= width:
                top, left = (
                    int(rng.integers(height - rows, endpoint=True)),
                    int(rng.integers(width - columns, endpoint=True)),
                )
                image = image.copy()
                image[top : top + rows, left : left + columns] = rng.integers(
                    0, 256, (rows, columns, 3), np.uint8
                )
                break
        return image


@pydantic.dataclasses.dataclass(frozen=True, config=FORBID_EXTRA)
class Mixup(Augmentation):
    """Weighted mean of two images and of their targets, with weight w ~ Beta(alpha, alpha).

    Zhang et al., arXiv:1710.09412.
    """

    alpha: Alpha = 0.2
    probability: Probability = 1.0
    mixes = True

    def mix(
        self, image: np.ndarray, target: np.ndarray, rng: np.random.Generator, draw: Draw
    ) -> tuple[np.ndarray, np.ndarray]:
        if rng.random() >= self.probability:
            return image, target
        weight = rng.beta(self.alpha, self.alpha)
        other, other_target = draw()
        return (
            cv2.addWeighted(image, weight, other, 1 - weight, 0),
            (weight * target + (1 - weight) * other_target).astype(np.float32),
        )


@pydantic.dataclasses.dataclass(frozen=True, config=FORBID_EXTRA)
class CutMix(Augmentation):
    """Pastes a rectangle of another image; targets are weighted by visible area.

    Yun et al., arXiv:1905.04899. The rectangle has the image's aspect ratio and the fraction 1 - w
    of its area, w ~ Beta(alpha, alpha). Its centre is uniform, and the image's borders clip it.
    """

    alpha: Alpha = 1.0
    probability: Probability = 1.0
    mixes = True

    def mix(
        self, image: np.ndarray, target: np.ndarray, rng: np.random.Generator, draw: Draw
    ) -> tuple[np.ndarray, np.ndarray]:
        if rng.random() >= self.probability:
            return image, target
        height, width = image.shape[:2]
        fraction = np.sqrt(1 - rng.beta(self.alpha, self.alpha))
        rows, columns = (_interval(rng, length, fraction) for length in (height, width))
        other, other_target = draw()
        image = image.copy()
        image[rows, columns] = other[rows, columns]
        weight = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
        return image, (weight * target + (1 - weight) * other_target).astype(np.float32)


def _interval(rng: np.random.Generator, length: int, fraction: float) -> slice:
    centre, half = int(rng.integers(length)), int(length * fraction) // 2
    return slice(max(centre - half, 0), min(centre + half, length))


AUGMENTATIONS: dict[str, type[Augmentation]] = {
    "crop": Crop,
    "flip": Flip,
    "color_jitter": ColorJitter,
    "randaugment": RandAugment,
    "random_erasing": RandomErasing,
    "mixup": Mixup,
    "cutmix": CutMix,
}


@dataclass(frozen=True)
class _Stage:
    augmentation: Augmentation
    stream: int


class Augmenter:
    """The list ``config.augmentations``, applied to samples of a set.

    Args:
        count, num_classes: samples and classes of the set.

    Attributes:
        mixes: whether samples have class probabilities as targets instead of a label.
        min_side: how many pixels the shorter side of a loaded image must keep if a smaller one
            may be loaded; 0: only the whole image.
    """

    def __init__(self, config: Config, count: int, num_classes: int) -> None:
        self._count, self._classes = count, num_classes
        self._seed, self._size, self._resize = config.seed, config.image_size, Resizing.of(config)
        self._stages = _stages(config)
        self.mixes = any(stage.augmentation.mixes for stage in self._stages)
        self.min_side = self._min_side(config)

    def sample(self, load: Load, epoch: int, index: int) -> tuple[np.ndarray, Any]:
        """Sample ``index`` in ``epoch``.

        Returns:
            Image (S, S, 3) uint8 RGB, and its label or, with mixing, probabilities (C,) float32.

        Args:
            load: index -> (image (H, W, 3) uint8 RGB, label).
        """
        if self.mixes:
            return self._mixed(load, epoch, index, len(self._stages))
        image, label = load(index)
        for stage in self._stages:
            image = stage.augmentation(
                image, sample_generator(self._seed, epoch, index, stage.stream)
            )
        return self._resize(image, self._size, self._size), label

    def _min_side(self, config: Config) -> int:
        # Without antialiasing, samples are made of single pixels of the whole image.
        if config.reduced_decoding == "never" or not config.antialias:
            return 0
        first = self._stages[0].augmentation if self._stages else None
        if not isinstance(first, Crop):
            return 0
        return math.ceil(REDUCED_MARGIN * first.min_side)

    def _mixed(
        self, load: Load, epoch: int, index: int, stages: int
    ) -> tuple[np.ndarray, np.ndarray]:
        image, label = load(index)
        target = np.zeros(self._classes, np.float32)
        target[label] = 1
        for position, stage in enumerate(self._stages[:stages]):
            rng = sample_generator(self._seed, epoch, index, stage.stream)
            if stage.augmentation.mixes:
                other = int(rng.integers(self._count))
                draw = partial(self._mixed, load, epoch, other, position)
                image, target = stage.augmentation.mix(
                    self._resize(image, self._size, self._size), target, rng, draw
                )
            else:
                image = stage.augmentation(image, rng)
        return self._resize(image, self._size, self._size), target


def check_augmentations(config: Config) -> None:
    """Raise UserError for an unknown entry or argument, or an order that makes wrong targets."""
    _stages(config)
    names = [parse_spec("augmentations", text)[0] for text in config.augmentations]
    cuts = config.train_crop != "resize" and "crop" in names
    if cuts and "cutmix" in names and "crop" in names[names.index("cutmix") :]:
        raise UserError(
            "augmentations: list cutmix after crop: crop may cut off the pasted part, which the "
            "targets still count"
        )


def sample_generator(seed: int, epoch: int, index: int, stream: int = 0) -> np.random.Generator:
    """One random stream of one sample in one epoch (Philox, Salmon et al. 2011)."""
    key, counter = np.array([seed, index], np.uint64), np.array([0, epoch, stream, 0], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def _stages(config: Config) -> list[_Stage]:
    """The entries with their streams.

    A stream depends on the entry's name and on how often that name came before, not on its place.
    """
    stages: list[_Stage] = []
    names: list[str] = []
    for text in config.augmentations:
        names.append(text.partition("(")[0].strip())
        stream = zlib.crc32(f"{names[-1]} {names.count(names[-1])}".encode())
        stages.append(
            _Stage(create_from_spec("augmentations", text, AUGMENTATIONS, config), stream)
        )
    return stages
