"""What surrounds an entry script: how it ends."""

import subprocess

import pytest
from conftest import ROOT, TINY, only_run, user_environment


def behind_closed_pipe(words):
    """(status, errors) of a command whose output nobody reads, as behind `| head` that has seen enough."""
    process = subprocess.Popen([str(word) for word in words], cwd=ROOT, env=user_environment(), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    errors = process.stderr.read()
    return process.wait(), errors


def test_a_table_that_nobody_reads_ends_in_silence():
    assert behind_closed_pipe(["python3", "benchmarks/scaling_model.py"]) == (141, "")


@pytest.mark.slow
def test_a_training_that_nobody_reads_goes_on(image_root, tmp_path):
    status, errors = behind_closed_pipe(["python3", "train.py", f"--data_path={image_root}/train", f"--output_path={tmp_path}", *TINY,
                                         "--max_steps=3", "--lr=0.02"])
    assert (status, errors) == (0, "")
    assert (only_run(tmp_path) / "ckpt_0" / "cifar_quick-1_3.ckpt").is_file()
    assert "results in" in (only_run(tmp_path) / "log.txt").read_text()
