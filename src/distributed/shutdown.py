"""How a process ends: signals, and one error line from one rank.

Imports nothing that starts threads (see ``Signals``).
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from src.utils.log import escaped

# A user error occurs on all ranks at about the same time. Rank 0 reports it, and when rank 0 ends,
# the others end too. Another rank reports an error only if rank 0 is still running after this time:
# then the error is that rank's own.
PATIENCE_S = 5.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def end_process(line: str, status: int, rank: int) -> None:
    """Print ``line`` on standard error, unless a lower rank does, and end this process at once."""
    sys.stdout.flush()
    if rank != 0:
        time.sleep(PATIENCE_S)
    sys.stderr.write(escaped(line.replace("\n", " ")) + "\n")
    sys.stderr.flush()
    # Not sys.exit: MPI's finalisation would wait for ranks that wait for this one.
    os._exit(status)


class Signals:
    """Receives SIGTERM, SIGINT and SIGUSR1 in a thread of its own.

    Python's own handlers wait for the main thread, which may be inside MPI for long, and MindSpore
    replaces the handler of SIGINT while a graph runs. Create it before any other thread, C++
    libraries' included: threads inherit that these signals are blocked.

    Args:
        end: called with the number of a signal, unless it is deferred; should not return.
    """

    def __init__(self, end: Callable[[int], object]) -> None:
        self.end = end
        self._handler: Callable[[int], object] | None = None
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        threading.Thread(target=self._listen, daemon=True, name="signals").start()

    def defer_to(self, handler: Callable[[int], object] | None) -> None:
        """From now on call ``handler(number)`` in the thread instead of ``end``; None undoes it."""
        self._handler = handler

    def _listen(self) -> None:
        while True:
            received = signal.sigwaitinfo(_SIGNALS)
            (self._handler or self.end)(received.si_signo)
