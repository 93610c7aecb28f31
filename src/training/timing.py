"""Timing of training: images per second, per-rank times, and the rank the others wait for."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

# Report a slow rank if it costs the others this fraction of their time, and this many seconds.
_FRACTION, _SECONDS = 0.10, 1.0
# Report waiting for images if it takes this fraction of the time, and _SECONDS per rank.
_SLOW_INPUT = 0.25


class RankTimes(NamedTuple):
    """Seconds of a rank over the steps of an epoch.

    Attributes:
        input: for the next batch.
        compute: for forward and backward passes and updates.
        waiting: for other ranks and the network.
    """

    input: float = 0.0
    compute: float = 0.0
    waiting: float = 0.0

    def plus(self, input: float, compute: float, waiting: float) -> "RankTimes":
        return RankTimes(self.input + input, self.compute + compute, self.waiting + waiting)

    @property
    def own(self) -> float:
        """Seconds without waiting for other ranks."""
        return self.input + self.compute


def slowest_rank_message(times: Sequence[RankTimes], hosts: Sequence[str]) -> str | None:
    """A message on the slowest rank, if it is slower than the median by 10 % and by a second.

    Args:
        times, hosts: one per rank.
    """
    rank = max(range(len(times)), key=lambda index: times[index].own)
    median = statistics.median_low(rank_times.own for rank_times in times)
    excess = times[rank].own - median
    if excess <= _SECONDS or excess <= _FRACTION * median:
        return None
    median_input = statistics.median_low(rank_times.input for rank_times in times)
    part = "input" if times[rank].input - median_input > excess / 2 else "compute"
    percent = 100 * excess / median
    return f"rank {rank} on {hosts[rank]} is {percent:.0f} % slower than the median: {part}"


def slow_input_message(times: Sequence[RankTimes]) -> str | None:
    """A message if the ranks spend a large fraction of the time waiting for images.

    Args:
        times: one per rank.
    """
    waiting, total = sum(rank.input for rank in times), sum(sum(rank) for rank in times)
    if waiting <= _SLOW_INPUT * total or waiting <= _SECONDS * len(times):
        return None
    return (
        f"waiting for images takes {100 * waiting / total:.0f} % of the time; "
        "scripts/pack_dataset.py --short_side shrinks large files once and for all"
    )


class StepRates:
    """Images per second over the steps that are timed."""

    def __init__(self, images_per_step: int) -> None:
        self._images = images_per_step
        self._seconds: list[float] = []
        self._reported = 0

    def add_step(self, seconds: float) -> None:
        self._seconds.append(seconds)

    def total(self) -> float:
        """The rate over all steps."""
        return self._rate(self._seconds)

    def since_last(self) -> float:
        """The rate over the steps since the last call."""
        recent, self._reported = self._seconds[self._reported :], len(self._seconds)
        return self._rate(recent)

    def _rate(self, seconds: Sequence[float]) -> float:
        return len(seconds) * self._images / sum(seconds) if seconds else 0.0
