"""Data sets packed into a few large files instead of a million small ones, images resized once.

A set is ``NAME.safetensors`` and, beyond 5,000 images, further parts ``NAME.safetensors.1`` and so
on. Each part is a safetensors file with the encoded images one after another, the position where
each ends, and their labels.
"""

import json
import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import safetensors
import safetensors.numpy

from src.dataset.image_set import ImageSet
from src.utils.errors import UserError
from src.utils.files import check_writable, write_whole
from src.utils.log import escaped

ENDING = ".safetensors"
# Ending of packed sets of version 0.2. They are no longer read, only recognised for a clear error.
_EARLIER_ENDING = ".mindrecord"
_MOST_CLASSES = 10**6


@dataclass(frozen=True)
class PackedFile:
    """The images of one part, which stay in the file until they are decoded.

    Attributes:
        images: the bytes of all encoded images, uint8, mapped into memory.
        ends: (N + 1,) int64, 0 and then where each image ends.
        labels: (N,) int32.
        names: N file names, for messages.
        description: class_to_index, parts, images in the whole set, source, packing options.
    """

    path: str
    images: np.ndarray
    ends: np.ndarray
    labels: np.ndarray
    names: list[str]
    description: dict[str, Any]

    def encoded(self, index: int) -> np.ndarray:
        """The bytes of an image file, (N,) uint8."""
        return self.images[self.ends[index] : self.ends[index + 1]]


