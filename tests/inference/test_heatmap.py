"""Heat maps against networks whose attention is known."""

import cv2
import numpy as np
import pytest
from scipy.special import softmax

from src.inference.heatmap import GRID, covered, encode_png, heat, overlay

SIDE = 64
MEAN = (0.5, 0.4, 0.3)


def probabilities_of(images, place, sureness=8):
    """Of three classes; the second is likelier the whiter the pixels at ``place`` are."""
    brightness = images[:, place[0], place[1]].mean(axis=(1, 2, 3)) / 255
    logits = np.zeros((len(images), 3), np.float32)
    logits[:, 1] = sureness * brightness
    return softmax(logits, axis=1)


def whole_and_covered(image):
    return np.concatenate([image[None], covered(image, MEAN)])


# With a sureness of 60 the probability is 1 with and without any cover.
@pytest.mark.parametrize("sureness", [8, 60])
@pytest.mark.parametrize("row,column", [(0, 0), (0, 48), (24, 24), (48, 8)])
def test_the_warmest_place_is_where_the_network_looks(row, column, sureness):
    image = np.full((SIDE, SIDE, 3), 255, np.uint8)
    place = slice(row, row + 16), slice(column, column + 16)
    warmth = heat(probabilities_of(whole_and_covered(image), place, sureness), 1, SIDE)
    assert warmth.shape == (SIDE, SIDE) and warmth.min() == 0 and warmth.max() == 1
    warm_rows, warm_columns = np.nonzero(warmth > 0.6)
    assert abs(warm_rows.mean() + 0.5 - (row + 8)) <= 4
    assert abs(warm_columns.mean() + 0.5 - (column + 8)) <= 4
    # A window that does not touch the place changes nothing.
    far = np.abs(np.arange(SIDE) + 0.5 - (row + 8)) > 8 + SIDE / 4
    assert (warmth[far] == 0).all()


def test_a_network_that_looks_nowhere_gives_a_cold_map():
    same = np.tile([0.2, 0.7, 0.1], (1 + GRID * GRID, 1))
    assert (heat(same, 1, SIDE) == 0).all()
    # Nor is a place warm because covering it makes the class likelier.
    same[0] = 0.5, 0.4, 0.1
    assert (heat(same, 1, SIDE) == 0).all()
    # With one class there is nothing to choose from.
    assert (heat(np.ones((1 + GRID * GRID, 1)), 0, SIDE) == 0).all()


@pytest.mark.parametrize("side", [28, 32, 224])
def test_the_windows_cover_every_pixel_in_the_mean_colour(side):
    image = np.full((side, side, 3), 255, np.uint8)
    copies = covered(image, MEAN)
    assert copies.shape == (GRID * GRID, side, side, 3) and (image == 255).all()
    hidden = (copies != 255).any(axis=-1)
    assert hidden.any(axis=0).all()
    assert set(map(tuple, copies[hidden].tolist())) == {(128, 102, 76)}


def test_the_overlay_is_grey_where_it_is_cold():
    image = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    warmth = np.zeros((SIDE, SIDE), np.float32)
    assert np.ptp(overlay(image, warmth), axis=-1).max() == 0
    warmth[:32] = 1
    red, _, blue = np.moveaxis(overlay(image, warmth).astype(int), -1, 0)
    assert (red - blue)[:16].min() > 100 and (red - blue)[48:].max() == 0
    decoded = cv2.imdecode(np.frombuffer(encode_png(image), np.uint8), cv2.IMREAD_COLOR)
    assert (decoded[..., ::-1] == image).all()
