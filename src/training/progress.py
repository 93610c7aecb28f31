"""Progress of an epoch: a bar on a terminal, a line at intervals elsewhere."""

import sys
import time
from collections.abc import Callable

from tqdm import tqdm


class Progress:
    """Shows the steps of an epoch with loss, learning rate and images/s.

    Args:
        first, steps: number of the epoch's first step in the run, and how many steps it has.
        begun_at: the step that comes first now; an earlier run did those before it.
        log: called with a line of text if there is no terminal.
        interval: steps between such lines.
        shown: False for ranks that stay silent.
    """

    def __init__(self, title: str, first: int, steps: int, begun_at: int, images_per_step: int, log: Callable[[str], None],
                 interval: int, shown: bool) -> None:
        self._title, self._first, self._steps, self._images_per_step = title, first, steps, images_per_step
        self._log, self._interval, self._shown = log, interval, shown
        done = begun_at - first
        self._bar = (tqdm(total=steps, initial=done, desc=title, unit="step", leave=False)
                     if shown and sys.stderr.isatty() else None)
        self._last = (done, time.perf_counter())

    def update(self, step: int, loss: float, lr: float) -> None:
        """Note that ``step``, counted in the run from 0, is done."""
        if not self._shown:
            return
        done = step - self._first + 1
        if self._bar is not None:
            rate = self._bar.format_dict["rate"] or 0
            self._bar.set_postfix_str(f"loss {loss:.4f} lr {lr:.5f} {rate * self._images_per_step:.1f} images/s", refresh=False)
            self._bar.update()
        elif done % self._interval == 0:
            before, since = self._last
            now = time.perf_counter()
            rate = (done - before) * self._images_per_step / max(now - since, 1e-9)
            self._log(f"{self._title} step {done}/{self._steps} loss {loss:.4f} lr {lr:.5f} {rate:.1f} images/s")
            self._last = (done, now)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
