"""How the benchmarks time: medians, the first calls left out."""

import statistics
import time

WARMUP = 2


def median_seconds(action, repeats, before=lambda: None):
    """Median seconds of ``action()``, with ``before()`` called, untimed.

    Ahead of each (a barrier, say).
    """
    times = []
    for _ in range(WARMUP + repeats):
        before()
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return statistics.median(times[WARMUP:])


def medians_in_turn(actions, repeats):
    """{name: median seconds} of {name: action}.

    Each action is called once per round, so that a noisy moment affects all of them.
    """
    times = {name: [] for name in actions}
    for _ in range(WARMUP + repeats):
        for name, action in actions.items():
            started = time.perf_counter()
            action()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(found[WARMUP:]) for name, found in times.items()}
