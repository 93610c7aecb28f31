"""Augmentation as an ordered list of entries, uint8 RGB images in and out.

Each entry draws from its own counter-based stream of random numbers, a function of (seed, epoch, sample, entry). So an image of
an epoch looks the same after a resume, with another number of ranks or threads, and whatever other entries the list has.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import cv2
import numpy as np
import pydantic

from src.dataset.transforms import Resizing, color_jitter, padded_crop, random_resized_crop
from src.utils.config import Config
from src.utils.named import STRICT, make_named

Probability = Annotated[float, pydantic.Field(ge=0, le=1)]
Draw = Callable[[], tuple[np.ndarray, np.ndarray]]
Load = Callable[[int], tuple[np.ndarray, int]]

AUGMENTATIONS = {
    "crop": "src.dataset.augmentations:Crop",
    "flip": "src.dataset.augmentations:Flip",
    "color_jitter": "src.dataset.augmentations:ColorJitter",
    "randaugment": "src.dataset.randaugment:RandAugment",
    "random_erasing": "src.dataset.random_erasing:RandomErasing",
    "mixup": "src.dataset.mixing:Mixup",
    "cutmix": "src.dataset.mixing:CutMix",
}


class Augmentation:
    """An entry of the list. A subclass defines ``__call__``, or ``mix`` if ``mixes`` is True."""

    mixes = False

    @classmethod
    def of(cls, config: Config, **arguments: Any) -> "Augmentation":
        """The entry with the arguments that the list gives it."""
        return cls(**arguments)

    def __call__(self, image: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """(H, W, 3) -> (H', W', 3)."""
        return image

    def mix(self, image: np.ndarray, target: np.ndarray, random: np.random.Generator, draw: Draw) -> tuple[np.ndarray, np.ndarray]:
        """Image (S, S, 3) and target, class probabilities (C,), mixed with those of another sample.

        Args:
            draw: returns the image and target of another sample, which the entries before this one have augmented.
        """
        return image, target


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Crop(Augmentation):
    """To the network's image size, by the keys train_crop, crop_scale, crop_ratio, crop_padding, interpolation and antialias."""

    kind: str
    size: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    padding: int
    resize: Resizing

    @classmethod
    def of(cls, config: Config, **arguments: Any) -> "Crop":
        return cls(config.train_crop, config.image_size, config.crop_scale, config.crop_ratio, config.crop_padding, Resizing.of(config),
                   **arguments)

    def __call__(self, image: np.ndarray, random: np.random.Generator) -> np.ndarray:
        if self.kind == "random_resized":
            return random_resized_crop(image, random, self.size, self.scale, self.ratio, self.resize)
        image = self.resize(image, self.size, self.size)
        return padded_crop(image, random, self.padding) if self.kind == "padded" else image


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Flip(Augmentation):
    """Exchange left and right with probability flip_probability."""

    probability: Probability

    @classmethod
    def of(cls, config: Config, **arguments: Any) -> "Flip":
        return cls(**{"probability": config.flip_probability, **arguments})

    def __call__(self, image: np.ndarray, random: np.random.Generator) -> np.ndarray:
        return cv2.flip(image, 1) if random.random() < self.probability else image


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class ColorJitter(Augmentation):
    """Random brightness, contrast and saturation with the strengths of the key color_jitter."""

    brightness: Probability
    contrast: Probability
    saturation: Probability

    @classmethod
    def of(cls, config: Config, **arguments: Any) -> "ColorJitter":
        return cls(**{**dict(zip(("brightness", "contrast", "saturation"), config.color_jitter)), **arguments})

    def __call__(self, image: np.ndarray, random: np.random.Generator) -> np.ndarray:
        strengths = self.brightness, self.contrast, self.saturation
        return color_jitter(image, random, *strengths) if any(strengths) else image


@dataclass(frozen=True)
class _Stage:
    augmentation: Augmentation
    stream: int


class Augmenter:
    """The list ``config.augmentations``, applied to samples of a set.

    Args:
        count, num_classes: samples and classes of the set.

    Attributes:
        mixes: whether samples have class probabilities for targets, in place of a label.
    """

    def __init__(self, config: Config, count: int, num_classes: int) -> None:
        self._count, self._classes = count, num_classes
        self._seed, self._size, self._resize = config.seed, config.image_size, Resizing.of(config)
        self._stages = _stages(config)
        self.mixes = any(stage.augmentation.mixes for stage in self._stages)

    def sample(self, load: Load, epoch: int, index: int) -> tuple[np.ndarray, Any]:
        """Sample ``index`` in ``epoch``: image (S, S, 3) uint8 RGB, and its label or, with mixing, probabilities (C,) float32.

        Args:
            load: index -> (image (H, W, 3) uint8 RGB, label).
        """
        if self.mixes:
            return self._mixed(load, epoch, index, len(self._stages))
        image, label = load(index)
        for stage in self._stages:
            image = stage.augmentation(image, sample_generator(self._seed, epoch, index, stage.stream))
        return self._resize(image, self._size, self._size), label

    def _mixed(self, load: Load, epoch: int, index: int, stages: int) -> tuple[np.ndarray, np.ndarray]:
        image, label = load(index)
        target = np.zeros(self._classes, np.float32)
        target[label] = 1
        for position, stage in enumerate(self._stages[:stages]):
            random = sample_generator(self._seed, epoch, index, stage.stream)
            if stage.augmentation.mixes:
                other = int(random.integers(self._count))
                draw = partial(self._mixed, load, epoch, other, position)
                image, target = stage.augmentation.mix(self._resize(image, self._size, self._size), target, random, draw)
            else:
                image = stage.augmentation(image, random)
        return self._resize(image, self._size, self._size), target


def check_augmentations(config: Config) -> None:
    """Raise UserError for an unknown entry or argument."""
    _stages(config)


def sample_generator(seed: int, epoch: int, index: int, stream: int = 0) -> np.random.Generator:
    """One random stream of one sample in one epoch (Philox, Salmon et al. 2011)."""
    key, counter = np.array([seed, index], np.uint64), np.array([0, epoch, stream, 0], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def _stages(config: Config) -> list[_Stage]:
    """The entries with their streams, which depend on an entry's name and how often that came before, not on its place."""
    stages: list[_Stage] = []
    names: list[str] = []
    for text in config.augmentations:
        names.append(text.partition("(")[0].strip())
        stream = zlib.crc32(f"{names[-1]} {names.count(names[-1])}".encode())
        stages.append(_Stage(make_named("augmentations", text, AUGMENTATIONS, config), stream))
    return stages
