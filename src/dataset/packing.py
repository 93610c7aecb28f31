"""Writing packed sets, which packed.py reads."""

import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from src.dataset.image_set import ImageSet
from src.dataset.packed import open_part, part_name, save_part
from src.utils.errors import UserError
from src.utils.files import check_writable, write_whole
from src.utils.text import escaped

# A part is in memory twice while it is written: some 300 MB of images of 256 pixels, 1.2 GB of ImageNet's files.
PART_IMAGES = 5_000
_CHUNK = 128


def pack(images: ImageSet, path: str, short_side: int, quality: int, workers: int, progress: Callable[[int], Any],
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
        if _is_there(target, description):
            progress(len(indices))
        else:
            _write_part(images, indices, target, description, short_side, quality, workers, progress)


def _is_there(target: str, description: dict[str, Any]) -> bool:
    if not Path(target).exists():
        return False
    try:
        same = open_part(target).description == description
    except UserError:
        same = False
    if not same:
        raise UserError(f"'{target}' is there already, of other images or options, or damaged; remove it, or choose another --result_path")
    return True


def _write_part(images: ImageSet, indices: range, target: str, description: dict[str, Any], short_side: int, quality: int,
                workers: int, progress: Callable[[int], Any]) -> None:
    check_writable(target)
    encoded: list[bytes] = []
    with ThreadPoolExecutor(workers) as pool:
        for start in range(indices.start, indices.stop, _CHUNK):
            chunk = range(start, min(start + _CHUNK, indices.stop))
            encoded += pool.map(lambda index: encode(images, index, short_side, quality), chunk)
            progress(len(chunk))
    labels = images.labels[indices.start:indices.stop]
    names = [escaped(os.path.basename(images.name(index))) for index in indices]

    def write(partial: Path) -> None:
        save_part(partial, encoded, labels, names, description)
        _verify(partial, encoded, labels)
    write_whole(target, write)


def _verify(path: Path, encoded: list[bytes], labels: np.ndarray) -> None:
    part = open_part(path)
    same = all(part.encoded(index).tobytes() == data for index, data in enumerate(encoded))
    if not same or not np.array_equal(part.labels, labels):
        raise UserError(f"'{path}' reads back otherwise than it was written; is the disk in order?")


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
