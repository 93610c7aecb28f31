"""Progress of training and of long tasks: a bar in a terminal, otherwise lines."""

import io
import sys
import time

from src.utils import progress
from src.utils.log import no_log
from src.utils.progress import ProgressBar, TrainingProgress


def lines_of(steps, interval, line_s=60.0, shown=True):
    lines = []
    with TrainingProgress(
        8, lines.append if shown else no_log, interval, False, line_s
    ) as progress_lines:
        progress_lines.begin_epoch("epoch 1/2", 0, len(steps), 0)
        for number, seconds in enumerate(steps):
            time.sleep(seconds)
            progress_lines.update(number, 0.5, 0.1)
        progress_lines.end_epoch()
    return lines


def test_the_first_step_has_a_line_and_then_every_interval():
    lines = lines_of([0] * 10, interval=4)
    assert [line.split(" loss")[0] for line in lines] == [
        f"epoch 1/2 step {step}/10" for step in (1, 4, 8)
    ]
    assert "loss 0.5000 lr 0.10000" in lines[0] and lines[0].endswith("images/s")


def test_there_is_a_line_after_so_many_seconds_whatever_the_interval():
    begun = time.monotonic()
    lines = lines_of([0.02] * 40, interval=1000, line_s=0.2)
    assert 3 <= len(lines) <= 1 + (time.monotonic() - begun) / 0.2


def test_a_long_step_is_reported_while_it_lasts():
    begun = time.monotonic()
    lines = lines_of([0, 1.5], interval=1000, line_s=0.2)
    waiting = [line for line in lines if "next step running" in line]
    assert 2 <= len(waiting) <= (time.monotonic() - begun) / 0.2 and waiting[0].startswith(
        "epoch 1/2 step 1/2 (next step running for "
    )


def test_ranks_that_stay_silent_are_silent():
    assert lines_of([0, 0.3], interval=1, line_s=0.1, shown=False) == []


def test_lines_with_the_time_left(monkeypatch):
    now, lines = [0.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with ProgressBar("packed", 40, "image", lines.append, line_s=30.0) as task:
        for _ in range(40):
            now[0] += 4
            task.advance()
    # Every 32 s, the first multiple of 4 beyond 30.
    told = ((20, 128), (40, 96), (60, 64), (80, 32), (100, 0))
    assert lines == [f"packed {share} % of the images, {left} s left" for share, left in told]


def test_a_short_task_says_nothing():
    lines = []
    with ProgressBar("packed", 2, "image", lines.append) as task:
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
    with ProgressBar("classified", 3, "image", lines.append, line_s=0) as task:
        for _ in range(3):
            task.advance()
    assert "classified" in screen.getvalue() and "0/3" in screen.getvalue() and not lines
