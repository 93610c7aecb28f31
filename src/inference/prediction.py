"""Predictions for single images: reading any picture a person has, the likeliest classes, a contact sheet."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from src.dataset.decoding import BadImage, read_image
from src.dataset.sources import images_in
from src.dataset.transforms import eval_transform
from src.inference.engines import Engine
from src.inference.evaluation import count_nonfinite, nonfinite_line
from src.inference.recorded_model import RecordedModel
from src.utils.errors import UserError
from src.utils.files import write_whole
from src.utils.text import escaped

_TOP = 5
_BATCH = 16
_SHEET_COLUMNS = 5
_SHEET_IMAGES = 50


@dataclass(frozen=True)
class Prediction:
    """An image file and its likeliest classes with their probabilities, the likeliest first."""

    path: str
    classes: list[str]
    probabilities: list[float]

    def as_dict(self) -> dict[str, Any]:
        return {"image": self.path, "predictions": [{"class": name, "probability": probability}
                                                    for name, probability in zip(self.classes, self.probabilities)]}


def find_images(names: Sequence[str]) -> list[str]:
    """Image files that ``names`` (files and folders) stand for. Raises UserError if there are none."""
    found: list[str] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = sorted(images_in(path)[0])
            if not inside:
                raise UserError(f"the folder '{name}' has no images")
            found += inside
        elif path.is_file():
            found.append(name)
        else:
            raise UserError(f"image '{name}' does not exist")
    return found


def predict(paths: Sequence[str], model: RecordedModel, engine: Engine) -> tuple[list[Prediction], list[str]]:
    """A Prediction for each image file that can be decoded, and a message for each that cannot.

    Args:
        model: says how images are prepared and what classes are called.
        engine: (B, S, S, 3) uint8 images -> (B, C) logits.
    """
    names = {label: name for name, label in (model.class_to_index or {}).items()}
    size = model.config.image_size
    predictions: list[Prediction] = []
    bad: list[str] = []
    for start in range(0, len(paths), _BATCH):
        # Always a whole batch, so that MindSpore compiles one graph.
        images = np.zeros((min(_BATCH, len(paths)), size, size, 3), np.uint8)
        good: list[str] = []
        for path in paths[start:start + _BATCH]:
            try:
                images[len(good)] = eval_transform(read_image(path), model.config)
                good.append(path)
            except BadImage as failure:
                bad.append(str(failure))
        logits = engine(images)[:len(good)]
        if nonfinite := count_nonfinite(logits):
            raise UserError(nonfinite_line(nonfinite, len(good)))
        for path, probabilities in zip(good, softmax(logits)):
            best = np.argsort(-probabilities, kind="stable")[:_TOP]
            predictions.append(Prediction(path, [names.get(int(label), str(label)) for label in best],
                                          [round(float(probabilities[label]), 6) for label in best]))
    if not predictions:
        raise UserError(bad[0] if len(bad) == 1 else f"none of the {len(bad)} images can be decoded: {bad[0]}")
    return predictions, bad


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities (N, C) of logits (N, C)."""
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def as_table(predictions: Sequence[Prediction]) -> str:
    """Lines of text, one per image."""
    width = max(len(escaped(prediction.path)) for prediction in predictions)
    return "\n".join(f"{escaped(prediction.path):<{width}}  " + "  ".join(
        f"{escaped(name)} {100 * probability:.1f}%" for name, probability in zip(prediction.classes, prediction.probabilities))
        for prediction in predictions)


def contact_sheet(predictions: Sequence[Prediction], path: str) -> None:
    """Write a PNG of up to 50 images with their two likeliest classes. Raises UserError if it cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    shown = predictions[:_SHEET_IMAGES]
    columns = min(_SHEET_COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(2.4 * columns, 2.9 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for axes in np.atleast_1d(figure.subplots(rows, columns)).flat:
        axes.axis("off")
    for axes, prediction in zip(figure.axes, shown):
        axes.imshow(read_image(prediction.path))
        lines = [f"{escaped(name)} {100 * probability:.1f}%" for name, probability in
                 list(zip(prediction.classes, prediction.probabilities))[:2]]
        title = "\n".join([escaped(os.path.basename(prediction.path))[:24], *lines])
        # A dollar in a name is no formula.
        axes.set_title(title, fontsize=8, parse_math=False)
    write_whole(path, lambda partial: figure.savefig(partial, dpi=100, format="png"))
