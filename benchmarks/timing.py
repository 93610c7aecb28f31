"""How the benchmarks time: medians, the first calls left out."""

import statistics
import time

WARMUP = 2


def median_seconds(action, repeats, before=lambda: None):
    """Median seconds of ``action()``, with ``before()`` called, untimed, ahead of each (a barrier, say)."""
    times = []
    for _ in range(WARMUP + repeats):
        before()
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return statistics.median(times[WARMUP:])
