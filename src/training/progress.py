"""Progress on rank 0: a bar on a terminal, a line an interval elsewhere."""

import sys
import time

from tqdm import tqdm


class Progress:
    """Shows the steps of an epoch with loss, learning rate and images/s.

    Args:
        steps, done: the epoch's steps, and how many of them an earlier run did.
        log: called with a line of text where there is no terminal.
        shown: False on ranks that stay silent.
    """

    def __init__(self, title, steps, done, images_per_step, log, interval, shown):
        self._title, self._steps, self._images_per_step = title, steps, images_per_step
        self._log, self._interval, self._shown = log, interval, shown
        self._bar = (tqdm(total=steps, initial=done, desc=title, unit="step", leave=False)
                     if shown and sys.stderr.isatty() else None)
        self._last = (done, time.perf_counter())

    def update(self, step, loss, lr):
        """Tell that ``step`` (from 1) of the epoch is done."""
        if not self._shown:
            return
        if self._bar is not None:
            rate = self._bar.format_dict["rate"] or 0
            self._bar.set_postfix_str(f"loss {loss:.4f} lr {lr:.5f} {rate * self._images_per_step:.1f} images/s", refresh=False)
            self._bar.update()
        elif step % self._interval == 0:
            before, since = self._last
            now = time.perf_counter()
            rate = (step - before) * self._images_per_step / max(now - since, 1e-9)
            self._log(f"{self._title} step {step}/{self._steps} loss {loss:.4f} lr {lr:.5f} {rate:.1f} images/s")
            self._last = (step, now)

    def close(self):
        if self._bar is not None:
            self._bar.close()
