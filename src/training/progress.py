"""Progress of a training: a bar on a terminal, lines elsewhere: the first at once, then one at least every 30 s."""

import sys
import threading
import time
from collections.abc import Callable

from tqdm import tqdm

from src.parallel.environment import started_by_mpirun
from src.utils.log import LINE_S


class Progress:
    """A context that shows the steps of each epoch with loss, learning rate and images/s.

    Args:
        log: called with a line of text if there is no terminal.
        interval: steps between such lines, of which there is one every ``line_s`` seconds besides.
        shown: False for ranks that stay silent.
    """

    def __init__(self, images_per_step: int, log: Callable[[str], None], interval: int, shown: bool, line_s: float = LINE_S) -> None:
        self._images_per_step, self._log, self._interval, self._shown, self._line_s = images_per_step, log, interval, shown, line_s
        # mpirun may put a terminal of its own before ranks whose output it writes to files.
        self._has_bar = shown and sys.stderr.isatty() and not started_by_mpirun()
        self._bar: tqdm | None = None
        self._title = ""
        self._first = self._steps = self._done = 0
        self._last_rate = (0, 0.0)
        self._last_line = self._last_step = time.monotonic()
        self._closed = threading.Event()

    def __enter__(self) -> "Progress":
        if self._shown and not self._has_bar:
            threading.Thread(target=self._report_long_steps, daemon=True, name="progress").start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        self.end_epoch()

    def begin_epoch(self, title: str, first: int, steps: int, begun_at: int) -> None:
        """An epoch begins.

        Args:
            first, steps: number of the epoch's first step in the run, and how many steps it has.
            begun_at: the step that comes first now; an earlier run did those before it.
        """
        self._title, self._first, self._steps, self._done = title, first, steps, begun_at - first
        if self._has_bar:
            self._bar = tqdm(total=steps, initial=self._done, desc=title, unit="step", leave=False)
        self._last_rate, self._last_step = (self._done, time.perf_counter()), time.monotonic()

    def update(self, step: int, loss: float, lr: float) -> None:
        """Note that ``step``, counted in the run from 0, is done."""
        if not self._shown:
            return
        self._done, self._last_step = step - self._first + 1, time.monotonic()
        if self._bar is not None:
            rate = self._bar.format_dict["rate"] or 0
            self._bar.set_postfix_str(f"loss {loss:.4f} lr {lr:.5f} {rate * self._images_per_step:.1f} images/s", refresh=False)
            self._bar.update()
        elif self._done % self._interval == 0 or step == 0 or time.monotonic() - self._last_line > self._line_s:
            before, since = self._last_rate
            now = time.perf_counter()
            rate = (self._done - before) * self._images_per_step / max(now - since, 1e-9)
            self._line(f"loss {loss:.4f} lr {lr:.5f} {rate:.1f} images/s")
            self._last_rate = (self._done, now)

    def end_epoch(self) -> None:
        """The epoch has ended, or is left."""
        self._title = ""
        if self._bar is not None:
            self._bar.close()

    def _line(self, text: str) -> None:
        self._last_line = time.monotonic()
        self._log(f"{self._title} step {self._done}/{self._steps} {text}")

    def _report_long_steps(self) -> None:
        """A step may take minutes: the first compiles, and others may wait for data or other ranks."""
        while not self._closed.wait(self._line_s / 10):
            now = time.monotonic()
            if self._title and now - self._last_line > self._line_s:
                self._line(f"done, {now - self._last_step:.0f} s in the next")
