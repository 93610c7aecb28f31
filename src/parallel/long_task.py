"""How far a long task is: a bar on a terminal, elsewhere a line at least every 30 s, with the time that is left."""

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

from src.parallel.environment import started_by_mpirun
from src.utils.log import LINE_S
from src.utils.text import escaped_lines


def note(text: str) -> None:
    """Say at once, beside what a command puts out, what it is about to do; loading MindSpore alone takes seconds."""
    print(escaped_lines(text), file=sys.stderr, flush=True)


class LongTask:
    """A context; call ``advance`` as the task goes on.

    Args:
        doing: what is being done, as in "evaluated".
        total, unit: how many there are, and of what.
        log: called with a line of text; does nothing on ranks that stay silent.
        has_bar: False for ranks that stay silent.
    """

    def __init__(self, doing: str, total: int, unit: str, log: Callable[[str], None] = note, line_s: float = LINE_S,
                 has_bar: bool = True) -> None:
        self._doing, self._total, self._unit, self._log, self._line_s = doing, total, unit, log, line_s
        # mpirun may put a terminal of its own before ranks whose output it writes to files.
        self._has_bar = has_bar and sys.stderr.isatty() and not started_by_mpirun()

    def __enter__(self) -> "LongTask":
        self._done, self._begun = 0, time.monotonic()
        self._shown = self._begun
        self._bar = tqdm(total=self._total, unit=self._unit, desc=self._doing, leave=False) if self._has_bar else None
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
            return
        now = time.monotonic()
        if now - self._shown > self._line_s and self._done:
            self._shown, share = now, self._done / self._total
            self._log(f"{self._doing} {100 * share:.0f} % of the {self._unit}s, {(now - self._begun) * (1 / share - 1):.0f} s left")

    def write(self, text: str) -> None:
        """Print a line without tearing the bar."""
        tqdm.write(text)
