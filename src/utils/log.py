"""Log of a command: to the screen, and to a file with the time."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path

from src.utils.text import escaped_lines

# Longest silence of anything that goes on for long.
LINE_S = 30.0


class _Screen(logging.StreamHandler):
    """Goes on in silence if nobody reads any more (`| head`): the run itself and its log.txt do too."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _File(logging.FileHandler):
    """Goes on in silence on a full disk, which the next checkpoint reports."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def create_log(shown: bool = True, file: Path | None = None) -> Callable[[str], None]:
    """A function that writes a line to standard output and, with the time, to ``file``; one that does nothing if not ``shown``."""
    if not shown:
        return lambda text: None
    logger = logging.Logger("run")
    screen = _Screen(sys.stdout)
    screen.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(screen)
    if file is not None:
        to_file = _File(file, encoding="utf-8")
        to_file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        logger.addHandler(to_file)
    return lambda text: logger.info(escaped_lines(text))
