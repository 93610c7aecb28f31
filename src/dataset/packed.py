"""Data sets packed into a few large files instead of a million small ones, images resized once.

A set is ``NAME.safetensors`` and, beyond 5,000 images, further parts ``NAME.safetensors.1`` and so
on. Each part is a safetensors file with the encoded images one after another, the position where
each ends, its checksum, and their labels. Older sets have no checksums.
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

from src.dataset.decoding import BadImage
from src.dataset.image_set import ImageSet
from src.utils.errors import UserError
from src.utils.files import check_writable, write_atomically
from src.utils.log import escaped

ENDING = ".safetensors"
# Ending of packed sets of version 0.2. They are no longer read, only recognised for a clear error.
_EARLIER_ENDING = ".mindrecord"
_MAX_CLASSES = 10**6
# Of libjpeg.
_LONGEST_JPEG = 65500


@dataclass(frozen=True)
class PackedFile:
    """The images of one part, which stay in the file until they are decoded.

    Attributes:
        images: the bytes of all encoded images, uint8, mapped into memory.
        ends: (N + 1,) int64, 0 and then where each image ends.
        labels: (N,) int32.
        checksums: (N,) uint32, the CRC-32 of each encoded image; None in older sets.
        names: N file names with their folders, for messages.
        description: class_to_index, parts, images in the whole set, source, packing options.
    """

    path: str
    images: np.ndarray
    ends: np.ndarray
    labels: np.ndarray
    checksums: np.ndarray | None
    names: list[str]
    description: dict[str, Any]

    def encoded(self, index: int) -> np.ndarray:
        """The bytes of an image file, (N,) uint8. Raises BadImage if they have changed."""
        content = self.images[self.ends[index] : self.ends[index + 1]]
        if self.checksums is not None and zlib.crc32(content.data) != self.checksums[index]:
            raise BadImage(
                f"{self.name(index)} has changed since it was packed; check the disk, and pack the "
                "data set again"
            )
        return content

    def name(self, index: int) -> str:
        """What to call an image in a message."""
        return f"{self.names[index]} in {self.path}"


class PackedImages:
    """All parts of a packed set, as one list of encoded images.

    Raises:
        UserError: if a part is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        first = open_part(path)
        self.class_to_index = first.description["class_to_index"]
        self.is_list = bool(first.description.get("is_list"))
        self._parts = [first] + [
            open_part(part_name(path, number)) for number in range(1, first.description["parts"])
        ]
        other = next((part for part in self._parts if part.description != first.description), None)
        if other is not None:
            raise UserError(
                f"'{other.path}' is a part of another set than '{path}'; pack the data set again"
            )
        self.checksum = first.description["source"]
        for part in self._parts:
            # Without resizing, the source says what the bytes are.
            if part.description.get("short_side") and part.checksums is not None:
                self.checksum = zlib.crc32(part.checksums.data, self.checksum)
        self._first_of_part = np.cumsum([0] + [len(part.labels) for part in self._parts])
        self.labels = np.concatenate([part.labels for part in self._parts])
        if len(self.labels) != first.description["images"]:
            raise UserError(
                f"'{path}' holds {len(self.labels)} of {first.description['images']} images; pack "
                "the data set again"
            )

    def encoded(self, index: int) -> np.ndarray:
        """The bytes of image ``index``, (N,) uint8. Raises BadImage if they have changed."""
        part, inside = self._place(index)
        return part.encoded(inside)

    def size(self, index: int) -> int:
        """The number of these bytes."""
        part, inside = self._place(index)
        return int(part.ends[inside + 1] - part.ends[inside])

    def name(self, index: int) -> str:
        part, inside = self._place(index)
        return part.name(inside)

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
    tensors: dict[str, np.ndarray] = {
        "images": np.frombuffer(b"".join(encoded), np.uint8),
        "labels": labels.astype(np.int32),
        "ends": np.cumsum([0, *map(len, encoded)], dtype=np.int64),
        "checksums": np.array(list(map(zlib.crc32, encoded)), np.uint32),
    }
    index = {"names": json.dumps(names), "description": json.dumps(description)}
    index["checksum"] = str(_index_checksum(tensors, index))
    try:
        safetensors.numpy.save_file(tensors, path, index)
    except safetensors.SafetensorError as failure:
        raise OSError(str(failure)) from None


def open_part(path: str | Path) -> PackedFile:
    """Open one part of a packed set.

    Raises:
        UserError: if the file is missing or damaged.
    """
    try:
        file = safetensors.safe_open(path, "numpy")
        ends, labels = file.get_tensor("ends"), file.get_tensor("labels")
        names_of_tensors = file.keys()
        checksums = file.get_tensor("checksums") if "checksums" in names_of_tensors else None
        index = file.metadata()
        names, description = (json.loads(index[key]) for key in ("names", "description"))
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
            and all(type(label) is int and 0 <= label < _MAX_CLASSES for label in classes)
            and all(type(description[key]) is int for key in ("parts", "images", "source"))
            and (checksums is None or _has_its_checksum(ends, labels, checksums, index))
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
            f"'{path}' is damaged: its index is inconsistent; pack it again with "
            "scripts/pack_dataset.py"
        )
    return PackedFile(str(path), images, ends, labels, checksums, names, description)


def _has_its_checksum(
    ends: np.ndarray, labels: np.ndarray, checksums: np.ndarray, index: dict[str, str]
) -> bool:
    tensors = {"labels": labels, "ends": ends, "checksums": checksums}
    return (
        checksums.dtype == np.uint32
        and len(checksums) == len(labels)
        and index["checksum"] == str(_index_checksum(tensors, index))
    )


def _index_checksum(tensors: dict[str, np.ndarray], index: dict[str, str]) -> int:
    """The CRC-32 of all in a part but its images."""
    checksum = 0
    for name in ("labels", "ends", "checksums"):
        checksum = zlib.crc32(tensors[name].data, checksum)
    for name in ("names", "description"):
        checksum = zlib.crc32(index[name].encode(), checksum)
    return checksum


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
        **({"is_list": True} if images.is_list else {}),
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
    names = [escaped("/".join(Path(images.name(index)).parts[-2:])) for index in indices]

    def write(partial: Path) -> None:
        save_part(partial, encoded, labels, names, description)
        _verify(partial, encoded, labels)

    write_atomically(target, write)


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
    if max(size) > _LONGEST_JPEG:
        raise BadImage(
            f"{images.name(index)} would have {size[0]} x {size[1]} pixels, and a JPEG has at most "
            f"{_LONGEST_JPEG} in a row or column; leave it out, or pack with --short_side=0"
        )
    return cv2.imencode(".jpg", resized, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
