"""Signals that end a process, received by a thread: at once, or when the work says it is ready."""

import signal
import threading
from collections.abc import Callable

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Signals:
    """Receives SIGTERM, SIGINT and SIGUSR1 instead of every other thread, this process's C++ libraries included.

    Python's own handlers wait for the main thread, which may be inside MPI for long; MindSpore replaces the handler of
    SIGINT while a graph runs. Make it before other threads are started: they inherit that these signals are blocked.

    Args:
        end: called with the number of a signal that nobody defers; should not return.
    """

    def __init__(self, end: Callable[[int], object]) -> None:
        self.end = end
        self._note: Callable[[int], object] | None = None
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        threading.Thread(target=self._listen, daemon=True, name="signals").start()

    def defer_to(self, note: Callable[[int], object] | None) -> None:
        """From now on call ``note(number)``, in the thread, instead of ``end``; None undoes it."""
        self._note = note

    def _listen(self) -> None:
        while True:
            received = signal.sigwaitinfo(ENDING)
            (self._note or self.end)(received.si_signo)

