"""Collects the data for a report: the records of the runs, and their best networks' mistakes."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from src.cli.command import Command
from src.cli.config import default_values, validated
from src.cli.flags import current_keys
from src.dataset.image_set import class_names
from src.dataset.splits import validation_path
from src.inference.backends import open_backend
from src.inference.error_analysis import augmented_samples, most_confused, predict_set, thumbnail
from src.kernels.library import KernelChoice
from src.runs.report import Picture, RunReport, render
from src.runs.run_folder import RunFolder
from src.utils.errors import UserError
from src.utils.files import check_ending, write_whole
from src.utils.log import WARNING, Log, create_log

_PICTURES = 24


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
    target = command.config.result_path or str(folders[0].report)
    # Names may contain bytes that are not text.
    page = render(reports).encode("utf-8", "backslashreplace")
    write_whole(target, partial(Path.write_bytes, data=page))
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
    run = RunReport(
        name, folder.read_config(), folder.read_environment(), metrics, defaults=default_values()
    )
    try:
        return _with_pictures(run, folder, _moved_data(folder, flags), kernels, log)
    except UserError as failure:
        log(f"{WARNING}{name}: the report is incomplete: {failure}")
        return replace(run, missing=f"Not everything could be shown: {failure}.")


def _moved_data(folder: RunFolder, flags: Mapping[str, str]) -> dict[str, str]:
    """``flags``, completed if --data_path says that the data has moved.

    The validation images are then next to the moved images or among them.
    """
    if "data_path" not in flags:
        return dict(flags)
    validation = validation_path(flags["data_path"]) or ""
    val_split = folder.read_config()["val_split"]
    return {"val_split": val_split, "eval_data_path": validation, **flags}


def _with_pictures(
    run: RunReport, folder: RunFolder, flags: Mapping[str, str], kernels: KernelChoice, log: Log
) -> RunReport:
    checkpoint = folder.best if folder.best.exists() else folder.latest
    opened = open_backend(checkpoint, flags, kernels)
    model = opened.model
    classes = class_names(model.class_to_index, model.config.num_classes)
    images = model.open_images()
    predictions = predict_set(images, opened.backend, model.config, log)
    confusion = predictions.confusion(model.config.num_classes)
    mistakes = [
        Picture(
            thumbnail(images.load(int(predictions.indices[row]))),
            f"{classes[predictions.labels[row]]}, predicted {classes[predictions.predicted[row]]} "
            f"({100 * predictions.probability[row]:.0f} %, true class "
            f"{100 * predictions.probability_of_label[row]:.0f} %)",
        )
        for row in predictions.worst(_PICTURES)
    ]
    run_config = validated(current_keys(run.config))
    training = augmented_samples(model.open_training_images(), run_config, _PICTURES)
    return replace(
        run,
        classes=classes,
        confusion=confusion.tolist(),
        confused=most_confused(confusion, 10),
        mistakes=mistakes,
        samples=[Picture(thumbnail(image), classes[label]) for image, label in training],
    )
