"""Writing packed sets, which packed.py reads."""

import json
import os
import shutil
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from src.dataset.image_set import ImageSet
from src.dataset.packed import is_packed, open_part, part_name
from src.utils.errors import UserError
from src.utils.text import escaped

PART_IMAGES = 20_000
_CHUNK = 128
_SCHEMA = {"image": {"type": "bytes"}, "label": {"type": "int32"}, "name": {"type": "string"}}


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
        if Path(target).exists() and is_packed(target):
            if open_part(target).description != description:
                raise UserError(f"'{target}' is there already, of other images or options; remove it, or choose another "
                                "--result_path")
            progress(len(indices))
        else:
            _write_part(images, indices, target, description, short_side, quality, workers, progress)


def _write_part(images: ImageSet, indices: range, target: str, description: dict[str, Any], short_side: int, quality: int,
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
