"""The end of a rank that goes wrong: one line, from one rank, and no rank left waiting."""

import os
import sys
import time

from src.utils.text import escaped

# A mistake in the command shows on every rank at about the same time. Rank 0 reports it and its end takes the others
# along; another rank speaks only if rank 0 did not, in which case the error is that rank's own.
PATIENCE_S = 5.0


def end_process(line: str, status: int, rank: int) -> None:
    """Print ``line`` on standard error, if no lower rank ends the job first, and end this process at once."""
    sys.stdout.flush()
    if rank != 0:
        time.sleep(PATIENCE_S)
    sys.stderr.write(escaped(line.replace("\n", " ")) + "\n")
    sys.stderr.flush()
    # Not sys.exit: MPI's own finalisation would wait for ranks that wait for this one.
    os._exit(status)
