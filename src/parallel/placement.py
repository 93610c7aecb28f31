"""Which processor cores a rank runs on."""

import os

from src.utils.errors import UserError


def pin_to_own_cores(local_rank: int, local_size: int, threads: int = 0) -> None:
    """Give each rank of a machine its own cores if the launcher bound none: ranks that share cores wait for each other.

    Args:
        local_rank, local_size: this rank's number and the number of ranks on this machine.
        threads: number of cores to use; 0 for all that the rank may use.

    Raises:
        UserError: if the rank may use fewer.
    """
    cores = sorted(os.sched_getaffinity(0))
    if local_size > 1 and len(cores) >= (os.cpu_count() or 1):
        share = max(len(cores) // local_size, 1)
        first = (local_rank * share) % len(cores)
        cores = cores[first:first + share]
    if threads > len(cores):
        raise UserError(f"threads={threads} but a rank may use {len(cores)} cores here; ask for fewer threads or start fewer ranks")
    os.sched_setaffinity(0, cores[:threads or None])
