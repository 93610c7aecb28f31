"""A sheet of images with their predictions, as a PNG."""

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from src.dataset.decoding import DEFAULT_MAX_PIXELS, read_image
from src.dataset.transforms import THUMBNAIL_SIDE, thumbnail
from src.inference.prediction import Prediction
from src.utils.files import write_atomically
from src.utils.log import escaped, shortened

SHEET_IMAGES = 50
_COLUMNS = 5
_NAME_LENGTH = 26
_SURE, _UNSURE, _REST = "tab:blue", "tab:orange", "0.85"


def save_sheet(
    predictions: Sequence[Prediction], path: str, max_pixels: int = DEFAULT_MAX_PIXELS
) -> None:
    """Draw up to 50 images, by class and the surest first, each with a bar for its probability.

    Raises:
        UserError: if the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = sorted(predictions[:SHEET_IMAGES], key=lambda p: (p.classes[0], -p.probabilities[0]))
    columns = min(_COLUMNS, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(2.4 * columns, 3 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    cells = np.atleast_1d(figure.subplots(rows, columns)).flat
    for axes in cells:
        axes.axis("off")
    for axes, prediction in zip(figure.axes, shown):
        _draw(axes, prediction, max_pixels)
    write_atomically(path, lambda partial: figure.savefig(partial, dpi=100, format="png"))


def _draw(axes: Any, prediction: Prediction, max_pixels: int) -> None:
    image = thumbnail(read_image(prediction.path, max_pixels, THUMBNAIL_SIDE))
    axes.imshow(image)
    name = shortened(escaped(os.path.basename(prediction.path)), _NAME_LENGTH)
    title = "\n".join([name, *prediction.percentages()[:2]])
    # parse_math: a dollar in a name is not a formula.
    axes.set_title(title, fontsize=8, parse_math=False)
    height, width = image.shape[:2]
    colour = _UNSURE if prediction.unsure else _SURE
    for end, shade in ((width, _REST), (width * prediction.probabilities[0], colour)):
        below = [1.05 * height] * 2
        axes.plot([0, end], below, color=shade, linewidth=4, solid_capstyle="butt", clip_on=False)
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
