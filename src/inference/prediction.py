"""Predictions for single images: reading any picture a person has, the likeliest classes, files of results, a contact sheet."""

import csv
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from scipy.special import softmax

from src.dataset.batches import EvalBatches, prefetch
from src.dataset.decoding import read_image
from src.dataset.image_set import ImageSet
from src.dataset.sources import images_in
from src.inference.engines import Engine, with_flip
from src.inference.evaluation import count_nonfinite, nonfinite_line, write_results
from src.inference.recorded_model import RecordedModel
from src.parallel.long_task import LongTask, note
from src.utils.errors import UserError
from src.utils.files import write_whole
from src.utils.text import escaped

_BATCH = 16
_SHEET_COLUMNS = 5
_SHEET_IMAGES = 50
# What a list of images may be called.
_LISTS = (".txt", ".lst")
STANDARD_INPUT = "-"


@dataclass(frozen=True)
class Prediction:
    """An image file and its likeliest classes with their probabilities, the likeliest first."""

    path: str
    classes: list[str]
    probabilities: list[float]

    def as_dict(self) -> dict[str, Any]:
        return {"image": self.path, "predictions": [{"class": name, "probability": probability}
                                                    for name, probability in zip(self.classes, self.probabilities)]}


def find_images(names: Sequence[str], standard_input: TextIO | None = None) -> list[str]:
    """Image files that ``names`` stand for: files, folders, lists (.txt) with a file a line, or "-", a list on standard input.

    Raises:
        UserError: if there are none.
    """
    found: list[str] = []
    for name in names:
        path = Path(name)
        if name == STANDARD_INPUT:
            found += _listed(standard_input or sys.stdin, Path(), "standard input")
        elif path.is_dir():
            listed, others = images_in(path)
            inside = sorted(listed)
            if others:
                note(f"left out of '{name}': {len(others)} files of kinds that are not read, the first is {others[0]}")
            if not inside:
                raise UserError(f"the folder '{name}' has no images")
            found += inside
        elif path.is_file() and path.suffix.lower() in _LISTS:
            try:
                with open(path, encoding="utf-8", errors="surrogateescape") as file:
                    found += _listed(file, path.parent, f"the list '{name}'")
            except OSError as failure:
                raise UserError(f"cannot read the list '{name}': {failure.strerror}") from None
        elif path.is_file():
            found.append(name)
        else:
            raise UserError(f"image '{name}' does not exist")
    return found


def _listed(lines: TextIO, beside: Path, what: str) -> list[str]:
    """The files of a list, a line each, where they are or beside the list."""
    names = [line.rstrip("\r\n") for line in lines]
    found = [name if os.path.exists(name) else str(beside / name) for name in names if name.strip()]
    if not found:
        raise UserError(f"{what} names no image; it needs a file a line")
    # Of some that are missing each is named in the end, and the others are classified.
    if not any(map(os.path.isfile, found)):
        raise UserError(f"{what} names '{escaped(found[0])}', which does not exist" + (", nor do the others" if len(found) > 1 else ""))
    return found


def predict(paths: Sequence[str], model: RecordedModel, engine: Engine) -> tuple[list[Prediction], list[str]]:
    """A Prediction for each image file that can be decoded, and a message for each that cannot.

    Args:
        model: says how images are prepared, what classes are called and how many are wanted.
        engine: (B, S, S, 3) uint8 images -> (B, C) logits.
    """
    names = {label: name for name, label in (model.class_to_index or {}).items()}
    if model.config.test_flip:
        engine = with_flip(engine)
    predictions: list[Prediction] = []
    bad: list[str] = []
    with LongTask("classified", len(paths), "image") as task:
        for path, probabilities, message in _probabilities(paths, model, engine):
            task.advance()
            if message:
                bad.append(message)
                continue
            best = np.argsort(-probabilities, kind="stable")[:model.config.top_k]
            predictions.append(Prediction(path, [names.get(int(label), str(label)) for label in best],
                                          [round(float(probabilities[label]), 6) for label in best]))
    if not predictions:
        raise UserError(bad[0] if len(bad) == 1 else f"none of the {len(bad)} images can be decoded: {bad[0]}")
    return predictions, bad


def _probabilities(paths: Sequence[str], model: RecordedModel, engine: Engine) -> Iterator[tuple[str, np.ndarray, str]]:
    """(file, its probabilities (C,), why it could not be decoded or "") of each of ``paths``."""
    images = ImageSet({"": 0}, np.zeros(len(paths), np.int32), list(paths))
    # Always a whole batch, so that one compiled graph serves all.
    batches = EvalBatches(images, model.config, 0, 1, min(_BATCH, len(paths)))
    for number, batch in enumerate(prefetch(batches)):
        logits = engine(batch.images)
        if nonfinite := count_nonfinite(logits[batch.labels == 0]):
            raise UserError(nonfinite_line(nonfinite, int(np.count_nonzero(batch.labels == 0))))
        messages = iter(batch.undecodable)
        of_batch = paths[number * batches.batch:(number + 1) * batches.batch]
        for path, probabilities, label in zip(of_batch, softmax(logits, axis=1), batch.labels):
            yield path, probabilities, "" if label == 0 else next(messages)


def write_predictions(path: str, predictions: Sequence[Prediction]) -> None:
    """Write predictions as a JSON list, as one JSON object a line (.jsonl), or as a table (.csv) with a line for each class.

    Raises:
        UserError: if the file cannot be written.
    """
    writers: dict[str, Callable[[TextIO, Sequence[Prediction]], None]] = {".jsonl": _write_json_lines, ".csv": _write_table}
    write = writers.get(Path(path).suffix.lower())
    if write is None:
        write_results(path, [prediction.as_dict() for prediction in predictions])
        return

    def whole(partial_file: Path) -> None:
        with open(partial_file, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            write(file, predictions)
    write_whole(path, whole)


def _write_json_lines(file: TextIO, predictions: Sequence[Prediction]) -> None:
    for prediction in predictions:
        file.write(json.dumps(prediction.as_dict()) + "\n")


def _write_table(file: TextIO, predictions: Sequence[Prediction]) -> None:
    table = csv.writer(file)
    table.writerow(("image", "place", "class", "probability"))
    for prediction in predictions:
        table.writerows((prediction.path, place, name, probability)
                        for place, (name, probability) in enumerate(zip(prediction.classes, prediction.probabilities), 1))


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
