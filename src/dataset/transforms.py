"""Augmentation and evaluation preprocessing of one image, uint8 RGB in and out; normalisation is the network's side.

Every random number comes from a counter-based generator keyed by (seed, sample) and positioned by the epoch, so an
image of an epoch looks the same after a resume, with another number of ranks, or of threads.
"""

import math

import cv2
import numpy as np

_CROP_ATTEMPTS = 10


def sample_generator(seed, epoch, index):
    """The random stream of one sample in one epoch (Philox, Salmon et al. 2011)."""
    key, counter = np.array([seed, index], np.uint64), np.array([0, epoch, 0, 0], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def train_transform(image, random, config):
    """(H, W, 3) -> (image_size, image_size, 3), both uint8 RGB, by the augmentation keys of ``config``."""
    size = config.image_size
    if config.train_crop == "random_resized":
        image = random_resized_crop(image, random, size, config.crop_scale, config.crop_ratio)
    else:
        image = resize(image, size)
        if config.train_crop == "padded":
            image = padded_crop(image, random, config.crop_padding)
    if random.random() < config.flip_probability:
        image = cv2.flip(image, 1)
    if any(config.color_jitter):
        image = color_jitter(image, random, *config.color_jitter)
    return image


def eval_transform(image, config):
    """(H, W, 3) -> (image_size, image_size, 3): resize to a square of ``config.resized_side``, crop the centre."""
    image = resize(image, config.resized_side)
    start = (config.resized_side - config.image_size) // 2
    return image[start:start + config.image_size, start:start + config.image_size]


def resize(image, side):
    """Bilinear, to (side, side, 3)."""
    if image.shape[:2] == (side, side):
        return image
    return cv2.resize(image, (side, side), interpolation=cv2.INTER_LINEAR)


def random_resized_crop(image, random, size, scale, ratio):
    """A random part of ``scale`` of the area and ``ratio`` of width to height, resized to (size, size, 3).

    Szegedy et al., arXiv:1409.4842, section 6; the ratio is drawn uniformly in its logarithm, and after ten parts that do not
    fit the largest central one is taken.
    """
    height, width = image.shape[:2]
    left, top, part_width, part_height = _random_part(random, height, width, scale, ratio)
    return resize(image[top:top + part_height, left:left + part_width], size)


def padded_crop(image, random, padding):
    """Pad by ``padding`` black pixels on each side, then crop the original size at random."""
    height, width = image.shape[:2]
    top, left = random.integers(0, 2 * padding, size=2, endpoint=True)
    padded = cv2.copyMakeBorder(image, padding, padding, padding, padding, cv2.BORDER_CONSTANT)
    return padded[top:top + height, left:left + width]


def color_jitter(image, random, brightness, contrast, saturation):
    """Blend with black, with the mean grey and with the grey image, in random order.

    Each weight is uniform in [1 - strength, 1 + strength].
    """
    factors = [1 + strength * random.uniform(-1, 1) for strength in (brightness, contrast, saturation)]
    adjust = (_adjust_brightness, _adjust_contrast, _adjust_saturation)
    for which in random.permutation(3):
        image = adjust[which](image, factors[which])
    return image


def _random_part(random, height, width, scale, ratio):
    for _ in range(_CROP_ATTEMPTS):
        area = height * width * random.uniform(*scale)
        aspect = math.exp(random.uniform(math.log(ratio[0]), math.log(ratio[1])))
        part_width, part_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < part_width <= width and 0 < part_height <= height:
            left = int(random.integers(0, width - part_width, endpoint=True))
            top = int(random.integers(0, height - part_height, endpoint=True))
            return left, top, part_width, part_height
    aspect = min(max(width / height, ratio[0]), ratio[1])
    part_width = min(width, max(round(height * aspect), 1))
    part_height = min(height, max(round(width / aspect), 1))
    return (width - part_width) // 2, (height - part_height) // 2, part_width, part_height


def _adjust_brightness(image, factor):
    return _line(image, factor, 0.0)


def _adjust_contrast(image, factor):
    mean = float(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0])
    return _line(image, factor, mean * (1 - factor))


def _adjust_saturation(image, factor):
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(image, factor, grey, 1 - factor, 0)


def _line(image, slope, offset):
    """``slope * value + offset`` of each value, rounded and saturated."""
    return cv2.addWeighted(image, slope, image, 0, offset)
