"""Mistakes that a user can mend."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Shown as one line, ``error: ...``, that says what is wrong and what to do; the process then exits with ``status``."""

    status = 2


class Incomplete(UserError):
    """A command did what it could: its results are there, but not all of them."""

    status = 1


class Stopped(Exception):
    """The training saved its state because of signal number ``signal``; the process then exits with status 128 + signal."""

    def __init__(self, signal: int, text: str) -> None:
        super().__init__(text)
        self.signal = signal


def suggestion(word: object, known: Iterable[object]) -> str:
    """`` (did you mean 'x'?)`` for the nearest of ``known`` to ``word``, or an empty string."""
    near = difflib.get_close_matches(str(word), [str(k) for k in known], n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""
