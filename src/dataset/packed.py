"""Data sets packed into a few large files in place of a million small ones, images resized once.

A set is ``NAME.safetensors`` and, beyond 5,000 images, further parts ``NAME.safetensors.1`` ...; each part is a safetensors file
with the encoded images one behind another, the place where each ends, and their labels.
"""

import json
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
    """The images of one part, which stay in the file until they are decoded.

    Attributes:
        images: the bytes of all encoded images, uint8, mapped into memory.
        ends: (N + 1,) int64, 0 and then where each image ends.
        labels: (N,) int32.
        names: N file names, for messages.
        description: class_to_index, parts, images of the whole set, source, and the options it was packed with.
    """

    path: str
    images: np.ndarray
    ends: np.ndarray
    labels: np.ndarray
    names: list[str]
    description: dict[str, Any]

    def encoded(self, index: int) -> np.ndarray:
        """The bytes of an image file, (N,) uint8."""
        return self.images[self.ends[index]:self.ends[index + 1]]


class PackedImages:
    """All parts of a packed set, as one list of encoded images.

    Raises:
        UserError: if a part is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        first = open_part(path)
        self.class_to_index = first.description["class_to_index"]
        self._parts = [first] + [open_part(part_name(path, number)) for number in range(1, first.description["parts"])]
        other = next((part for part in self._parts if part.description != first.description), None)
        if other is not None:
            raise UserError(f"'{other.path}' is a part of another set than '{path}'; pack the data set again")
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
    return str(path).lower().endswith((ENDING, _EARLIER_ENDING))


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
        ends, labels = file.get_tensor("ends"), file.get_tensor("labels")
        names, description = (json.loads(file.metadata()[key]) for key in ("names", "description"))
        classes = description["class_to_index"].values()
        size = int(ends[-1])
        whole = (ends.dtype == np.int64 and ends[0] == 0 and (np.diff(ends) >= 0).all() and labels.dtype == np.int32
                 and file.get_slice("images").get_dtype() == "U8" and file.get_slice("images").get_shape() == [size]
                 and len(ends) - 1 == len(labels) == len(names) > 0 and set(labels.tolist()) <= set(classes)
                 and all(type(label) is int and 0 <= label < _MOST_CLASSES for label in classes)
                 and all(type(description[key]) is int for key in ("parts", "images", "source")))
        images = np.asarray(np.memmap(path, np.uint8, "r", _offset(path), (size,))) if whole and size else np.empty(0, np.uint8)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError,
            safetensors.SafetensorError) as failure:
        raise UserError(f"'{path}' is missing, damaged or not a packed data set of ours ({failure}); pack it again with "
                        "scripts/pack_dataset.py") from None
    if not whole:
        raise UserError(f"'{path}' is damaged: its index does not fit; pack it again with scripts/pack_dataset.py")
    return PackedFile(str(path), images, ends, labels, names, description)


def _offset(path: str | Path) -> int:
    """Where the images begin in a file that the library has found whole (safetensors' documentation, "Format").

    Its own slices are copies, made while no other thread of Python runs: one would wait for the disk and hold up all.
    """
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return 8 + size + json.loads(file.read(size))["images"]["data_offsets"][0]
