"""Which rank the others wait for."""

import json
import os
import subprocess
import sys

import pytest
from conftest import TINY, mpirun, only_run

from src.training.timing import RankTimes, slow_input_message, slowest_rank_message


@pytest.mark.parametrize(
    "times,line",
    [
        (
            [(1, 20, 9), (1, 20, 9), (1, 20, 9), (1, 25, 4)],
            "rank 3 on d is 24 % slower than the median: compute",
        ),
        ([(2, 20, 14), (14, 20, 2)], "rank 1 on b is 55 % slower than the median: input"),
        ([(1, 20, 2), (1, 22, 0)], None),
        ([(0.1, 1, 1), (0.1, 1.9, 0)], None),
        ([(5, 5, 0)], None),
    ],
)
def test_a_rank_that_costs_a_tenth_and_a_second_is_named(times, line):
    assert slowest_rank_message([RankTimes(*of_rank) for of_rank in times], "abcd") == line


@pytest.mark.parametrize(
    "times,words",
    [
        ([(30, 30, 0), (20, 30, 10)], "waiting for images takes 42 % of the time"),
        ([(2, 18, 0), (2, 18, 0)], None),
        ([(0.5, 0.5, 0)], None),
    ],
)
def test_slow_input_is_said_with_what_to_do(times, words):
    line = slow_input_message([RankTimes(*of_rank) for of_rank in times])
    assert (line is None) if words is None else line.startswith(words)
    assert words is None or "pack_dataset.py" in line


@pytest.mark.extended
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_a_rank_whose_core_has_other_work_is_named_and_recorded(image_root, tmp_path):
    core = sorted(os.sched_getaffinity(0))[1]
    # Several, because other tests may keep the other rank's core busy, too.
    others = [
        subprocess.Popen(["taskset", "-c", str(core), sys.executable, "-c", "while True: pass"])
        for _ in range(4)
    ]
    try:
        run = mpirun(
            2,
            "train.py",
            f"--data_path={image_root}/train",
            f"--output_path={tmp_path}",
            *TINY,
            "--network=resnet50",
            "--image_size=128",
            "--max_epoch=2",
        )
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert (
        run.status == 0 and "rank 1 on " in run.out and "slower than the median: compute" in run.out
    ), run
    last = json.loads((only_run(tmp_path) / "metrics.jsonl").read_text().splitlines()[-1])
    (_, compute, waiting), (_, compute_of_slow, waiting_of_slow) = last["rank_seconds"]
    assert compute_of_slow > 1.1 * compute and waiting > waiting_of_slow, last