class PackedImages:
    """All parts of a packed set, as one list of encoded images.

    Raises:
        UserError: if a part is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        first = open_part(path)
        self.class_to_index = first.description["class_to_index"]
        self.checksum = first.description["source"]
        self._parts = [first] + [
            open_part(part_name(path, number)) for number in range(1, first.description["parts"])
        ]
        other = next((part for part in self._parts if part.description != first.description), None)
        if other is not None:
            raise UserError(
                f"'{other.path}' is a part of another set than '{path}'; pack the data set again"
            )
        self._first_of_part = np.cumsum([0] + [len(part.labels) for part in self._parts])
        self.labels = np.concatenate([part.labels for part in self._parts])
        if len(self.labels) != first.description["images"]:
            raise UserError(
                f"'{path}' holds {len(self.labels)} of {first.description['images']} images; pack "
                "the data set again"
            )

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


def save_part(
    path: str | Path,
    encoded: list[bytes],
    labels: np.ndarray,
    names: list[str],
    description: dict[str, Any],
) -> None:
    """Write what ``open_part`` reads. Raises OSError."""
    tensors = {
        "images": np.frombuffer(b"".join(encoded), np.uint8),
        "labels": labels.astype(np.int32),
        "ends": np.cumsum([0, *map(len, encoded)], dtype=np.int64),
    }
    try:
        safetensors.numpy.save_file(
            tensors, path, {"names": json.dumps(names), "description": json.dumps(description)}
        )
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
        whole = (
            ends.dtype == np.int64
            and ends[0] == 0
            and (np.diff(ends) >= 0).all()
            and labels.dtype == np.int32
            and file.get_slice("images").get_dtype() == "U8"
            and file.get_slice("images").get_shape() == [size]
            and len(ends) - 1 == len(labels) == len(names) > 0
            and set(labels.tolist()) <= set(classes)
            and all(type(label) is int and 0 <= label < _MOST_CLASSES for label in classes)
            and all(type(description[key]) is int for key in ("parts", "images", "source"))
        )
        images = (
            np.asarray(np.memmap(path, np.uint8, "r", _offset(path), (size,)))
            if whole and size
            else np.empty(0, np.uint8)
        )
    except (
        OSError,
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
        RecursionError,
        safetensors.SafetensorError,
    ) as failure:
        raise UserError(
            f"'{path}' is missing, damaged or not a packed data set of ours ({failure}); pack it "
            "again with scripts/pack_dataset.py"
        ) from None
    if not whole:
        raise UserError(
            f"'{path}' is damaged: its index does not fit; pack it again with "
            "scripts/pack_dataset.py"
        )
    return PackedFile(str(path), images, ends, labels, names, description)


def _offset(path: str | Path) -> int:
    """Position of the first image in a file that safetensors accepts (its documentation, "Format").

    The library's own slices are copies, made while no other Python thread runs: one thread that
    waits for the disk would hold up all others.
    """
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return 8 + size + json.loads(file.read(size))["images"]["data_offsets"][0]


# A part is in memory twice while it is written: about 300 MB for images of 256 pixels, 1.2 GB for
# ImageNet's files.
PART_IMAGES = 5_000
_CHUNK = 128


def pack(
    images: ImageSet,
    path: str,
    short_side: int,
    quality: int,
    workers: int,
    progress: Callable[[int], Any],
    part_images: int = PART_IMAGES,
) -> None:
    """Pack an ImageSet of files into the set ``path``; keep complete parts of an earlier try.

    Args:
        short_side: images with a longer shorter side are resized to it and written as JPEG; 0 keeps
            the bytes of every file.
        quality: of those JPEGs, 1 to 100.
        progress: called with the number of images that were written since the last call.

    Raises:
        UserError: for an image that cannot be decoded, a folder that cannot be written, or parts
            that were made with other options.
    """
    parts = -(-len(images) // part_images)
    source = zlib.crc32(
        "\n".join(map(_identity, images.paths or ())).encode("utf-8", "surrogatepass"),
        zlib.crc32(images.labels.data),
    )
    description = {
        "class_to_index": images.class_to_index,
        "parts": parts,
        "images": len(images),
        "source": source,
        "short_side": short_side,
        "quality": quality,
    }
    for number in range(parts):
        target, indices = (
            part_name(path, number),
            range(number * part_images, min((number + 1) * part_images, len(images))),
        )
        if _is_there(target, description):
            progress(len(indices))
        else:
            _write_part(
                images, indices, target, description, short_side, quality, workers, progress
            )


def _identity(path: str) -> str:
    """Name, size and time of a file, by which a changed one is recognised."""
    try:
        status = os.stat(path)
    except OSError:
        return path
    return f"{path} {status.st_size} {status.st_mtime_ns}"


def _is_there(target: str, description: dict[str, Any]) -> bool:
    if not Path(target).exists():
        return False
    try:
        same = open_part(target).description == description
    except UserError:
        same = False
    if not same:
        raise UserError(
            f"'{target}' already exists, with other images or options, or damaged; remove it, or "
            "choose another --result_path"
        )
    return True


def _write_part(
    images: ImageSet,
    indices: range,
    target: str,
    description: dict[str, Any],
    short_side: int,
    quality: int,
    workers: int,
    progress: Callable[[int], Any],
) -> None:
    check_writable(target)
    encoded: list[bytes] = []
    with ThreadPoolExecutor(workers) as pool:
        for start in range(indices.start, indices.stop, _CHUNK):
            chunk = range(start, min(start + _CHUNK, indices.stop))
            encoded += pool.map(lambda index: encode(images, index, short_side, quality), chunk)
            progress(len(chunk))
    labels = images.labels[indices.start : indices.stop]
    names = [escaped(os.path.basename(images.name(index))) for index in indices]

    def write(partial: Path) -> None:
        save_part(partial, encoded, labels, names, description)
        _verify(partial, encoded, labels)

    write_whole(target, write)


def _verify(path: Path, encoded: list[bytes], labels: np.ndarray) -> None:
    part = open_part(path)
    same = all(part.encoded(index).tobytes() == data for index, data in enumerate(encoded))
    if not same or not np.array_equal(part.labels, labels):
        raise UserError(f"'{path}' is not what was written; check the disk")


def encode(images: ImageSet, index: int, short_side: int, quality: int) -> bytes:
    """The bytes to store for image ``index``. Raises BadImage if it cannot be decoded."""
    image = images.load(index)
    height, width = image.shape[:2]
    if not short_side or min(height, width) <= short_side:
        return Path(images.name(index)).read_bytes()
    scale = short_side / min(height, width)
    size = max(round(width * scale), short_side), max(round(height * scale), short_side)
    resized = cv2.cvtColor(cv2.resize(image, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", resized, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
