"""How the benchmarks start processes of their own."""

import os
import subprocess
import sys

from src.utils.errors import UserError


def mpirun_words(ranks, *words):
    """The command line of a Python script on ``ranks`` ranks, more than cores if need be."""
    return [
        "mpirun",
        "--map-by",
        ":OVERSUBSCRIBE",
        "--bind-to",
        "none",
        "-n",
        str(ranks),
        sys.executable,
        *map(str, words),
    ]


def mpirun_environment():
    """This environment, with what Open MPI asks of root."""
    return {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def last_line(words):
    """The last line that the command ``words`` prints. Raises UserError if it fails."""
    finished = subprocess.run(words, stdout=subprocess.PIPE, text=True, env=mpirun_environment())
    if finished.returncode or not finished.stdout.strip():
        raise UserError(
            f"'{' '.join(words)}' ended with status {finished.returncode}; its error is above"
        )
    return finished.stdout.splitlines()[-1]


def take_cores(ranks):
    """Bind this rank of ``ranks`` to its share of the cores.

    Returns:
        (rank, number of its cores).
    """
    rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", "0"))
    cores = sorted(os.sched_getaffinity(0))
    share = max(len(cores) // ranks, 1)
    os.sched_setaffinity(0, cores[rank * share % len(cores) :][:share])
    return rank, share
