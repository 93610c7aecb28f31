"""Where the time of each rank goes, and which rank the others wait for."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

# What a slow rank must cost the others, as a share of their time and in seconds, before anything is said.
_SHARE, _SECONDS = 0.10, 1.0


class RankTimes(NamedTuple):
    """Seconds of a rank over the steps of an epoch: for the next batch, for computing, and for other ranks and the network."""

    input: float = 0.0
    compute: float = 0.0
    waiting: float = 0.0

    def plus(self, input: float, compute: float, waiting: float) -> "RankTimes":
        return RankTimes(self.input + input, self.compute + compute, self.waiting + waiting)

    @property
    def own(self) -> float:
        """What this rank took, without waiting for others."""
        return self.input + self.compute


def slowest_line(times: Sequence[RankTimes], hosts: Sequence[str]) -> str | None:
    """Which rank is slower than the median by how much, and in what; None if none is by more than a tenth and a second.

    Args:
        times, hosts: of each rank.
    """
    rank = max(range(len(times)), key=lambda number: times[number].own)
    median = statistics.median_low(of_rank.own for of_rank in times)
    excess = times[rank].own - median
    if excess <= _SECONDS or excess <= _SHARE * median:
        return None
    in_input = times[rank].input - statistics.median_low(of_rank.input for of_rank in times)
    part = "input" if in_input > excess / 2 else "compute"
    return f"rank {rank} on {hosts[rank]} is {100 * excess / median:.0f} % slower than the median: {part}"
