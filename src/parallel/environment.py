"""What a launcher (mpirun, or srun with PMIx) says to a process through its environment, known before MPI starts."""

import os
from collections.abc import Sequence

_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")
_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")


def launched_ranks() -> int:
    """Number of processes that were started together; 1 without a launcher."""
    sizes = _SIZES + (("SLURM_NTASKS",) if "SLURM_STEP_ID" in os.environ and "PMIX_RANK" in os.environ else ())
    return _first_number(sizes, 1)


def launched_rank() -> int:
    """This process's number among them; 0 without a launcher."""
    return _first_number(_RANKS, 0)


def on_one_machine() -> bool:
    """True if the launcher says that all processes are on this machine."""
    return _first_number(("OMPI_COMM_WORLD_LOCAL_SIZE",), 0) == launched_ranks()


def started_by_mpirun() -> bool:
    """True under a launcher, even of a single process."""
    return any(name in os.environ for name in (*_SIZES, "PMIX_RANK"))


def _first_number(names: Sequence[str], default: int) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), default)
