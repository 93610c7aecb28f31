"""Data sets packed into MindRecord files: one large file in place of a million small ones, images resized once.

A set is ``NAME.mindrecord`` and, beyond 20,000 images, further parts ``NAME.mindrecord.1`` ...; each part is a MindRecord file
of its own (columns image, label, name) with its index ``.db`` beside it, readable by mindspore.dataset.MindDataset too.
"""

import json
import mmap
import os
import shutil
import sqlite3
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import cv2
import numpy as np

from src.utils.errors import UserError
from src.utils.text import escaped

if TYPE_CHECKING:
    from src.dataset.sources import ImageSet

PART_IMAGES = 20_000
_CHUNK = 128
# Each image is stored behind its length, 8 bytes.
_LENGTH_BYTES = 8
_LARGEST_HEADER = 1 << 28
_SCHEMA = {"image": {"type": "bytes"}, "label": {"type": "int32"}, "name": {"type": "string"}}


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


def pack(images: "ImageSet", path: str, short_side: int, quality: int, workers: int, progress: Callable[[int], Any],
         part_images: int = PART_IMAGES) -> None:
    """Write the ImageSet ``images``, a set of files, as the packed set ``path``; complete parts of an earlier try are kept.

    Args:
        short_side: images whose shorter side is longer are resized to it and written as JPEG; 0 keeps every file's bytes.
        quality: of those JPEGs, 1 to 100.
        progress: called with the number of images that were written since the last call.

    Raises:
        UserError: for an image that cannot be decoded, a folder that cannot be written, or parts made with other options.
    """
    parts = -(-len(images) // part_images)
    source = zlib.crc32("\n".join(map(images.name, range(len(images)))).encode("utf-8", "surrogatepass"),
                        zlib.crc32(images.labels.data))
    description = {"class_to_index": images.class_to_index, "parts": parts, "images": len(images), "source": source,
                   "short_side": short_side, "quality": quality}
    for number in range(parts):
        target, indices = part_name(path, number), range(number * part_images, min((number + 1) * part_images, len(images)))
        if Path(target).exists() and is_packed(target):
            if open_part(target).description != description:
                raise UserError(f"'{target}' is there already, of other images or options; remove it, or choose another "
                                "--result_path")
            progress(len(indices))
        else:
            _write_part(images, indices, target, description, short_side, quality, workers, progress)


def _write_part(images: "ImageSet", indices: range, target: str, description: dict[str, Any], short_side: int, quality: int,
                workers: int, progress: Callable[[int], Any]) -> None:
    from mindspore.mindrecord import FileWriter
    # MindRecord writes its file's name into it, so that it is written under this name in a folder of its own and moved.
    folder = Path(target).parent / f".{Path(target).name}.partial"
    checksums: list[int] = []
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        writer = FileWriter(str(folder / Path(target).name), shard_num=1)
        writer.add_schema(_SCHEMA, json.dumps(description))
        with ThreadPoolExecutor(workers) as pool:
            for start in range(indices.start, indices.stop, _CHUNK):
                chunk = range(start, min(start + _CHUNK, indices.stop))
                encoded = list(pool.map(lambda index: encode(images, index, short_side, quality), chunk))
                names = (escaped(os.path.basename(images.name(index))) for index in chunk)
                writer.write_raw_data([{"image": data, "label": int(images.labels[index]), "name": name}
                                       for data, index, name in zip(encoded, chunk, names)])
                checksums += map(zlib.crc32, encoded)
                progress(len(chunk))
        writer.commit()
        _verify(folder / Path(target).name, checksums, images.labels[indices.start:indices.stop])
        for suffix in (".db", ""):
            os.replace(folder / f"{Path(target).name}{suffix}", f"{target}{suffix}")
    except (OSError, RuntimeError) as failure:
        reason = getattr(failure, "strerror", None) or str(failure).strip().splitlines()[0]
        raise UserError(f"cannot write '{target}': {reason}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _verify(path: Path, checksums: list[int], labels: np.ndarray) -> None:
    """Compare a part with what went into it, by our reader and by MindSpore's."""
    from mindspore.mindrecord import FileReader
    part = open_part(path)
    reader = FileReader(str(path))
    rows = sorted((row["name"], int(row["label"]), zlib.crc32(bytes(row["image"]))) for row in reader.get_next())
    reader.close()
    found = [zlib.crc32(part.encoded(index).data) for index in range(len(part.labels))]
    ours = sorted(zip(part.names, part.labels.tolist(), found))
    if found != checksums or not np.array_equal(part.labels, labels) or ours != rows:
        raise UserError(f"'{path}' reads back otherwise than it was written; is the disk in order?")


def encode(images: "ImageSet", index: int, short_side: int, quality: int) -> bytes:
    """The bytes to store for image ``index``. Raises BadImage if it cannot be decoded."""
    image = images.load(index)
    height, width = image.shape[:2]
    if not short_side or min(height, width) <= short_side:
        return Path(images.name(index)).read_bytes()
    scale = short_side / min(height, width)
    size = max(round(width * scale), short_side), max(round(height * scale), short_side)
    resized = cv2.cvtColor(cv2.resize(image, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", resized, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def _header(content: mmap.mmap) -> dict[str, Any]:
    size = int.from_bytes(content[:8], "little")
    if not 0 < size < min(len(content), _LARGEST_HEADER):
        raise ValueError("it has no header")
    return json.loads(content[8:8 + size])
