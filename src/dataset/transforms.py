"""Operations on one image, uint8 RGB in and out; normalisation is part of the network."""

import math
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from src.cli.config import Config

_CROP_ATTEMPTS = 10
THUMBNAIL_SIDE = 256
# If the resized image has more pixels than this and than the original, only the crop is computed.
_MAX_RESIZED_PIXELS = 1 << 22
# An image that was decoded at a reduced scale keeps at least this many times the pixels, along each
# side, that it is then resized to. See benchmarks/large_photographs.py for what it costs.
REDUCED_MARGIN = 2
_OPENCV = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}
_PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class Resizing:
    """How images are resized: the keys interpolation and antialias.

    With antialias, a pixel of a smaller image is a weighted mean of all pixels that it covers, as
    in Pillow, torchvision and timm. Without, it is a mean of the nearest 4 (bilinear) or 16
    (bicubic), as in OpenCV and MindSpore.
    """

    interpolation: str = "bilinear"
    antialias: bool = False

    @classmethod
    def of(cls, config: Config) -> "Resizing":
        return cls(config.interpolation, config.antialias)

    def __call__(self, image: np.ndarray, height: int, width: int) -> np.ndarray:
        """(H, W, 3) -> (height, width, 3)."""
        if image.shape[:2] == (height, width):
            return image
        if self.antialias:
            return np.asarray(
                Image.fromarray(image).resize((width, height), _PILLOW[self.interpolation])
            )
        return cv2.resize(image, (width, height), interpolation=_OPENCV[self.interpolation])

    def part(
        self, image: np.ndarray, whole: tuple[int, int], start: tuple[int, int], side: int
    ) -> np.ndarray:
        """The square of ``side`` at ``start`` in the image resized to ``whole``, (height, width).

        Only that part is computed: of a picture of 1 x 8000 pixels, the whole would take gigabytes.
        """
        if self.antialias:
            scales = image.shape[0] / whole[0], image.shape[1] / whole[1]
            top, left = start[0] * scales[0], start[1] * scales[1]
            box = (left, top, left + side * scales[1], top + side * scales[0])
            resized = Image.fromarray(image).resize((side, side), _PILLOW[self.interpolation], box)
            return np.asarray(resized)
        # The longer axis first, which leaves less to compute.
        for axis in sorted((0, 1), key=lambda axis: -image.shape[axis]):
            image = _sampled(image, axis, whole[axis], start[axis], side, self.interpolation)
        return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def eval_transform(image: np.ndarray, config: Config) -> np.ndarray:
    """(H, W, 3) -> (image_size, image_size, 3): resize, then crop the centre.

    The key eval_resize_mode says how to resize:

    ``square`` makes both sides ``config.resized_side``. ``shorter_side`` makes the shorter side
    that long, and the longer one in proportion, rounded down. Crops begin where torchvision's do.
    """
    height, width = eval_size(image.shape[0], image.shape[1], config)
    side = config.image_size
    top, left = round((height - side) / 2), round((width - side) / 2)
    if height * width > max(_MAX_RESIZED_PIXELS, image.shape[0] * image.shape[1]):
        return Resizing.of(config).part(image, (height, width), (top, left), side)
    image = Resizing.of(config)(image, height, width)
    return image[top : top + side, left : left + side]


def eval_min_side(config: Config) -> int:
    """``min_side`` of ``decode_image`` for an image that evaluation takes."""
    if config.reduced_decoding != "all" or not config.antialias:
        return 0
    return REDUCED_MARGIN * config.resized_side


def eval_size(height: int, width: int, config: Config) -> tuple[int, int]:
    """(height, width) to which evaluation resizes an image of this size."""
    side = config.resized_side
    if config.eval_resize_mode == "square":
        return side, side
    shorter = min(height, width)
    return height * side // shorter, width * side // shorter


