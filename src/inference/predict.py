"""The command predict.py: images in, a table, a result file and a sheet out."""

import os

from src.cli.command import Command
from src.inference.backends import open_backend
from src.inference.contact_sheet import SHEET_IMAGES, save_sheet
from src.inference.prediction import as_table, find_images, predict_files, write_predictions
from src.runs.checkpoint_files import choose_checkpoint
from src.utils.errors import PartialFailure, UserError
from src.utils.log import create_log
from src.utils.progress import print_status


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
        some = f", of the first {SHEET_IMAGES} images" if len(predictions) > SHEET_IMAGES else ""
        log(f"figure in {config.save_figure}{some}")
    if failures:
        raise PartialFailure(
            f"{len(failures)} of {len(paths)} images could not be read, the first: {failures[0]}"
        )
