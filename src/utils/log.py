"""A command's log: to the screen, and to a file with timestamps."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path

from src.utils.errors import UserError

# Maximum seconds between lines of progress.
LINE_S = 10.0

Log = Callable[[str], None]
# Begins a line about something that the user probably did not want.
WARNING = "warning: "


class _Screen(logging.StreamHandler):
    """Ignores a closed pipe (`| head`), so that the run and log.txt continue."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _File(logging.FileHandler):
    """Ignores a full disk, which the next checkpoint reports."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def create_log(file: Path | None = None) -> Log:
    """A function that writes a line to standard output and, with the time, to ``file``."""
    logger = logging.Logger("run")
    screen = _Screen(sys.stdout)
    screen.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(screen)
    if file is not None:
        to_file = _File(file, encoding="utf-8")
        to_file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        logger.addHandler(to_file)

    def log(text: str) -> None:
        for line in text.split("\n"):
            logger.info(escaped(line))

    return log


def refuse_warnings(log: Log) -> Log:
    """A log like ``log`` that raises UserError for a warning: for --strict=1."""

    def strict_log(text: str) -> None:
        for line in text.split("\n"):
            if line.startswith(WARNING):
                raise UserError(f"{line.removeprefix(WARNING)} (an error because of --strict=1)")
        log(text)

    return strict_log


def no_log(text: str) -> None:
    """A log that ignores its lines, for ranks other than 0."""


def shortened(name: str, length: int) -> str:
    """``name`` without its middle if it is long: beginnings and endings tell files apart."""
    half = length // 2
    return name if len(name) <= length else f"{name[:half]}…{name[-half:]}"


def escaped(name: object) -> str:
    """``name`` as one printable line, for files and classes with strange names.

    Line ends, marks of writing direction and undecodable bytes become escape sequences.
    """
    return "".join(char if char.isprintable() else _escape(char) for char in str(name))


def escaped_lines(text: str) -> str:
    """``escaped`` for each line of a text."""
    return "\n".join(map(escaped, text.split("\n")))


def _escape(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode("ascii")
