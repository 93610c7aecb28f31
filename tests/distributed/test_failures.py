"""Ranks that die, stop or are told to stop: the job ends, says why, and leaves nothing behind."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
from conftest import TINY, mpirun_words, only_run

from src.models.weight_files import read_weights

pytestmark = pytest.mark.slow


two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")


@pytest.fixture
def training(image_root, tmp_path, start):
    """training(ranks, launcher words or None) -> a long run, after some steps."""

    def begin(ranks, words=None, *more):
        script = (
            "train.py",
            f"--data_path={image_root}/train",
            f"--output_path={tmp_path}/run",
            *TINY,
            "--max_epoch=1000",
            "--lr=0.01",
            "--log_interval=1",
            "--ckpt_interval=1000",
            *more,
        )
        started = start([*words, *script] if words else mpirun_words(ranks, *script))
        started.wait_for_text("step 3/")
        return started

    return begin


def shared_memory(pids):
    """The files through which these ranks talk."""
    maps = [Path(f"/proc/{pid}/maps").read_text() for pid in pids]
    return {file for text in maps for file in re.findall(r"/dev/shm/\S*sm_segment\S+", text)}


def assert_gone(pids):
    assert not [
        pid
        for pid in pids
        if Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_text()
    ]


@pytest.mark.parametrize("victim", [0, 2])
def test_kill_9_of_any_rank_ends_all(training, victim):
    started = training(3)
    ranks = started.ranks()
    shared = shared_memory(ranks)
    os.kill(ranks[victim], signal.SIGKILL)
    run, seconds = started.finish(30)
    assert run.status == 137 and f"rank {victim} " in run.err, run
    assert_gone(ranks)
    assert len(shared) == 3 and not any(os.path.exists(file) for file in shared)


def test_a_rank_that_makes_no_progress_is_named(training):
    # Longer than ranks that share busy cores wait for the last of them to compile.
    started = training(3, None, "--stall_timeout_s=15")
    ranks = started.ranks()
    os.kill(ranks[1], signal.SIGSTOP)
    run, seconds = started.finish(15 + 30)
    assert run.status == 1 and len(run.error_lines) == 1, run
    assert (
        f"rank 1 (process {ranks[1]} " in run.error_lines[0]
        and "stall_timeout_s=15 s" in run.error_lines[0]
    )
    assert_gone(ranks)


RANKS_BY_ITSELF = ["python3"], "--ranks=2", "--threads=1"


@pytest.mark.parametrize(
    "number,launcher,status",
    [
        pytest.param(signal.SIGTERM, RANKS_BY_ITSELF, 143, marks=[two_cores, pytest.mark.extended]),
        pytest.param(signal.SIGINT, RANKS_BY_ITSELF, 130, marks=[two_cores, pytest.mark.extended]),
        (signal.SIGTERM, ["python3"], 143),
        (signal.SIGINT, ["python3"], 130),
        (signal.SIGINT, ["python3", "scripts/launch.py", "--nproc_per_node=2"], 130),
        (signal.SIGUSR1, ["python3", "scripts/launch.py", "--nproc_per_node=2"], 138),
        (signal.SIGTERM, None, 1),
        (signal.SIGUSR1, None, 138),
    ],
)
def test_told_to_stop_it_finishes_the_step_and_saves(training, tmp_path, number, launcher, status):
    """mpirun itself (None) reports its own status, 1, after SIGTERM."""
    words, *more = launcher if isinstance(launcher, tuple) else (launcher,)
    started = training(2, words, *more)
    started.process.send_signal(number)
    run, seconds = started.finish(30)
    assert run.status == status and not run.error_lines, run
    folder = only_run(tmp_path / "run")
    log = (folder / "log.txt").read_text()
    assert "which is saved; continue with the same command and --resume=auto" in log
    # The signal that was sent, as far as mpirun lets a rank know it.
    assert f"stopped by {number.name} after step" in log
    if launcher != ["python3"]:
        assert (
            "told to stop (" in run.out
            and "which is saved; continue with the same command and --resume=auto" in run.out
        ), run
    assert read_weights(folder / "latest.ckpt")[1]["step"] >= 3


def test_a_second_ctrl_c_ends_a_long_step_at_once(image_root, tmp_path, start):
    started = start(
        [
            "python3",
            "train.py",
            f"--data_path={image_root}/train",
            f"--output_path={tmp_path}/run",
            *TINY,
            "--network=alexnet",
            "--image_size=64",
            "--per_batch_size=1",
            "--accumulation_steps=48",
            "--max_epoch=1000",
        ]
    )
    started.wait_for_text(" steps of ")
    time.sleep(0.5)
    started.process.send_signal(signal.SIGINT)
    started.wait_for(lambda: "Ctrl-C again" in started.errors())
    started.process.send_signal(signal.SIGINT)
    run, seconds = started.finish(10)
    assert run.status == 130 and run.error_lines == ["error: interrupted"], run
    assert not list((only_run(tmp_path / "run") / "ckpt_0").glob("*.ckpt"))


def test_no_rank_listens_beyond_loopback(training):
    started = training(2)
    inodes = {
        os.readlink(link).strip("socket:[]")
        for rank in started.ranks()
        for link in Path(f"/proc/{rank}/fd").iterdir()
        if os.readlink(link).startswith("socket:")
    }
    for table, loopback in (("tcp", "0100007F"), ("tcp6", "0" * 24 + "01000000")):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            listens = fields[3] == "0A"
            assert not (listens and fields[9] in inodes) or fields[1].startswith(loopback), line


@pytest.mark.extended
@pytest.mark.parametrize("delay", [0.05, 0.2, 0.3, 0.35, 0.4, 0.5, 0.8, 1.5])
def test_launch_py_always_ends_when_it_is_told_to_early(image_root, tmp_path, start, delay):
    started = start(
        [
            "python3",
            "scripts/launch.py",
            "--nproc_per_node=2",
            "train.py",
            f"--data_path={image_root}/train",
            f"--output_path={tmp_path}/run",
            *TINY,
            "--max_epoch=1000",
        ]
    )
    time.sleep(delay)
    started.process.send_signal(signal.SIGTERM)
    run, seconds = started.finish(60)
    assert run.status in (143, -15) and "Traceback" not in run.err, run
    left = [
        line
        for line in os.popen("ps -eo pid,args").read().splitlines()
        if str(tmp_path) in line and "ps -eo" not in line
    ]
    assert not left, left
