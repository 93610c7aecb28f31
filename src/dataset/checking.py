"""Looking at every file of a data set before hours are spent on it."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np

from src.dataset.decoding import BadImage, read_image
from src.dataset.image_set import ImageSet
from src.dataset.sources import open_images, validation_path
from src.utils.errors import UserError

_CHUNK = 32


@dataclass(frozen=True)
class Finding:
    """A file and what is wrong with it; ``bad`` is False if it can be decoded all the same."""

    path: str
    reason: str
    bad: bool


def image_sets(data_path: str, dataset_format: str) -> dict[str, ImageSet]:
    """{part: ImageSet} of what lies at ``data_path``: training images, and validation images if there are any.

    Raises:
        UserError: if there is no data.
    """
    sets = {"train": open_images(data_path, "train", dataset_format)}
    beside = validation_path(data_path)
    if beside:
        sets["val"] = open_images(beside, "val", dataset_format, sets["train"].class_to_index)
    if all(images.paths is None for images in sets.values()):
        raise UserError(f"the images of '{data_path}' are not files of their own; there is nothing to check")
    return sets


def check_files(paths: Sequence[str], workers: int) -> Iterator[Finding | None]:
    """Yield a Finding or None for each of ``paths``, in order, decoded by ``workers`` processes."""
    with ProcessPoolExecutor(workers, initializer=_redirect_warnings) as pool:
        yield from pool.map(_check_file, paths, chunksize=_CHUNK)


def summary(images: ImageSet) -> str:
    """One line on the classes of an ImageSet."""
    counts = np.bincount(images.labels, minlength=images.num_classes)
    return f"{len(images)} images, {images.num_classes} classes of {counts.min()} to {counts.max()} images"


def _check_file(path: str) -> Finding | None:
    try:
        read_image(path)
    except BadImage as failure:
        _take_warnings()
        return Finding(path, str(failure).removeprefix(path).strip(), bad=True)
    warnings = _take_warnings()
    return Finding(path, f"decodes with a warning: {warnings}", bad=False) if warnings else None


def _redirect_warnings() -> None:
    """libjpeg and libpng report damaged data on standard error alone: in a worker process that becomes a file."""
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)


def _take_warnings() -> str:
    """The first line that was written to the file, which is empty afterwards."""
    os.lseek(2, 0, os.SEEK_SET)
    text = os.read(2, 200).decode(errors="replace").strip()
    os.ftruncate(2, 0)
    os.lseek(2, 0, os.SEEK_SET)
    return text.splitlines()[0] if text else ""
