"""Errors that the user can fix."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Shown as one line, ``error: ...``, that says what is wrong and how to fix it.

    The process then exits with ``status``.
    """

    status = 2


class PartialFailure(UserError):
    """Some inputs failed; the results for the others were written."""

    status = 1


class DamagedImage(UserWarning):
    """An image file that decodes, although its content is inconsistent."""


class TrainingInterrupted(Exception):
    """Training saved its state after a signal; the process exits with status 128 + signal."""

    def __init__(self, signal: int, text: str) -> None:
        super().__init__(text)
        self.signal = signal


def suggestion(word: object, known: Iterable[object]) -> str:
    """`` (did you mean 'x'?)`` for the nearest of ``known``, or ""."""
    near = difflib.get_close_matches(str(word), [str(k) for k in known], n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""
