"""What a person sees of a long task."""

import io
import re
import sys
import time

from src.parallel.long_task import LongTask


def test_lines_with_the_time_left():
    lines = []
    with LongTask("packed", 40, "image", lines.append, line_s=0.05) as task:
        for _ in range(40):
            time.sleep(0.01)
            task.advance()
    assert 3 <= len(lines) <= 8
    shares = [int(re.fullmatch(r"packed (\d+) % of the images, \d+ s left", line)[1]) for line in lines]
    assert shares == sorted(set(shares)) and shares[-1] <= 100


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
