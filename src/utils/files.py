"""Writes files atomically: they are complete or absent, even if the process is killed."""

import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from src.utils.errors import UserError

_PARTIAL = ".partial."


def user_cache() -> Path | None:
    """The project's folder under $XDG_CACHE_HOME or ~/.cache; None if the user has no home."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "acnet-mindspore" if os.path.isabs(home) else None


def write_atomically(target: str | Path, write: Callable[[Path], Any]) -> None:
    """Write ``target`` through another name in its folder, flush it to disk, and rename it.

    Args:
        write: takes the Path to write; the Path has the suffix of ``target``.

    Raises:
        UserError: if the folder cannot be written, the disk is full, or ``write`` fails.
    """
    target = Path(target)
    partial = _partial_of(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        # Some libraries create files that only their owner can read.
        partial.chmod(_mode_of_new_files())
        _flush_to_disk(partial)
        os.replace(partial, target)
        _flush_to_disk(target.parent)
    except UserError:
        raise
    except Exception as failure:  # libraries raise exceptions of their own for a full disk
        reason = (
            getattr(failure, "strerror", None)
            or (str(failure).strip().splitlines() or [type(failure).__name__])[0]
        )
        raise UserError(f"cannot write '{target}': {reason}") from None
    finally:
        # A writer may leave a temporary file of its own: MindSpore writes NAME.tmp first.
        _remove(target.parent, partial.stem)


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A path in a new folder next to ``target``, to write to, and others next to it.

    At the end they replace the files of their names in the folder of ``target``. If the context
    ends with an error, nothing there has changed.
    """
    folder = target.parent / f"{_PARTIAL}{os.getpid()}"
    try:
        folder.mkdir(parents=True)
    except OSError as failure:
        raise UserError(f"cannot write '{target}': {failure.strerror}") from None
    try:
        yield folder / target.name
        for file in sorted(folder.iterdir()):
            os.replace(file, target.parent / file.name)
    except UserError as failure:
        raise UserError(str(failure).replace(str(folder), str(target.parent))) from failure
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_writable(target: str | Path) -> None:
    """Raise UserError, ahead of long work, if ``write_atomically`` could not write ``target``."""
    target = Path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _partial_of(target).touch()
        _partial_of(target).unlink()
    except OSError as failure:
        raise UserError(f"cannot write '{target}': {failure.strerror}") from None


def _partial_of(target: Path) -> Path:
    return target.with_name(f".{os.getpid()}{_PARTIAL}{target.name}")


def check_ending(key: str, path: str, endings: Sequence[str]) -> None:
    """Raise UserError if the name of a file has none of ``endings``, which decide its format.

    Args:
        path: the file that ``key`` names; "" passes.
    """
    if path and not path.lower().endswith(tuple(endings)):
        raise UserError(
            f"{key}={path}: the name must end in {' or '.join(endings)}, which decides the format"
        )


def checksum(path: Path) -> int:
    """CRC-32 of a file's content. Raises UserError if it cannot be read."""
    found = 0
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 24):
                found = zlib.crc32(chunk, found)
    except OSError as failure:
        raise UserError(f"cannot read '{path}': {failure.strerror}") from None
    return found


def remove_partials(folder: Path) -> None:
    """Remove what killed writers left in ``folder``; call it while nobody writes there."""
    _remove(folder, ".", _PARTIAL)


def _remove(folder: Path, start: str, inside: str = "") -> None:
    """Remove the files in ``folder`` whose names start with ``start`` and contain ``inside``."""
    for leftover in Path(folder).iterdir() if Path(folder).is_dir() else ():
        if leftover.name.startswith(start) and inside in leftover.name:
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
                continue
            # MindSpore makes its files read-only, which some file systems keep from being removed.
            leftover.chmod(0o600)
            leftover.unlink()


def _mode_of_new_files() -> int:
    """0o666 minus the umask, read from /proc: os.umask() can only read it by setting it."""
    umask = re.search(r"^Umask:\s*([0-7]+)", Path("/proc/self/status").read_text(), re.M)
    return 0o666 & ~int(umask[1], 8) if umask else 0o644


def _flush_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
