"""Occlusion heat maps: which regions of an image a prediction depends on.

The occlusion sensitivity of Zeiler and Fergus, "Visualizing and Understanding Convolutional
Networks", 2013 (arXiv:1311.2901), section 4.2. It needs outputs only, no gradients, so it works for
every network and every kind of file.
"""

from collections.abc import Sequence

import cv2
import numpy as np

# Windows per row and column. Neighbours overlap by half.
GRID = 7
# (R, G, B) of the warmest place, and how much of the image it hides.
_WARM, _OPACITY = (255, 70, 0), 0.7


def covered(image: np.ndarray, mean: Sequence[float]) -> np.ndarray:
    """Copies of the image, each with one window covered: (S, S, 3) -> (GRID^2, S, S, 3) uint8.

    Args:
        mean: the colour of the cover, R, G, B in [0, 1]: what the network sees as 0.
    """
    copies = np.repeat(image[None], GRID * GRID, axis=0)
    colour = np.round(255 * np.asarray(mean)).astype(np.uint8)
    for copy, (rows, columns) in zip(copies, _windows(len(image))):
        copy[rows, columns] = colour
    return copies


def heat(probabilities: np.ndarray, label: int, side: int) -> np.ndarray:
    """How much the log-odds of a class fall when a pixel is covered: (S, S) in [0, 1].

    The largest value is 1, or all are 0 if covering never makes the class less likely. Unlike
    probabilities, log-odds do not saturate where a network is sure.

    Args:
        probabilities: (1 + GRID^2, C) of the whole image, then of the images of ``covered``.
        label: the class.
        side: S.
    """
    odds = _log_odds(probabilities, label)
    total, count = np.zeros((side, side)), np.zeros((side, side))
    for fall, (rows, columns) in zip(odds[0] - odds[1:], _windows(side)):
        total[rows, columns] += fall
        count[rows, columns] += 1
    found = np.maximum(total / np.maximum(count, 1), 0)
    largest = found.max()
    return (found / largest if largest else found).astype(np.float32)


def _log_odds(probabilities: np.ndarray, label: int) -> np.ndarray:
    """log(p / (1 - p)) of a class, exact where p is close to 1: (N, C) -> (N,)."""
    least = float(np.finfo(np.float32).tiny)
    others = np.delete(probabilities.astype(np.float64), label, axis=1).sum(axis=1)
    return np.log(np.maximum(probabilities[:, label], least)) - np.log(np.maximum(others, least))


def overlay(image: np.ndarray, warmth: np.ndarray) -> np.ndarray:
    """The image (S, S, 3) in grey, and (S, S) warmth in colour on it: (S, S, 3) uint8."""
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    # The windows' edges mean nothing.
    smooth = cv2.GaussianBlur(warmth, (0, 0), len(image) / 24)
    weight = _OPACITY * smooth[..., None]
    return np.round((1 - weight) * grey + weight * np.array(_WARM)).astype(np.uint8)


def encode_png(image: np.ndarray) -> bytes:
    """The PNG file of an image (H, W, 3) uint8 RGB."""
    _, encoded = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    return encoded.tobytes()


def _windows(side: int) -> list[tuple[slice, slice]]:
    """(rows, columns) of each window. Together they cover an image of that side."""
    edges = np.round(np.linspace(0, side, GRID + 2)).astype(int)
    spans = [slice(edges[index], edges[index + 2]) for index in range(GRID)]
    return [(rows, columns) for rows in spans for columns in spans]
