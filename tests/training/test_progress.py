"""Progress where there is no terminal: at once, and at intervals of time even while a step lasts."""

import time

from src.training.progress import Progress


def lines_of(steps, interval, line_s=60.0, shown=True):
    lines = []
    with Progress(8, lines.append, interval, shown, line_s) as progress:
        progress.begin_epoch("epoch 1/2", 0, len(steps), 0)
        for number, seconds in enumerate(steps):
            time.sleep(seconds)
            progress.update(number, 0.5, 0.1)
        progress.end_epoch()
    return lines


def test_the_first_step_has_a_line_and_then_every_interval():
    lines = lines_of([0] * 10, interval=4)
    assert [line.split(" loss")[0] for line in lines] == [f"epoch 1/2 step {step}/10" for step in (1, 4, 8)]
    assert "loss 0.5000 lr 0.10000" in lines[0] and lines[0].endswith("images/s")


def test_there_is_a_line_after_so_many_seconds_whatever_the_interval():
    begun = time.monotonic()
    lines = lines_of([0.02] * 40, interval=1000, line_s=0.2)
    assert 3 <= len(lines) <= 1 + (time.monotonic() - begun) / 0.2


def test_a_long_step_is_reported_while_it_lasts():
    begun = time.monotonic()
    lines = lines_of([0, 1.5], interval=1000, line_s=0.2)
    waiting = [line for line in lines if "in the next" in line]
    assert 2 <= len(waiting) <= (time.monotonic() - begun) / 0.2 and waiting[0].startswith("epoch 1/2 step 1/2 done, ")


def test_ranks_that_stay_silent_are_silent():
    assert lines_of([0, 0.3], interval=1, line_s=0.1, shown=False) == []
