"""Log of a run: to the screen and to log.txt on rank 0, warnings of other ranks to standard error."""

import logging
import sys


class _Screen(logging.StreamHandler):
    """Goes on in silence where nobody reads any more (`| head`): the run itself and its log.txt do too."""

    def handleError(self, record):
        if not isinstance(sys.exc_info()[1], BrokenPipeError):
            super().handleError(record)


def create_logger(rank, file=None):
    """A logger of this rank. Rank 0 writes messages as they are to standard output and, with the time, to ``file``."""
    logger = logging.getLogger(f"run.{rank}")
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
    logger.handlers.clear()
    screen = _Screen(sys.stdout if rank == 0 else sys.stderr)
    screen.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"rank {rank}: %(message)s"))
    logger.addHandler(screen)
    if file is not None:
        to_file = logging.FileHandler(file, encoding="utf-8")
        to_file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        logger.addHandler(to_file)
    return logger
