"""Checkpoint files: complete or absent on disk."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import mindspore
import numpy as np
from mindspore import Parameter, Tensor

from src.models.formats import CHECKSUM, METADATA, content_checksum
from src.utils.errors import UserError
from src.utils.files import write_whole


def save_checkpoint(path: Path, parameters: Iterable[Parameter], metadata: dict[str, Any]) -> None:
    """Write ``path`` (.ckpt) with a checksum, so that it is complete or absent, whenever the process is killed.

    Args:
        parameters: their names are the checkpoint's.
        metadata: JSON-serialisable, stored beside the weights.

    Raises:
        UserError: if the folder cannot be written or the disk is full.
    """
    arrays = {p.name: p.asnumpy() for p in parameters}
    arrays[METADATA] = np.frombuffer(json.dumps(metadata).encode(), np.uint8).copy()
    arrays[CHECKSUM] = np.frombuffer(content_checksum(arrays), np.uint8).copy()
    entries = [{"name": name, "data": Tensor(array)} for name, array in arrays.items()]
    write_whole(path, lambda partial: mindspore.save_checkpoint(entries, str(partial)))


def find_checkpoints(path: str) -> list[Path]:
    """The checkpoint files that ``path``, a file or a folder, names. Raises UserError if there is none."""
    if not path:
        raise UserError("no checkpoint given: pass --checkpoint_file_path=FILE_OR_FOLDER")
    place = Path(path)
    if place.is_dir():
        found = sorted(file for file in place.glob("*.ckpt") if not file.name.startswith("."))
        if not found:
            raise UserError(f"there is no .ckpt file in the folder '{path}'")
        return found
    if not place.exists():
        raise UserError(f"checkpoint '{path}' does not exist")
    return [place]


def choose_checkpoint(path: str, note: Callable[[str], None]) -> Path:
    """The one checkpoint that ``path`` stands for: a file; of a folder best.ckpt, or the one with the most epochs and steps, which is said.

    Raises:
        UserError: if there is none.
    """
    found = find_checkpoints(path)
    if not Path(path).is_dir():
        return found[0]
    chosen = next((file for file in found if file.name == "best.ckpt"), in_order(found)[-1])
    note(f"of {len(found)} checkpoints there: {chosen}")
    return chosen


def in_order(paths: Sequence[Path]) -> list[Path]:
    """Checkpoints by epoch and step as their names, NETWORK-EPOCH_STEPS.ckpt, have them; others first."""
    def key(path: Path) -> tuple[list[int], str]:
        numbers = re.search(r"-(\d+)_(\d+)", path.stem)
        return [int(number) for number in numbers.groups()] if numbers else [0, 0], str(path)
    return sorted(paths, key=key)
