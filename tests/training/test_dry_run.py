"""--dry_run=1."""

import re

import pytest
from conftest import TINY, execute, mpirun


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_dry_run_says_what_the_run_would_take_and_writes_nothing(image_root, tmp_path, ranks):
    words = [
        "train.py",
        f"--data_path={image_root}/train",
        f"--output_path={tmp_path}/out",
        *TINY,
        "--run_eval=1",
        "--max_epoch=5",
        "--dry_run=1",
    ]
    run = (
        execute(["python3", *words], XDG_CACHE_HOME=str(tmp_path / "cache"))
        if ranks == 1
        else mpirun(ranks, *words)
    )
    assert run.status == 0, run
    reading, memory, seconds, whole = run.out.splitlines()[-4:]
    found = re.fullmatch(
        r"input: ([\d.]+) images/s if nothing else runs; it takes (\d+) % of a step", reading
    )
    assert float(found[1]) > 0 and 0 <= int(found[2]) < 100, run
    assert re.fullmatch(
        rf"memory: 0\.\d+ GiB in the largest of {ranks} ranks, [\d.]+ GiB are still free", memory
    ), run
    assert re.fullmatch(
        r"time: [\d.]+ s for the first step, which compiles, then [\d.]+ s per step, [\d.]+ "
        r"images/s; "
        r"[\d.]+ s per evaluation",
        seconds,
    ), run
    assert re.fullmatch(
        rf"the whole run: about .+ for 5 epochs of {12 // ranks} steps and 5 evaluations, "
        "plus checkpoints; nothing was written",
        whole,
    ), run
    assert not list(tmp_path.iterdir())
