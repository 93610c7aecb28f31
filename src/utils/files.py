"""Files that are complete or absent, whenever the process is killed."""

import os
from pathlib import Path

from src.utils.errors import UserError


def write_whole(target, write):
    """Write ``target`` through another name in its folder, flush it to disk, and rename it.

    Args:
        write: takes the Path to write; the Path has the suffix of ``target``.

    Raises:
        UserError: where the folder cannot be written, the disk is full, or ``write`` fails.
    """
    target = Path(target)
    partial = target.with_name(f".{os.getpid()}.partial.{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        _flush_to_disk(partial)
        os.replace(partial, target)
        _flush_to_disk(target.parent)
    except (OSError, RuntimeError, ValueError, TypeError) as failure:
        reason = getattr(failure, "strerror", None) or (str(failure).strip().splitlines() or [type(failure).__name__])[0]
        raise UserError(f"cannot write '{target}': {reason}") from None
    finally:
        if partial.exists():
            # MindSpore makes its files read-only.
            os.chmod(partial, 0o600)
            partial.unlink()


def _flush_to_disk(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
