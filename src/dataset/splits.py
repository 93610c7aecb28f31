"""The training and validation images of a configuration, for all commands."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from src.cli.config import DIGITS, Config
from src.dataset.batches import HOW_TO_GO_ON, steps_per_epoch
from src.dataset.class_folders import SPLITS, find_part, find_split, unread
from src.dataset.decoding import BadImage, looks_whole_file, read_image
from src.dataset.image_set import ImageSet, class_names
from src.dataset.packed import ENDING as PACKED
from src.dataset.sources import Classes, find_packed, holds_cifar, open_images
from src.distributed.communicator import Communicator, check_ranks_agree
from src.utils.errors import UserError
from src.utils.log import WARNING

_AUTO_FRACTION = 0.2
_MAX_SEARCHED_FILES = 100_000
_NAMED = 5


@dataclass(frozen=True)
class TrainingData:
    """The images of a run.

    Attributes:
        validation: images to evaluate on while training, labelled like the training images; None
            if the run does not evaluate.
    """

    train: ImageSet
    validation: ImageSet | None


def open_training_data(config: Config, communicator: Communicator) -> TrainingData:
    """The images of a run. Every rank calls it.

    Raises:
        UserError: on every rank, for data that is missing or cannot be used.
    """
    if config.deploy and not (config.run_eval or config.val_split):
        raise UserError(
            f"deploy={'best' if config.deploy == 'best' else 1} evaluates the trained and the "
            "fused network after training: add --run_eval=1, or --deploy=0"
        )
    if config.val_split and split_fraction(config) and config.eval_data_path:
        raise UserError(
            "val_split and eval_data_path both choose the validation images; give only one of them"
        )
    images = _open(config, config.data_path, "train")
    if config.bad_samples == "error":
        _check_images(images, communicator)
    data = TrainingData(images, None)
    if split_fraction(config):
        data = _hold_out(images, config)
    elif config.run_eval or config.val_split:
        data = TrainingData(images, _open_validation(config, images.class_to_index))
    if not config.fit_batch:
        # Raises if there are too few images for one step.
        steps_per_epoch(len(data.train), config, communicator.size)
    check_ranks_agree(communicator, data.train.summary("training"))
    if data.validation is not None:
        check_ranks_agree(communicator, data.validation.summary("validation"))
    return data


def open_train_part(config: Config, class_to_index: Classes) -> ImageSet:
    """The images that a run of ``config`` trains on. Raises UserError if there are none."""
    if not config.data_path:
        raise UserError("no training images: pass --data_path=DIR")
    images = _open(config, config.data_path, "train", class_to_index)
    fraction = split_fraction(config)
    return images.split(fraction, config.seed)[0] if fraction else images


def open_eval_part(config: Config, class_to_index: Classes) -> ImageSet:
    """The images to evaluate a checkpoint on: those of the flags, or of the recorded run.

    Raises:
        UserError: if there are none.
    """
    path = config.eval_data_path or config.data_path
    if not path:
        raise UserError("no images to evaluate on: pass --data_path=DIR")
    fraction = split_fraction(config)
    if not fraction:
        return _open(config, path, "val", class_to_index)
    images = _open(config, path, "train", class_to_index)
    return images.split(fraction, config.seed)[1]


def open_all_parts(config: Config) -> dict[str, ImageSet]:
    """{"train": images, "val": images} of ``config``, without "val" if there are none."""
    images = _open(config, config.data_path, "train")
    fraction = split_fraction(config)
    if fraction:
        data = _hold_out(images, config)
        return {"train": data.train, **({"val": data.validation} if data.validation else {})}
    path = config.eval_data_path or validation_path(config.data_path)
    if path is None:
        return {"train": images}
    validation = _open(config, path, "val", images.class_to_index)
    return {"train": images, "val": validation}


def split_fraction(config: Config) -> float:
    """Fraction of the training images that is held out for validation.

    val_split=auto is 0.2 if there are no other validation images.
    """
    if config.val_split != "auto":
        return config.val_split
    has_others = config.eval_data_path or validation_path(config.data_path)
    return 0.0 if has_others else _AUTO_FRACTION


def validation_path(data_path: str) -> str | None:
    """Where the validation images for a training ``data_path`` are by convention, or None.

    A root holds both parts. Next to ``.../train`` is ``.../val``, under any of the names in SPLITS.
    """
    path = Path(data_path)
    has_part = find_split(path, "val") is not None or (
        path.is_dir() and find_packed(path, "val") is not None
    )
    if data_path == DIGITS or has_part or (path / "val_list.txt").is_file() or holds_cifar(path):
        return data_path
    if path.name in ("train_list.txt", f"train{PACKED}"):
        others = [path.parent / path.name.replace("train", name) for name in ("val", "test")]
        found = next((other for other in others if other.exists()), None)
        return None if found is None else str(found)
    if path.name.lower() in SPLITS["train"][0]:
        other = find_part(path.parent, "val")
        return None if other is None else str(other)
    return None


def set_messages(images: ImageSet, what: str) -> list[str]:
    """What the user should know of a set.

    Args:
        what: a word for the set, as in "training".
    """
    describe = (left_out_message, empty_classes_message, nested_classes_message)
    found = [message for one in describe if (message := one(images, what))]
    return [*found, *(f"{WARNING}{note}" for note in images.notes)]


def left_out_message(images: ImageSet, what: str) -> str | None:
    """A message on files that are not read; None if there are none."""
    if not images.left_out:
        return None
    return f"{WARNING}left out of the {f'{what} ' if what else ''}images: {unread(images.left_out)}"


def empty_classes_message(images: ImageSet, what: str) -> str | None:
    """A message on classes without images, whose accuracy is unknown; None if there are none.

    Args:
        what: a word for the set, as in "training".
    """
    counts = np.bincount(images.labels[images.labels >= 0], minlength=images.num_classes)
    names = class_names(images.class_to_index, images.num_classes)
    empty = [name for name, count in zip(names, counts) if not count]
    if not empty:
        return None
    shown = ", ".join(empty[:_NAMED]) + (" ..." if len(empty) > _NAMED else "")
    return f"{WARNING}{len(empty)} of {images.num_classes} classes have no {what} images: {shown}"


def nested_classes_message(images: ImageSet, what: str) -> str | None:
    """A message on a class folder that has several folders with images, and none of its own.

    They may have been meant as classes; None if there is no such class.
    """
    folders: dict[int, set[str]] = {}
    for path, label in zip(images.paths or (), images.labels.tolist()):
        folders.setdefault(label, set()).add(os.path.dirname(path))
    whole = {os.path.abspath(folder) for found in folders.values() for folder in found}
    root = os.path.commonpath(whole) if whole else ""
    for name, label in images.class_to_index.items():
        places = [os.path.relpath(folder, root) for folder in folders.get(label, ())]
        inner = sorted(p.removeprefix(name + os.sep) for p in places if p.startswith(name + os.sep))
        if len(inner) > 1 and len(inner) == len(places):
            shown = ", ".join(inner[:_NAMED]) + (" ..." if len(inner) > _NAMED else "")
            return (
                f"{WARNING}the class folder '{name}' has no {what} images of its own: those in its "
                f"{len(inner)} folders ({shown}) count as one class"
            )
    return None


def _open(config: Config, path: str, split: str, class_to_index: Classes = None) -> ImageSet:
    images = open_images(path, split, config.dataset_format, class_to_index)
    return replace(images, max_pixels=config.max_pixels)


def _open_validation(config: Config, class_to_index: Classes) -> ImageSet:
    path = config.eval_data_path or validation_path(config.data_path)
    if path is None:
        raise UserError(
            f"run_eval=1 but there is no validation data next to '{config.data_path}'; pass "
            "--eval_data_path=DIR, or --val_split=0.1 to split some off"
        )
    return _open(config, path, "val", class_to_index)


def _hold_out(images: ImageSet, config: Config) -> TrainingData:
    fraction = split_fraction(config)
    train, validation = images.split(fraction, config.seed)
    if not len(validation):
        raise UserError(
            f"val_split={fraction:g} finds no class with two images or more in "
            f"'{config.data_path}'; add images, or train without validation: --val_split=0 "
            "--run_eval=0 --early_stopping=0 --deploy=0"
        )
    return TrainingData(train, validation)


def _check_images(images: ImageSet, communicator: Communicator) -> None:
    """Raise UserError, on every rank, for a file that cannot be decoded.

    Each rank looks at the first and last bytes of its files, and decodes those that look cut off.
    That takes minutes for very many files, so larger sets are not searched here;
    scripts/check_dataset.py searches them.
    """
    mine: list[str] = []
    if images.paths is not None and len(images) <= _MAX_SEARCHED_FILES:
        mine = images.paths[communicator.rank :: communicator.size]
    found = communicator.all_gather(_first_bad_image(mine, images.max_pixels))
    message = next(filter(None, found), None)
    if message:
        raise UserError(f"{message}; {HOW_TO_GO_ON}")


def _first_bad_image(paths: list[str], max_pixels: int) -> str | None:
    for path in paths:
        if not looks_whole_file(path):
            try:
                read_image(path, max_pixels)
            except BadImage as failure:
                return str(failure)
    return None
