"""scripts/train.sbatch on a cluster of two nodes with SLURM's own daemons."""

import json
import time

import numpy as np
import pytest
from conftest import ROOT, TINY, only_run, user_environment
from hosts import slurm
from hosts.rig import Rig, missing

from src.models.weight_files import read_weights

REASON = missing() or slurm.missing()
pytestmark = [pytest.mark.extended, pytest.mark.skipif(REASON is not None, reason=str(REASON))]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    with (
        Rig(tmp_path_factory.mktemp("rig"), 2) as rig,
        slurm.Slurm(rig, ["h1", "h2"], folder, cpus=2) as cluster,
    ):
        yield cluster


def submit(cluster, folder, launch, *arguments):
    """Number of a job of scripts/train.sbatch with one rank on each node.

    Its log is ``folder``/log.
    """
    environment = {
        name: value
        for name, value in user_environment().items()
        if name.startswith(("PATH", "OMPI_", "XDG_"))
    }
    run = cluster.run(
        "sbatch",
        "--parsable",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--time=10:00",
        f"--output={folder}/log",
        "scripts/train.sbatch",
        *TINY,
        "--threads=1",
        "--lr=0.02",
        f"--output_path={folder}/out",
        *arguments,
        cwd=ROOT,
        LAUNCH=launch,
        **environment,
    )
    assert run.returncode == 0, run
    return run.stdout.strip()


def wait_for(condition, log, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "no log"
        time.sleep(0.3)


def said(log, text):
    return lambda: log.exists() and text in log.read_text()


@pytest.mark.parametrize("launch", ["srun", "mpirun"])
def test_a_job_that_is_told_to_stop_is_queued_again_and_ends_with_the_bits_of_one_that_is_not(
    cluster, image_root, tmp_path, launch
):
    weights = []
    for name, stops in (("whole", False), ("stopped", True)):
        folder = tmp_path / name
        folder.mkdir()
        log = folder / "log"
        job = submit(
            cluster,
            folder,
            launch,
            f"--data_path={image_root}/train",
            "--max_epoch=60",
            "--ckpt_interval=50",
        )
        if stops:
            wait_for(said(log, "epoch 2/60 loss"), log)
            # As SLURM does a minute before the time limit.
            assert cluster.run("scancel", "--signal=USR1", "--batch", job).returncode == 0
            wait_for(said(log, "queued again, to continue from the newest checkpoint"), log)
            # In place of the two minutes that it gives the nodes to clean up.
            wait_for(
                lambda number=job: (
                    cluster.run(
                        "scontrol", "update", f"JobId={number}", "StartTime=now+15"
                    ).returncode
                    == 0
                ),
                log,
            )
        wait_for(said(log, "results in "), log)
        wait_for(lambda: not cluster.run("squeue", "-h").stdout.strip(), log)
        text = log.read_text()
        assert "on 2 x CPU (h1: 1, h2: 1)" in text and ("resuming from" in text) == stops, text
        lines = [
            json.loads(line)
            for line in (only_run(folder / "out") / "metrics.jsonl").read_text().splitlines()
        ]
        assert [line["epoch"] for line in lines] == list(range(1, 61))
        weights.append(read_weights(only_run(folder / "out") / "latest.ckpt")[0])
    assert all(
        np.array_equal(weights[0][name], weights[1][name])
        for name in weights[0]
        if name not in ("metadata", "checksum")
    )
