"""Predictions for single images: their likeliest classes, a table, result files, a sheet."""

import csv
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from scipy.special import softmax

from src.cli.command import Command
from src.dataset.batches import EvalBatches, prefetch
from src.dataset.class_folders import list_images, unread
from src.dataset.decoding import DEFAULT_MAX_PIXELS, read_image
from src.dataset.image_set import ImageSet
from src.dataset.transforms import THUMBNAIL_SIDE, thumbnail
from src.inference.backends import Backend, open_backend, with_flip
from src.inference.checkpoint_model import CheckpointModel
from src.inference.metrics import count_nonfinite, nonfinite_message, write_results
from src.runs.run_folder import choose_checkpoint
from src.utils.errors import PartialFailure, UserError
from src.utils.files import write_atomically
from src.utils.log import WARNING, Log, create_log, escaped, no_log, shortened
from src.utils.progress import ProgressBar, print_status

_BATCH = 16
# Of the sheet of predictions.
_SHEET_IMAGES = 50
_COLUMNS = 5
_NAME_LENGTH = 26
_SURE, _UNSURE, _REST = "tab:blue", "tab:orange", "0.85"
# Endings of lists of images.
_LISTS = (".txt", ".lst")
STANDARD_INPUT = "-"


@dataclass(frozen=True)
class Prediction:
    """An image file and its likeliest classes with their probabilities, the likeliest first.

    Attributes:
        unsure: whether the first probability is below the key ``unsure``; None without that key.
    """

    path: str
    classes: list[str]
    probabilities: list[float]
    unsure: bool | None = None

    @classmethod
    def of(cls, path: str, probabilities: np.ndarray, model: CheckpointModel) -> "Prediction":
        """The prediction that probabilities (C,) make, as the keys top_k and unsure say."""
        config, names = model.config, {i: name for name, i in (model.class_to_index or {}).items()}
        best = np.argsort(-probabilities, kind="stable")[: config.top_k].tolist()
        return cls(
            path,
            [names.get(label, str(label)) for label in best],
            [round(float(probabilities[label]), 6) for label in best],
            bool(probabilities[best[0]] < config.unsure) if config.unsure else None,
        )

    def answer(self) -> dict[str, Any]:
        """The prediction without the image's name, as the server answers."""
        pairs = zip(self.classes, self.probabilities)
        predictions = [{"class": name, "probability": value} for name, value in pairs]
        unsure = {} if self.unsure is None else {"unsure": self.unsure}
        return {"predictions": predictions, **unsure}

    def percentages(self) -> list[str]:
        """Each class with its probability, for people."""
        pairs = zip(self.classes, self.probabilities)
        found = [f"{escaped(name)} {100 * probability:.1f}%" for name, probability in pairs]
        return [f"unsure: {found[0]}", *found[1:]] if self.unsure else found

    def as_dict(self) -> dict[str, Any]:
        return {"image": self.path, **self.answer()}


def predict(command: Command) -> None:
    """Classify the images that the command line names."""
    config, log = command.config, command.checked(create_log())
    paths = find_images(command.positional, command.checked(print_status))
    for key in ("result_path", "save_figure"):
        target = getattr(config, key)
        if target and os.path.realpath(target) in map(os.path.realpath, paths):
            raise UserError(f"--{key}={target} would replace an image that is to be classified")
    checkpoint = choose_checkpoint(config.checkpoint_file_path, print_status)
    opened = open_backend(checkpoint, command.flags, command.kernels)
    for note in opened.model.prediction_notes:
        log(note)
    predictions, failures = predict_files(paths, opened.model, opened.backend)
    for message in failures:
        log(f"left out: {message}")
    if config.result_path:
        write_predictions(config.result_path, predictions)
        log(f"results in {config.result_path}")
    else:
        log(as_table(predictions))
    if config.unsure:
        count = sum(bool(prediction.unsure) for prediction in predictions)
        limit = f"less probable than {100 * config.unsure:g} %"
        log(f"{count} of {len(predictions)} predictions are unsure: {limit}")
    if config.save_figure:
        save_sheet(predictions, config.save_figure, config.max_pixels)
        some = f", of the first {_SHEET_IMAGES} images" if len(predictions) > _SHEET_IMAGES else ""
        log(f"figure in {config.save_figure}{some}")
    if failures:
        raise PartialFailure(
            f"{len(failures)} of {len(paths)} images could not be read, the first: {failures[0]}"
        )


def find_images(
    names: Sequence[str], log: Log = no_log, standard_input: TextIO | None = None
) -> list[str]:
    """The image files that ``names`` stand for.

    A name is a file, a folder, a list (.txt) with one file per line, or "-", such a list on
    standard input.

    Raises:
        UserError: if there are none.
    """
    images: list[str] = []
    for name in names:
        path = Path(name)
        if name == STANDARD_INPUT:
            images += _listed(standard_input or sys.stdin, Path(), "standard input")
        elif path.is_dir():
            images += _in_folder(path, name, log)
        elif path.is_file() and path.suffix.lower() in _LISTS:
            try:
                with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
                    images += _listed(file, path.parent, f"the list '{name}'")
            except OSError as failure:
                raise UserError(f"cannot read the list '{name}': {failure.strerror}") from None
        elif path.is_file():
            images.append(name)
        else:
            raise UserError(f"image '{name}' does not exist")
    return images


