"""Collects the data for a report: the records of the runs, and what their best networks confuse."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from scipy.special import softmax

from src.cli.command import Command
from src.cli.config import Config, default_values, validated
from src.cli.flags import current_keys
from src.dataset.augmentations import Augmenter
from src.dataset.batches import UNDECODABLE_LABEL, EvalBatches, prefetch
from src.dataset.image_set import ImageSet, class_names
from src.dataset.splits import validation_path
from src.dataset.transforms import eval_min_side, eval_transform
from src.inference.backends import Backend, open_backend
from src.inference.evaluation import held_out_message
from src.inference.heatmap import covered, heat, overlay
from src.inference.metrics import (
    calibration_error,
    class_figures,
    confidence_ranges,
    confusion_matrix,
    count_nonfinite,
    interval,
    nonfinite_message,
)
from src.kernels.library import KernelChoice
from src.models.weight_files import read_weights
from src.runs.report_page import Picture, RunReport, render
from src.runs.run_folder import RunFolder
from src.utils.errors import UserError
from src.utils.files import check_ending, write_atomically
from src.utils.log import WARNING, Log, create_log, no_log
from src.utils.progress import ProgressBar

_PICTURES = 24
_BATCH = 32
_THUMBNAIL = 160


def report(command: Command) -> None:
    """The command report.py: write a page about the run folders on the command line."""
    check_ending("result_path", command.config.result_path, (".html", ".htm"))
    log = command.checked(create_log())
    folders = [RunFolder(Path(name)) for name in command.positional]
    short = [folder.path.resolve().name for folder in folders]
    names = short if len(set(short)) == len(short) else list(command.positional)
    reports = [
        _run_report(name, folder, command.flags, command.kernels, log)
        for name, folder in zip(names, folders)
    ]
    if len(folders) > 1 and len({_validation_of(folder) for folder in folders} - {None}) > 1:
        note = "the runs were evaluated on different images, so their accuracies cannot be compared"
        reports = [_remarked(run, note, no_log) for run in reports]
        log(f"{WARNING}{note}")
    target = command.config.result_path or str(folders[0].report)
    # Names may contain bytes that are not text.
    page = render(reports).encode("utf-8", "backslashreplace")
    write_atomically(target, partial(Path.write_bytes, data=page))
    log(f"report in {target}")


def _run_report(
    name: str, folder: RunFolder, flags: Mapping[str, str], kernels: KernelChoice, log: Log
) -> RunReport:
    """The records of a run, and the mistakes of its best network (else its latest).

    Raises:
        UserError: if ``folder`` is not a run folder.
    """
    if not folder.path.is_dir():
        raise UserError(f"the folder '{folder.path}' does not exist")
    metrics = folder.read_metrics()
    if not metrics:
        raise UserError(
            f"'{folder.path}' is not the folder of a run that has finished an epoch: metrics.jsonl "
            "has no lines"
        )
    config = _comparable(folder.read_config())
    run = RunReport(name, config, folder.read_environment(), metrics, defaults=default_values())
    run = replace(run, best_step=_best_step(folder))
    if len({line["val_images"] for line in metrics if "val_images" in line}) > 1:
        run = run.with_note("Not all epochs were evaluated on the same images.")
    best = run.best
    if best and "correct" in best:
        run = replace(run, interval=interval(best["correct"], best["val_images"]))
    try:
        return _with_pictures(run, folder, _moved_data(folder, flags), kernels, log)
    except UserError as failure:
        log(f"{WARNING}{name}: the report is incomplete: {failure}")
        return run.with_note(f"Not everything could be shown: {failure}.")


def _best_step(folder: RunFolder) -> int | None:
    """The step of best.ckpt: after a resume with other validation images, earlier ones don't count.

    None without a readable one, which the section on classes then says.
    """
    try:
        return read_weights(folder.best)[1].get("step")
    except UserError:
        return None


def _remarked(run: RunReport, note: str, log: Log) -> RunReport:
    """The report with one more remark, which is logged too."""
    log(f"{WARNING}{run.name}: {note}")
    return run.with_note(f"{note[0].upper()}{note[1:]}.")


def _validation_of(folder: RunFolder) -> int | None:
    """The fingerprint of the images that a run evaluates on; None if it is not known."""
    try:
        return read_weights(folder.latest)[1].get("validation")
    except UserError:
        return None


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    """The recorded configuration in the types of the defaults, if this version knows every key."""
    try:
        return validated(current_keys(config)).model_dump(mode="json")
    except UserError:
        return config


def _moved_data(folder: RunFolder, flags: Mapping[str, str]) -> dict[str, str]:
    """``flags``, completed if --data_path says that the data has moved.

    The validation images are then next to the moved images or among them.
    """
    if "data_path" not in flags:
        return dict(flags)
    val_split = folder.read_config()["val_split"]
    # Either they were split off, or they lie next to the training images.
    others = "" if float(val_split) else validation_path(flags["data_path"]) or ""
    return {"val_split": val_split, "eval_data_path": others, **flags}


def _with_pictures(
    run: RunReport, folder: RunFolder, flags: Mapping[str, str], kernels: KernelChoice, log: Log
) -> RunReport:
    checkpoint = folder.best if folder.best.exists() else folder.latest
    opened = open_backend(checkpoint, flags, kernels)
    model = opened.model
    for note in model.prediction_notes:
        log(note)
    classes = class_names(model.class_to_index, model.config.num_classes)
    images = model.open_images()
    if opened.metadata.get("validation") not in (None, images.fingerprint()):
        note = (
            "the classes and mistakes are those of other images than training evaluated: their "
            "names, sizes or labels differ"
        )
        run = _remarked(run, note, log)
    message = held_out_message(model, opened.metadata, images) or ""
    if message.startswith(WARNING):
        run = _remarked(run, message.removeprefix(WARNING), log)
    predictions = predict_set(images, opened.backend, model.config, log)
    confusion = predictions.confusion(model.config.num_classes)
    heat_maps = map(thumbnail, mistaken_parts(images, predictions, opened.backend, model.config))
    mistakes = [
        Picture(
            thumbnail(images.load(int(predictions.indices[row]), _THUMBNAIL)),
            f"predicted {classes[predictions.predicted[row]]} "
            f"{100 * predictions.probability[row]:.0f} %, is {classes[predictions.labels[row]]} "
            f"{100 * predictions.probability_of_label[row]:.0f} %",
            images.name(int(predictions.indices[row])),
            heat_map,
        )
        for row, heat_map in zip_longest(predictions.worst(_PICTURES), heat_maps, fillvalue="")
    ]
    finite = np.isfinite(predictions.probability)
    confidence = confidence_ranges(predictions.probability[finite], predictions.hits[finite])
    run_config = validated(current_keys(run.config))
    training = augmented_samples(model.open_training_images(), run_config, _PICTURES)
    return replace(
        run,
        classes=classes,
        class_figures=[
            class_figures(*map(int, counts))
            for counts in zip(np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0))
        ],
        confusion=confusion.tolist(),
        confused=most_confused(confusion, 10),
        mistakes=mistakes,
        calibration_error=calibration_error(confidence) if finite.any() else None,
        calibration=[
            (100 * probabilities / count, 100 * hits / count)
            for count, probabilities, hits in confidence.T.tolist()
            if count
        ],
        samples=[Picture(thumbnail(image), classes[label]) for image, label in training],
    )


@dataclass(frozen=True)
class SetPredictions:
    """Predictions for the N images of a set that can be decoded; each array is (N,).

    Attributes:
        indices: index of the image in the set.
        labels, predicted: its label, and its likeliest class.
        probability, probability_of_label: the probabilities of these two.
    """

    indices: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    probability: np.ndarray
    probability_of_label: np.ndarray

    @property
    def hits(self) -> np.ndarray:
        """Whether each prediction is right."""
        return self.predicted == self.labels

    def confusion(self, classes: int) -> np.ndarray:
        """(classes, classes): images by label and likeliest class."""
        return confusion_matrix(self.labels, self.predicted, classes)

    def worst(self, count: int) -> np.ndarray:
        """Rows of up to ``count`` mistakes, the most confident ones first."""
        wrong = np.flatnonzero(~self.hits)
        return wrong[np.argsort(-self.probability[wrong], kind="stable")][:count]


def predict_set(
    images: ImageSet, backend: Backend, config: Config, log: Log = no_log
) -> SetPredictions:
    """Predict every image of a set, on one process. ``log`` gets a line every 10 s."""
    batches = EvalBatches(images, config, 0, 1, min(_BATCH, len(images)))
    parts: list[tuple[np.ndarray, ...]] = []
    with ProgressBar("predicted", len(images), "image", log) as progress:
        for number, batch in enumerate(prefetch(batches)):
            decoded = batch.labels >= 0
            logits = backend(batch.images)[decoded]
            if nonfinite := count_nonfinite(logits):
                raise UserError(nonfinite_message(nonfinite, len(logits)))
            probabilities = softmax(logits, axis=1)
            predicted = probabilities.argmax(axis=1)
            labels = batch.labels[decoded].astype(np.int64)
            slots = np.flatnonzero(decoded | (batch.labels == UNDECODABLE_LABEL))
            indices = batches.indices[number * batches.batch + slots][decoded[slots]]
            rows = np.arange(len(labels))
            parts.append(
                (
                    indices,
                    labels,
                    predicted,
                    probabilities[rows, predicted],
                    probabilities[rows, labels],
                )
            )
            progress.advance(len(slots))
    return SetPredictions(*map(np.concatenate, zip(*parts)))


def mistaken_parts(
    images: ImageSet, predictions: SetPredictions, backend: Backend, config: Config
) -> list[np.ndarray]:
    """What the network saw of the worst mistakes, with warm colours where its class comes from.

    Returns:
        (S, S, 3) uint8, for the first ``config.heat_maps`` rows of ``predictions.worst``.
    """
    rows = predictions.worst(min(config.heat_maps, _PICTURES))
    batch = min(_BATCH, len(images))
    found = []
    with ProgressBar("explained", len(rows), "mistake") as progress:
        for row in rows:
            index, label = int(predictions.indices[row]), int(predictions.predicted[row])
            image = eval_transform(images.load(index, eval_min_side(config)), config)
            copies = np.concatenate([image[None], covered(image, config.mean)])
            probabilities = softmax(_in_batches(backend, copies, batch), axis=1)
            found.append(overlay(image, heat(probabilities, label, config.image_size)))
            progress.advance()
    return found


def _in_batches(backend: Backend, images: np.ndarray, batch: int) -> np.ndarray:
    """Logits of the images, computed in batches of a size for which a graph is compiled."""
    padded = np.concatenate([images, images[: -len(images) % batch]])
    parts = [backend(padded[start : start + batch]) for start in range(0, len(padded), batch)]
    return np.concatenate(parts)[: len(images)]


def most_confused(confusion: np.ndarray, count: int) -> list[tuple[int, int, int]]:
    """(label, predicted class, images) of the most frequent confusions, in order."""
    off_diagonal = confusion - np.diag(np.diag(confusion))
    order = np.argsort(-off_diagonal, axis=None, kind="stable")[:count]
    pairs = (divmod(int(cell), len(off_diagonal)) for cell in order)
    found = [(label, other, int(off_diagonal[label, other])) for label, other in pairs]
    return [entry for entry in found if entry[2]]


def augmented_samples(images: ImageSet, config: Config, count: int) -> list[tuple[np.ndarray, int]]:
    """(augmented image, label) of ``count`` images spread over the set, as in the first epoch.

    A mixed sample has the label with the largest part.
    """
    augmenter = Augmenter(config, len(images), images.num_classes)
    samples = []
    for index in np.unique(np.linspace(0, len(images) - 1, count).astype(int)).tolist():
        image, label = augmenter.sample(
            lambda i: (images.load(i, augmenter.min_side), int(images.labels[i])),
            epoch=0,
            index=index,
        )
        samples.append((image, int(np.argmax(label)) if augmenter.mixes else int(label)))
    return samples


def thumbnail(image: np.ndarray) -> str:
    """An image (H, W, 3) uint8 RGB of at most 160 pixels, as a data: URL of a JPEG."""
    scale = min(_THUMBNAIL / max(image.shape[:2]), 1.0)
    if scale < 1:
        size = (max(round(image.shape[1] * scale), 1), max(round(image.shape[0] * scale), 1))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    _, encoded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 85])
    return "data:image/jpeg;base64," + base64.b64encode(encoded.tobytes()).decode()
