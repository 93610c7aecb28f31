"""A command's log: to the screen, and to a file with timestamps."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path

# Maximum seconds between lines of progress.
LINE_S = 30.0

Log = Callable[[str], None]


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
    return lambda text: logger.info(escaped_lines(text))


def no_log(text: str) -> None:
    """A log that ignores its lines, for ranks other than 0."""


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
