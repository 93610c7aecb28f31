"""Data sets packed into MindRecord files: one large file in place of a million small ones, images resized once.

A set is ``NAME.mindrecord`` and, beyond 20,000 images, further parts ``NAME.mindrecord.1`` ...; each part is a MindRecord file
of its own (columns image, label, name) with its index ``.db`` beside it, readable by mindspore.dataset.MindDataset too.
"""

import json
import mmap
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from src.utils.errors import UserError

# Each image is stored behind its length, 8 bytes.
_LENGTH_BYTES = 8
_LARGEST_HEADER = 1 << 28


@dataclass(frozen=True)
class PackedFile:
    """The images of one part: where each lies in the file, which is mapped into memory."""

    path: str
    content: mmap.mmap
    starts: np.ndarray
    ends: np.ndarray
    labels: np.ndarray
    names: list[str]
    description: dict[str, Any]

    def encoded(self, index: int) -> np.ndarray:
        """The bytes of an image file, (N,) uint8."""
        start, end = int(self.starts[index]), int(self.ends[index])
        return np.frombuffer(self.content, np.uint8, end - start, start)


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
    """Whether ``path`` is the first part of a packed set, by its index beside it."""
    return Path(f"{path}.db").is_file()


def open_part(path: str | Path) -> PackedFile:
    """A PackedFile. Its layout is MindRecord 3.0's: a header in JSON, then pages; the index says page and offset of each row.

    Raises:
        UserError: if the file or its index is missing or damaged.
    """
    try:
        with open(path, "rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        header = _header(content)
        with closing(sqlite3.connect(f"file:{quote(str(path))}.db?mode=ro", uri=True)) as index:
            rows = index.execute("SELECT PAGE_ID_BLOB, PAGE_OFFSET_BLOB, PAGE_OFFSET_BLOB_END, label_0, name_0 FROM INDEXES "
                                 "ORDER BY ROW_ID").fetchall()
        description = json.loads(header["schema"][0]["desc"])
        numbers = np.array([row[:4] for row in rows], np.int64).reshape(-1, 4)
        pages = header["header_size"] + numbers[:, 0] * header["page_size"]
        starts, ends = pages + numbers[:, 1] + _LENGTH_BYTES, pages + numbers[:, 2]
        whole = {"class_to_index", "parts", "images", "source"} <= set(description) and len(rows) and (
            starts <= ends).all() and starts.min() > 0 and ends.max() <= len(content)
    except (OSError, ValueError, KeyError, IndexError, TypeError, OverflowError, sqlite3.Error) as failure:
        raise UserError(f"'{path}' is missing, damaged or not a packed data set of ours ({failure}); pack it again with "
                        "scripts/pack_dataset.py") from None
    if not whole:
        raise UserError(f"'{path}' is damaged: its index does not fit; pack it again with scripts/pack_dataset.py")
    return PackedFile(str(path), content, starts, ends, numbers[:, 3].astype(np.int32), [row[4] for row in rows], description)


def _header(content: mmap.mmap) -> dict[str, Any]:
    size = int.from_bytes(content[:8], "little")
    if not 0 < size < min(len(content), _LARGEST_HEADER):
        raise ValueError("it has no header")
    return json.loads(content[8:8 + size])
