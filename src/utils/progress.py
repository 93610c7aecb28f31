"""Progress of long tasks and of training: a bar in a terminal, otherwise a line every 10 s."""

import sys
import threading
import time

from tqdm import tqdm

from src.utils.log import LINE_S, Log, escaped_lines, no_log


def print_status(text: str) -> None:
    """Print what a command is about to do on standard error; MindSpore alone takes seconds."""
    print(escaped_lines(text), file=sys.stderr, flush=True)


class ProgressBar:
    """Shows the progress of a long task. A context manager; call ``advance`` in it.

    Args:
        doing: what is being done, as in "evaluated".
        total, unit: how many there are, and of what.
        log: called with a line of text.
        bar: whether to show a bar; None: if standard error is a terminal.
    """

    def __init__(
        self,
        doing: str,
        total: int,
        unit: str,
        log: Log = print_status,
        line_s: float = LINE_S,
        bar: bool | None = None,
    ) -> None:
        self._doing, self._total, self._unit = doing, total, unit
        self._log, self._line_s = log, line_s
        self._has_bar = sys.stderr.isatty() if bar is None else bar

    def __enter__(self) -> "ProgressBar":
        self._done, self._started = 0, time.monotonic()
        self._last_line = self._started
        self._bar: tqdm | None = None
        if self._has_bar:
            self._bar = tqdm(total=self._total, unit=self._unit, desc=self._doing, leave=False)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, count: int = 1) -> None:
        """Advance by ``count``."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
            return
        now = time.monotonic()
        if now - self._last_line > self._line_s and self._done:
            self._last_line, fraction = now, self._done / self._total
            left = (now - self._started) * (1 / fraction - 1)
            self._log(
                f"{self._doing} {100 * fraction:.0f} % of the {self._unit}s, {left:.0f} s left"
            )

    def write(self, text: str) -> None:
        """Print a line without breaking the bar."""
        tqdm.write(text)


class TrainingProgress:
    """Shows the steps of each epoch with loss, learning rate and images/s. A context manager.

    Args:
        log: called with a line of text if there is no bar.
        interval: steps between such lines; there is also a line every ``line_s`` seconds.
        bar: whether to show a bar.
    """

    def __init__(
        self, images_per_step: int, log: Log, interval: int, bar: bool, line_s: float = LINE_S
    ) -> None:
        self._images_per_step, self._log, self._interval = images_per_step, log, interval
        self._has_bar, self._line_s = bar, line_s
        self._bar: tqdm | None = None
        self._title = ""
        self._first = self._steps = self._done = 0
        self._last_rate = (0, 0.0)
        self._last_line = self._last_step = time.monotonic()
        self._closed = threading.Event()

    def __enter__(self) -> "TrainingProgress":
        if not self._has_bar and self._log is not no_log:
            reporter = threading.Thread(
                target=self._report_long_steps, daemon=True, name="progress"
            )
            reporter.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        self.end_epoch()

    def begin_epoch(self, title: str, first: int, steps: int, resumed_at: int) -> None:
        """An epoch begins.

        Args:
            first: number of the epoch's first step in the run.
            steps: number of steps in the epoch.
            resumed_at: number of the step that comes first now; an earlier run did those before.
        """
        self._title, self._first, self._steps = title, first, steps
        self._done = resumed_at - first
        if self._has_bar:
            self._bar = tqdm(total=steps, initial=self._done, desc=title, unit="step", leave=False)
        self._last_rate = (self._done, time.perf_counter())
        self._last_step = time.monotonic()

    def update(self, step: int, loss: float, lr: float) -> None:
        """``step``, counted in the run from 0, is done."""
        self._done, self._last_step = step - self._first + 1, time.monotonic()
        if self._bar is not None:
            rate = (self._bar.format_dict["rate"] or 0) * self._images_per_step
            text = f"loss {loss:.4f} lr {lr:.5f} {rate:.1f} images/s"
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()
            return
        long_ago = time.monotonic() - self._last_line > self._line_s
        if self._done % self._interval == 0 or step == 0 or long_ago:
            done, since = self._last_rate
            now = time.perf_counter()
            rate = (self._done - done) * self._images_per_step / max(now - since, 1e-9)
            self._write_line(f"loss {loss:.4f} lr {lr:.5f} {rate:.1f} images/s")
            self._last_rate = (self._done, now)

    def end_epoch(self) -> None:
        """The epoch has ended, or is left."""
        self._title = ""
        if self._bar is not None:
            self._bar.close()

    def _write_line(self, text: str) -> None:
        self._last_line = time.monotonic()
        self._log(f"{self._title} step {self._done}/{self._steps} {text}")

    def _report_long_steps(self) -> None:
        """A step may take minutes: the first compiles, others may wait for data or other ranks."""
        while not self._closed.wait(self._line_s / 10):
            now = time.monotonic()
            if self._title and now - self._last_line > self._line_s:
                self._write_line(f"(next step running for {now - self._last_step:.0f} s)")