def thumbnail(image: np.ndarray) -> np.ndarray:
    """The image as a sheet shows it, (H, W, 3), so that many large ones fit into memory."""
    scale = THUMBNAIL_SIDE / max(image.shape[:2])
    if scale >= 1:
        return image
    height, width = (max(round(side * scale), 1) for side in image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


def _sampled(
    image: np.ndarray, axis: int, size: int, start: int, count: int, interpolation: str
) -> np.ndarray:
    """``count`` rows or columns from ``start``, of the image resized to ``size`` along ``axis``.

    In float32, by OpenCV's formulas (modules/imgproc/src/resize.cpp, without antialiasing).
    """
    length = image.shape[axis]
    at = (np.arange(start, start + count) + 0.5) * (length / size) - 0.5
    first = np.floor(at).astype(np.int64)
    x = (at - first).astype(np.float32)
    weights = {0: 1 - x, 1: x}
    if interpolation == "bicubic":
        weights = {offset: _cubic(np.abs(x - offset)) for offset in (-1, 0, 1, 2)}
    shape = [-1 if dimension == axis else 1 for dimension in range(image.ndim)]
    total: np.ndarray | float = 0.0
    for offset, weight in weights.items():
        pixels = np.take(image, np.clip(first + offset, 0, length - 1), axis)
        total = total + pixels * weight.reshape(shape)
    return np.asarray(total)


def _cubic(distance: np.ndarray) -> np.ndarray:
    """Weight of a pixel at a distance below 2 (Keys 1981, with OpenCV's a = -0.75)."""
    a, d = -0.75, distance
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    return np.where(d <= 1, near, ((a * d - 5 * a) * d + 8 * a) * d - 4 * a)


def random_resized_crop(
    image: np.ndarray,
    rng: np.random.Generator,
    size: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    resize: Resizing,
) -> np.ndarray:
    """A random part of the image, resized to (size, size, 3).

    The part has ``scale`` of the area and ``ratio`` of width to height. Szegedy et al.,
    arXiv:1409.4842, section 6. The ratio is uniform in its logarithm; if ten parts do not fit, the
    largest central one is taken.
    """
    height, width = image.shape[:2]
    left, top, part_width, part_height = _random_part(rng, height, width, scale, ratio)
    return resize(image[top : top + part_height, left : left + part_width], size, size)


def padded_crop(image: np.ndarray, rng: np.random.Generator, padding: int) -> np.ndarray:
    """Pad by ``padding`` black pixels on each side, then crop the original size at random."""
    height, width = image.shape[:2]
    top, left = rng.integers(0, 2 * padding, size=2, endpoint=True)
    padded = cv2.copyMakeBorder(image, padding, padding, padding, padding, cv2.BORDER_CONSTANT)
    return padded[top : top + height, left : left + width]


def color_jitter(
    image: np.ndarray,
    rng: np.random.Generator,
    brightness: float,
    contrast: float,
    saturation: float,
) -> np.ndarray:
    """Blend with black, with the mean grey and with the grey image, in random order.

    Each weight is uniform in [1 - strength, 1 + strength].
    """
    factors = [1 + strength * rng.uniform(-1, 1) for strength in (brightness, contrast, saturation)]
    adjust = (_adjust_brightness, _adjust_contrast, _adjust_saturation)
    for which in rng.permutation(3):
        image = adjust[which](image, factors[which])
    return image


def _random_part(
    rng: np.random.Generator,
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """(left, top, width, height)."""
    for _ in range(_CROP_ATTEMPTS):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        part_width, part_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < part_width <= width and 0 < part_height <= height:
            left = int(rng.integers(0, width - part_width, endpoint=True))
            top = int(rng.integers(0, height - part_height, endpoint=True))
            return left, top, part_width, part_height
    aspect = min(max(width / height, ratio[0]), ratio[1])
    part_width = min(width, max(round(height * aspect), 1))
    part_height = min(height, max(round(width / aspect), 1))
    return (width - part_width) // 2, (height - part_height) // 2, part_width, part_height


def _adjust_brightness(image: np.ndarray, factor: float) -> np.ndarray:
    return _line(image, factor, 0.0)


def _adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    mean = float(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0])
    return _line(image, factor, mean * (1 - factor))


def _adjust_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(image, factor, grey, 1 - factor, 0)


def _line(image: np.ndarray, slope: float, offset: float) -> np.ndarray:
    """``slope * value + offset`` of each value, rounded and saturated."""
    return cv2.addWeighted(image, slope, image, 0, offset)
