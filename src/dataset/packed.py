"""Data sets packed into a few large files in place of a million small ones, images resized once.

A set is ``NAME.safetensors`` and, beyond 5,000 images, further parts ``NAME.safetensors.1`` ...; each part is a safetensors file
with the encoded images one behind another, the place where each ends, and their labels.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from src.utils.errors import UserError

ENDING = ".safetensors"
# What packed sets of version 0.2 ended with; they are no longer read, which is said.
_EARLIER_ENDING = ".mindrecord"
_MOST_CLASSES = 10 ** 6


@dataclass(frozen=True)
class PackedFile:
    """The images of one part, which stay in the file until they are asked for.

    Attributes:
        slices: bytes ``start:end`` of all encoded images together, (end - start,) uint8.
        ends: (N + 1,) int64, 0 and then where each image ends.
        labels: (N,) int32.
        names: N file names, for messages.
        description: class_to_index, parts, images of the whole set, source, and the options it was packed with.
    """

    path: str
    slices: Callable[[slice], np.ndarray]
    ends: np.ndarray
    labels: np.ndarray
    names: list[str]
    description: dict[str, Any]

    def encoded(self, index: int) -> np.ndarray:
        """The bytes of an image file, (N,) uint8."""
        return self.slices(slice(int(self.ends[index]), int(self.ends[index + 1])))


class PackedImages:
    """All parts of a packed set, as one list of encoded images.

    Raises:
        UserError: if a part is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        first = open_part(path)
        self.class_to_index = first.description["class_to_index"]
        self._parts = [first] + [open_part(part_name(path, number)) for number in range(1, first.description["parts"])]
        self._first_of_part = np.cumsum([0] + [len(part.labels) for part in self._parts])
        self.labels = np.concatenate([part.labels for part in self._parts])
        if len(self.labels) != first.description["images"]:
            raise UserError(f"'{path}' holds {len(self.labels)} of {first.description['images']} images; pack the data set again")

    def encoded(self, index: int) -> np.ndarray:
        """The bytes of image ``index``, (N,) uint8."""
        part, inside = self._place(index)
        return part.encoded(inside)

    def name(self, index: int) -> str:
        part, inside = self._place(index)
        return f"{part.names[inside]} in {part.path}"

    def _place(self, index: int) -> tuple[PackedFile, int]:
        part = int(np.searchsorted(self._first_of_part, index, side="right")) - 1
        return self._parts[part], index - self._first_of_part[part]


def part_name(path: str | Path, number: int) -> str:
    """File of part ``number`` of the set ``path``."""
    return str(path) if number == 0 else f"{path}.{number}"


def is_packed(path: str | Path) -> bool:
    """Whether ``path`` is the first part of a packed set, by its name."""
    return str(path).endswith((ENDING, _EARLIER_ENDING))


def save_part(path: str | Path, encoded: list[bytes], labels: np.ndarray, names: list[str], description: dict[str, Any]) -> None:
    """Write what ``open_part`` reads. Raises OSError."""
    tensors = {"images": np.frombuffer(b"".join(encoded), np.uint8), "labels": labels.astype(np.int32),
               "ends": np.cumsum([0, *map(len, encoded)], dtype=np.int64)}
    try:
        safetensors.numpy.save_file(tensors, path, {"names": json.dumps(names), "description": json.dumps(description)})
    except safetensors.SafetensorError as failure:
        raise OSError(str(failure)) from None


def open_part(path: str | Path) -> PackedFile:
    """A PackedFile.

    Raises:
        UserError: if the file is missing or damaged.
    """
    try:
        file = safetensors.safe_open(path, "numpy")
        images, ends, labels = file.get_slice("images"), file.get_tensor("ends"), file.get_tensor("labels")
        names, description = (json.loads(file.metadata()[key]) for key in ("names", "description"))
        whole = (images.get_dtype() == "U8" and images.get_shape() == [int(ends[-1])] and ends[0] == 0 and (np.diff(ends) >= 0).all()
                 and len(ends) - 1 == len(labels) == len(names) > 0 and labels.dtype == np.int32
                 and set(labels.tolist()) <= set(description["class_to_index"].values())
                 and all(type(label) is int and 0 <= label < _MOST_CLASSES for label in description["class_to_index"].values())
                 and {"parts", "images", "source"} <= set(description))
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError,
            safetensors.SafetensorError) as failure:
        raise UserError(f"'{path}' is missing, damaged or not a packed data set of ours ({failure}); pack it again with "
                        "scripts/pack_dataset.py") from None
    if not whole:
        raise UserError(f"'{path}' is damaged: its index does not fit; pack it again with scripts/pack_dataset.py")
    return PackedFile(str(path), images.__getitem__, ends, labels, names, description)