def predict_files(
    paths: Sequence[str], model: CheckpointModel, backend: Backend
) -> tuple[list[Prediction], list[str]]:
    """A Prediction for each image file, and a message for each that cannot be decoded.

    Args:
        model: determines preprocessing, class names and the number of classes to show.
        backend: (B, S, S, 3) uint8 images -> (B, C) logits.

    Raises:
        UserError: if no image can be decoded.
    """
    if model.config.test_flip:
        backend = with_flip(backend)
    predictions: list[Prediction] = []
    failures: list[str] = []
    with ProgressBar("classified", len(paths), "image") as progress:
        for path, probabilities, message in _probabilities(paths, model, backend):
            progress.advance()
            if message:
                failures.append(message)
                continue
            predictions.append(Prediction.of(path, probabilities, model))
    if not predictions:
        if len(failures) == 1:
            raise UserError(failures[0])
        raise UserError(f"none of the {len(failures)} images can be decoded: {failures[0]}")
    return predictions, failures


def write_predictions(path: str, predictions: Sequence[Prediction]) -> None:
    """Write predictions as a JSON list; .jsonl: one object per line; .csv: one row per class.

    Raises:
        UserError: if the file cannot be written.
    """
    writers: dict[str, Callable[[TextIO, Sequence[Prediction]], None]] = {
        ".jsonl": _write_json_lines,
        ".csv": _write_csv,
    }
    write = writers.get(Path(path).suffix.lower())
    if write is None:
        write_results(path, [prediction.as_dict() for prediction in predictions])
        return

    def write_file(partial: Path) -> None:
        with open(partial, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            write(file, predictions)

    write_atomically(path, write_file)


def as_table(predictions: Sequence[Prediction]) -> str:
    """Lines of text, one per image."""
    width = max(len(escaped(prediction.path)) for prediction in predictions)
    return "\n".join(
        f"{escaped(prediction.path):<{width}}  " + "  ".join(prediction.percentages())
        for prediction in predictions
    )


def save_sheet(
    predictions: Sequence[Prediction], path: str, max_pixels: int = DEFAULT_MAX_PIXELS
) -> None:
    """Draw up to 50 images, by class and the surest first, each with a bar for its probability.

    Raises:
        UserError: if the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = sorted(predictions[:_SHEET_IMAGES], key=lambda p: (p.classes[0], -p.probabilities[0]))
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


def _in_folder(path: Path, name: str, log: Log) -> list[str]:
    images, others = list_images(path)
    if others:
        log(f"{WARNING}left out of '{name}': {unread(others)}")
    if not images:
        raise UserError(f"the folder '{name}' has no images")
    return sorted(images)


def _listed(lines: TextIO, folder: Path, what: str) -> list[str]:
    """The files of a list, one per line, relative to ``folder``, else to the working folder."""
    names = [line.rstrip("\r\n") for line in lines if line.strip()]
    paths = [
        name if os.path.exists(name) and not os.path.exists(folder / name) else str(folder / name)
        for name in names
    ]
    if not paths:
        raise UserError(f"{what} names no image; it needs one file per line")
    # If only some are missing, they are reported at the end and the rest are classified.
    if not any(map(os.path.isfile, paths)):
        others = ", nor do the others" if len(paths) > 1 else ""
        raise UserError(f"{what} names '{escaped(paths[0])}', which does not exist{others}")
    return paths


def _probabilities(
    paths: Sequence[str], model: CheckpointModel, backend: Backend
) -> Iterator[tuple[str, np.ndarray, str]]:
    """(file, its probabilities (C,), why it cannot be decoded or "") for each of ``paths``."""
    labels = np.zeros(len(paths), np.int32)
    images = ImageSet({"": 0}, labels, list(paths), max_pixels=model.config.max_pixels)
    # All batches have the same size, so that one compiled graph serves them.
    batches = EvalBatches(images, model.config, 0, 1, min(_BATCH, len(paths)))
    for number, batch in enumerate(prefetch(batches)):
        logits = backend(batch.images)
        decoded = batch.labels == 0
        if nonfinite := count_nonfinite(logits[decoded]):
            raise UserError(nonfinite_message(nonfinite, int(np.count_nonzero(decoded))))
        messages = iter(batch.undecodable)
        batch_paths = paths[number * batches.batch : (number + 1) * batches.batch]
        # In float32, small probabilities become 0, which loses the order of their classes.
        found = softmax(logits.astype(np.float64), axis=1)
        for path, probabilities, label in zip(batch_paths, found, batch.labels):
            yield path, probabilities, "" if label == 0 else next(messages)


def _write_json_lines(file: TextIO, predictions: Sequence[Prediction]) -> None:
    for prediction in predictions:
        file.write(json.dumps(prediction.as_dict()) + "\n")


def _write_csv(file: TextIO, predictions: Sequence[Prediction]) -> None:
    writer = csv.writer(file)
    marks = any(prediction.unsure is not None for prediction in predictions)
    writer.writerow(("image", "place", "class", "probability", *(["unsure"] * marks)))
    for prediction in predictions:
        pairs = zip(prediction.classes, prediction.probabilities)
        mark = [int(bool(prediction.unsure))] * marks
        for place, (name, probability) in enumerate(pairs, 1):
            writer.writerow((prediction.path, place, name, probability, *mark))


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
