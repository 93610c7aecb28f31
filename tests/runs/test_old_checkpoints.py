"""Checkpoints of earlier versions evaluate and resume.

tests/data/version_2026_11 is a run of commit e73ae9b, stopped after 30 of 90 steps:

    python3 train.py --config_path=digits --block=base --image_size=16 --max_epoch=2 --max_steps=30
        --kernels=mindspore --compile_cache=0 --output_path=tests/data/version_2026_11

The figures below are what that commit printed for the checkpoint, and for the run that it resumed.
"""

import json
import shutil

import pytest
from conftest import ROOT, execute

RUN = "2026-11-28_time_14_17_40"


@pytest.fixture
def old_run(tmp_path):
    shutil.copytree(ROOT / "tests/data/version_2026_11", tmp_path / "out")
    return tmp_path / "out" / RUN


def test_an_old_checkpoint_evaluates(old_run):
    run = execute(
        [
            "python3",
            "eval.py",
            "--data_path=digits",
            f"--checkpoint_file_path={old_run}/ckpt_0/cifar_quick-1_30.ckpt",
            "--kernels=mindspore",
        ]
    )
    assert run.status == 0 and "acc=36.06%(TOP1) acc=84.23%(TOP5)" in run.out, run


def test_an_old_run_resumes(old_run):
    run = execute(
        [
            "python3",
            "train.py",
            "--config_path=digits",
            "--block=base",
            "--image_size=16",
            "--max_epoch=2",
            "--resume=auto",
            "--kernels=mindspore",
            f"--output_path={old_run.parent}",
        ]
    )
    assert run.status == 0, run
    lines = [json.loads(line) for line in (old_run / "metrics.jsonl").read_text().splitlines()]
    # The first 15 steps after the resume end its first epoch.
    assert [line["step"] for line in lines[-2:]] == [45, 90]
    assert lines[-2]["loss"] == pytest.approx(2.094166, abs=2e-5)
    assert lines[-1]["loss"] == pytest.approx(0.939554, abs=2e-3)
    assert lines[-1]["top1"] == pytest.approx(84.7887, abs=1.5)
