"""Operations on one image."""

import math

import numpy as np
import pytest
from conftest import make_config

from src.dataset.augmentations import sample_generator
from src.dataset.transforms import _random_part, color_jitter, eval_transform, padded_crop


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)


def test_random_parts_have_the_seeds_area_and_aspect():
    random = sample_generator(0, 0, 0)
    parts = [_random_part(random, 300, 400, (0.08, 1.0), (0.75, 1.333)) for _ in range(4000)]
    areas = np.array([w * h / 120_000 for _, _, w, h in parts])
    aspects = np.array([w / h for _, _, w, h in parts])
    assert areas.min() > 0.07 and areas.max() <= 1
    assert aspects.min() > 0.74 and aspects.max() < 1.35
    assert all(x >= 0 and y >= 0 and x + w <= 400 and y + h <= 300 for x, y, w, h in parts)


def test_aspect_of_random_parts_is_uniform_in_its_logarithm():
    random = sample_generator(0, 0, 0)
    parts = [_random_part(random, 300, 400, (0.1, 0.4), (0.75, 1.333)) for _ in range(4000)]  # all of them fit
    logs = np.log([w / h for _, _, w, h in parts])
    low, high = math.log(0.75), math.log(1.333)
    assert abs(logs.mean() - (low + high) / 2) < 0.01 and abs(logs.std() - (high - low) / math.sqrt(12)) < 0.005


def test_jitter_of_zero_strength_changes_nothing(image):
    assert np.array_equal(color_jitter(image, sample_generator(0, 0, 0), 0, 0, 0), image)


def test_brightness_is_uniform_in_its_range():
    grey = np.full((4, 4, 3), 100, np.uint8)
    values = [color_jitter(grey, sample_generator(0, 0, i), 0.4, 0, 0)[0, 0, 0] for i in range(2000)]
    assert min(values) >= 60 and max(values) <= 140
    assert abs(np.mean(values) - 100) < 2 and abs(np.std(values) - 80 / math.sqrt(12)) < 1


def test_padded_crop_moves_by_at_most_the_padding():
    image = np.zeros((8, 8, 3), np.uint8)
    image[4, 4] = 255
    places = {tuple(np.argwhere(padded_crop(image, sample_generator(0, 0, i), 2)[:, :, 0])[0]) for i in range(500)}
    assert places == {(y, x) for y in range(2, 7) for x in range(2, 7)}


def test_evaluation_resizes_to_256_and_crops_the_central_224():
    config = make_config()
    assert config.resized_side == 256
    ramp = np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (256, 1, 3))
    cropped = eval_transform(ramp, config)
    assert cropped.shape == (224, 224, 3)
    assert cropped[0, 0, 0] == 16 and cropped[0, -1, 0] == 239
