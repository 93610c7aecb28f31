"""Names of checkpoint files, and which of them a path stands for. Imports nothing of MindSpore."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from src.models.published_weights import local_weights
from src.utils.errors import UserError

# How the names of files end that export.py and training make of a checkpoint.
_EXPORTED = ("_exported", "_fused", "fused")
# The position of a checkpoint whose name does not tell it.
NO_POSITION = (0, 0)


def checkpoint_name(network: str, epoch: int, steps: int) -> str:
    """NETWORK-EPOCH_STEPS.ckpt, as the model zoo names checkpoints."""
    return f"{network}-{epoch}_{steps}.ckpt"


def checkpoint_position(file: Path) -> tuple[int, int]:
    """(epoch, steps in it) from the name of a checkpoint; NO_POSITION for another name."""
    found = re.search(r"-(\d+)_(\d+)$", file.stem)
    return (int(found[1]), int(found[2])) if found else NO_POSITION


def in_order(paths: Sequence[Path]) -> list[Path]:
    """Checkpoints in the order of epochs and steps in their names; others first."""
    return sorted(paths, key=lambda path: (checkpoint_position(path), str(path)))


def find_checkpoints(path: str) -> list[Path]:
    """The checkpoint files that ``path``, a file or a folder, names.

    Raises:
        UserError: if there is none.
    """
    if not path:
        raise UserError("no checkpoint given: pass --checkpoint_file_path=FILE_OR_FOLDER")
    location = Path(local_weights(path))
    if location.is_dir():
        files = sorted(f for f in location.glob("*.ckpt") if not f.name.startswith("."))
        if not files:
            raise UserError(f"there is no .ckpt file in the folder '{path}'")
        return files
    if not location.exists():
        raise UserError(f"checkpoint '{path}' does not exist")
    return [location]


def choose_checkpoint(path: str, log: Callable[[str], None]) -> Path:
    """The checkpoint that ``path`` stands for: a file; in a folder best.ckpt, or the latest.

    Args:
        log: reports the choice in a folder.

    Raises:
        UserError: if there is none.
    """
    files = find_checkpoints(path)
    if not Path(path).is_dir():
        return files[0]
    named = {file.name: file for file in files}
    trained = [file for file in files if not file.stem.endswith(_EXPORTED)] or files
    chosen = named.get("best.ckpt") or named.get("latest.ckpt") or in_order(trained)[-1]
    log(f"using {chosen}, one of {len(files)} checkpoints there")
    return chosen
