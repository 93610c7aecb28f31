"""What a person sees of a long task."""

import io
import sys

from src.parallel import long_task
from src.parallel.long_task import LongTask


def test_lines_with_the_time_left(monkeypatch):
    now, lines = [0.0], []
    monkeypatch.setattr(long_task.time, "monotonic", lambda: now[0])
    with LongTask("packed", 40, "image", lines.append) as task:
        for _ in range(40):
            now[0] += 4
            task.advance()
    # Every 32 s, the first multiple of 4 beyond 30.
    told = ((20, 128), (40, 96), (60, 64), (80, 32), (100, 0))
    assert lines == [f"packed {share} % of the images, {left} s left" for share, left in told]


def test_a_short_task_says_nothing():
    lines = []
    with LongTask("packed", 2, "image", lines.append) as task:
        task.advance(2)
    assert not lines


def test_a_terminal_has_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS", "PMIX_RANK"):
        monkeypatch.delenv(name, raising=False)
    screen, lines = Terminal(), []
    monkeypatch.setattr(sys, "stderr", screen)
    with LongTask("classified", 3, "image", lines.append, line_s=0) as task:
        for _ in range(3):
            task.advance()
    assert "classified" in screen.getvalue() and "0/3" in screen.getvalue() and not lines
