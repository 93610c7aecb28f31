"""A run that was killed and resumed ends as the run that was not: the same bits."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from conftest import ROOT, TINY, execute, mpirun, only_run
from src.models.formats import read_weights

# Batch norm, momentum, augmentation, evaluation: all that has state.
FLAGS = (*TINY, "--block=acb", "--max_epoch=3", "--run_eval=1", "--ckpt_interval_steps=5", "--keep_checkpoint_max=100",
         "--global_batch_size=4", "--lr=0.02")


def command(ranks, image_root, output, *more):
    words = ["train.py", f"--data_path={image_root}/train", f"--output_path={output}", *FLAGS, *more]
    return ["python3", *words] if ranks == 1 else ["mpirun", "--map-by", ":OVERSUBSCRIBE", "-n", str(ranks), "python3", *words]


def kill_when(words, condition):
    """Start ``words``, kill -9 its whole group when ``condition()`` holds."""
    folder = os.path.dirname(sys.executable)
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert process.poll() is None, "it ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def outcome(output):
    """(arrays of the last checkpoint, metrics without rates)."""
    folder = only_run(output)
    arrays, metadata = read_weights(folder / "ckpt_0" / "cifar_quick-3_12.ckpt")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return arrays, metadata, [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("ranks,first_kill", [(1, "cifar_quick-1_5.ckpt"), (1, "cifar_quick-2_3.ckpt"), (2, "cifar_quick-1_10.ckpt")])
def test_killed_and_resumed_run_ends_with_the_same_bits(image_root, tmp_path, ranks, first_kill):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run = execute(command(ranks, image_root, whole))
    assert run.status == 0, run
    kill_when(command(ranks, image_root, killed), lambda: any(killed.glob(f"*/ckpt_0/{first_kill}")))
    run = execute(command(ranks, image_root, killed, "--resume=auto"))
    assert run.status == 0 and "going on from" in run.out, run
    (expected, told, metrics), (arrays, resumed, resumed_metrics) = outcome(whole), outcome(killed)
    assert set(arrays) == set(expected) and any(name.startswith("momentum.") for name in arrays)
    for name, value in expected.items():
        assert np.array_equal(arrays[name], value), name
    assert resumed_metrics == metrics and [line["epoch"] for line in metrics] == [1, 2, 3]
    assert resumed["best_top1"] == told["best_top1"]


@pytest.mark.slow
def test_resuming_elsewhere_or_otherwise(image_root, tmp_path):
    run = execute(command(1, image_root, tmp_path / "out", "--max_steps=15"))
    assert run.status == 0, run
    refused = execute(command(1, image_root, tmp_path / "out", "--resume=auto", "--lr=0.3"))
    assert refused.status == 2 and "lr=0.02 there and 0.3 here" in refused.error_lines[0], refused
    refused = execute(command(1, image_root, tmp_path / "out", "--resume=auto", "--global_batch_size=8"))
    assert refused.status == 2 and "steps an epoch" in refused.error_lines[0], refused
    refused = execute(command(1, image_root, tmp_path / "none", "--resume=auto"))
    assert refused.status == 2 and "finds no checkpoint" in refused.error_lines[0], refused
    run = mpirun(2, *command(1, image_root, tmp_path / "out", "--resume=auto")[1:])
    assert run.status == 0 and "it ran on 1 ranks and goes on with 2" in run.out, run
    lines = (only_run(tmp_path / "out") / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [12, 15, 24, 36]
