"""Which processor cores a rank runs on."""

import os


def pin_to_own_cores(local_rank: int, local_size: int) -> None:
    """Give each rank of a machine its own cores if the launcher bound none: ranks that share cores wait for each other.

    Args:
        local_rank, local_size: this rank's number and the number of ranks on this machine.
    """
    cores = sorted(os.sched_getaffinity(0))
    if local_size == 1 or len(cores) < (os.cpu_count() or 1):
        return
    share = max(len(cores) // local_size, 1)
    first = (local_rank * share) % len(cores)
    os.sched_setaffinity(0, cores[first:first + share])
