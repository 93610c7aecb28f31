"""export.py: fusion and deployment files, as a user starts it."""

import pytest

from conftest import execute
from src.models.formats import read_weights


def export(*flags):
    return execute(["python3", "export.py", *flags])


def test_fused_checkpoint_evaluates_like_the_trained_one(trained_run, image_root, tmp_path):
    target = tmp_path / "fused.ckpt"
    run = export(f"--checkpoint_file_path={trained_run}/best.ckpt", f"--result_path={target}")
    assert run.status == 0 and "largest relative difference" in run.out, run
    arrays, metadata = read_weights(target)
    assert metadata["fused"] and not any("square_conv" in name for name in arrays)
    accuracy = [execute(["python3", "eval.py", f"--data_path={image_root}/val", f"--checkpoint_file_path={path}"])
                for path in (trained_run / "best.ckpt", target)]
    assert all(run.status == 0 for run in accuracy), accuracy
    acc = [run.out.partition(": ")[2].partition(" images")[0] for run in accuracy]
    assert acc[0] == acc[1] and "67" in acc[0]


@pytest.mark.slow
def test_mindir_is_checked_against_the_checkpoint(trained_run, tmp_path):
    target = tmp_path / "net.mindir"
    run = export(f"--checkpoint_file_path={trained_run}/best.ckpt", "--file_format=MINDIR", f"--result_path={target}")
    assert run.status == 0 and target.stat().st_size > 400_000, run


def test_wrong_checkpoint_or_folder_leaves_no_file(tmp_path, trained_run):
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    run = export(f"--checkpoint_file_path={tmp_path}/text.ckpt", f"--result_path={tmp_path}/out.ckpt")
    assert run.status == 2 and len(run.error_lines) == 1 and "not a MindSpore checkpoint" in run.error_lines[0], run
    run = export(f"--checkpoint_file_path={trained_run}/best.ckpt", f"--result_path={tmp_path}/text.ckpt/out.ckpt")
    assert run.status == 2 and len(run.error_lines) == 1 and "cannot write" in run.error_lines[0], run
    assert [file.name for file in tmp_path.iterdir()] == ["text.ckpt"]
