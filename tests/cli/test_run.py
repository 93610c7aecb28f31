"""How commands start and end: streams, launched ranks, errors and exit status."""

import json
import os
import subprocess

import cv2
import numpy as np
import pytest
from conftest import ROOT, TINY, execute, mpirun, only_run, user_environment

from src.models.weight_files import read_weights


def behind_closed_pipe(words):
    """(status, errors) of a command whose reader has gone, as with `| head`."""
    process = subprocess.Popen(
        [str(word) for word in words],
        cwd=ROOT,
        env=user_environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    errors = process.stderr.read()
    return process.wait(), errors


def test_a_table_that_nobody_reads_ends_in_silence():
    assert behind_closed_pipe(["python3", "benchmarks/scaling_model.py"]) == (141, "")


@pytest.mark.slow
def test_a_training_that_nobody_reads_goes_on(image_root, tmp_path):
    status, errors = behind_closed_pipe(
        [
            "python3",
            "train.py",
            f"--data_path={image_root}/train",
            f"--output_path={tmp_path}",
            *TINY,
            "--max_steps=3",
            "--lr=0.02",
        ]
    )
    assert (status, errors) == (0, "")
    assert (only_run(tmp_path) / "ckpt_0" / "cifar_quick-1_3.ckpt").is_file()
    assert "results in" in (only_run(tmp_path) / "log.txt").read_text()


def test_without_any_standard_stream_a_training_is_whole(image_root, tmp_path):
    words = (
        f"python3 train.py --data_path={image_root}/train --output_path={tmp_path} "
        f"{' '.join(TINY)} --max_steps=2 --lr=0.02"
    )
    run = execute(["bash", "-c", f"exec {words} <&- >&- 2>&-"])
    assert run.status == 0, run
    folder = only_run(tmp_path)
    assert (folder / "ckpt_0" / "cifar_quick-1_2.ckpt").is_file() and "results in" in (
        folder / "log.txt"
    ).read_text()


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-"])
def test_a_closed_stream_changes_no_status(closed):
    assert execute(["bash", "-c", f"exec python3 train.py --lr=-1 {closed}"]).status == 2


def test_ranks_are_recommended_where_they_are_faster(image_root, tmp_path):
    words = [
        "python3",
        "train.py",
        f"--data_path={image_root}/train",
        f"--output_path={tmp_path}",
        *TINY,
        "--max_steps=1",
    ]
    for flags, said in (
        ("--kernels=mindspore", True),
        ("--kernels=auto", False),
        ("--kernels=mindspore --run_distribute=0", False),
    ):
        run = execute([*words, *flags.split()])
        assert run.status == 0 and ("--ranks=auto, one rank per core" in run.out) is (
            said and len(os.sched_getaffinity(0)) > 1
        ), run


STRANGE = ("$x^{", "two\nlines", "\u202etfel", "na\udcffme", "d\u00e9j\u00e0", "%s {0}", "-lr")


@pytest.mark.slow
def test_files_and_classes_may_have_any_name(tmp_path):
    """Trained, evaluated and predicted on a terminal that knows ASCII alone.

    JSON has the names as they are.
    """
    names = sorted(os.fsencode(name) for name in STRANGE)
    for number, name in enumerate(names):
        folder = os.path.join(os.fsencode(tmp_path), b"data", name)
        os.makedirs(folder)
        for index in range(3):
            with open(os.path.join(folder, name + b"%d.png" % index), "wb") as file:
                file.write(
                    cv2.imencode(".png", np.full((8, 8, 3), 30 * number, np.uint8))[1].tobytes()
                )
    ascii_only = {"PYTHONIOENCODING": "ascii:strict", "LC_ALL": "C"}
    common = [f"--data_path={tmp_path}/data", "--image_size=32", "--network=cifar_quick"]
    flags = [
        *common,
        f"--output_path={tmp_path}/out",
        "--per_batch_size=4",
        "--max_epoch=1",
        "--lr=0.01",
    ]
    trained = execute(["python3", "train.py", *flags], **ascii_only)
    assert trained.status == 0 and not trained.err, trained
    folder = only_run(tmp_path / "out")
    assert set(json.loads((folder / "class_indexing.json").read_text())) == set(STRANGE)
    weights = f"--checkpoint_file_path={folder}/latest.ckpt"
    evaluated = execute(
        ["python3", "eval.py", *common, weights, f"--result_path={tmp_path}/e.json"], **ascii_only
    )
    assert (
        evaluated.status == 0
        and evaluated.err == f"loading {folder}/latest.ckpt\n"
        and "21 images" in evaluated.out
    ), evaluated
    shown = execute(
        ["python3", "predict.py", weights, f"{tmp_path}/data", f"--save_figure={tmp_path}/s.png"],
        **ascii_only,
    )
    assert (
        shown.status == 0
        and shown.err == evaluated.err
        and "two\\nlines" in shown.out
        and "\\u202e" in shown.out
    ), shown
    assert len([line for line in shown.out.splitlines() if ".png  " in line]) == 21
    for form in ("csv", "jsonl"):
        written = execute(
            [
                "python3",
                "predict.py",
                weights,
                f"{tmp_path}/data",
                f"--result_path={tmp_path}/p.{form}",
            ],
            **ascii_only,
        )
        assert written.status == 0, written
    reported = execute(
        ["python3", "report.py", folder, f"--data_path={tmp_path}/data"], **ascii_only
    )
    assert reported.status == 0 and "na\\udcffme" in (folder / "report.html").read_text(), reported
    previewed = execute(
        ["python3", "scripts/preview_dataset.py", *common, f"--result_path={tmp_path}/v.png"],
        **ascii_only,
    )
    assert previewed.status == 0 and (tmp_path / "v.png").is_file(), previewed
    execute(
        ["python3", "predict.py", weights, f"{tmp_path}/data", f"--result_path={tmp_path}/p.json"],
        **ascii_only,
    )
    results = json.loads((tmp_path / "p.json").read_text())
    assert {os.path.basename(os.path.dirname(entry["image"])) for entry in results} == set(STRANGE)
    assert {entry["predictions"][0]["class"] for entry in results} <= set(STRANGE)


def test_no_room_at_the_start_names_the_file_and_leaves_no_half(image_root, tmp_path):
    """The limit on the size of a file stands for the disk: not even the configuration fits."""
    words = (
        f"python3 train.py --data_path={image_root}/train --output_path={tmp_path} {' '.join(TINY)}"
    )
    run = execute(["bash", "-c", f"ulimit -f 1; exec {words}"])
    assert (
        run.status == 2
        and len(run.error_lines) == 1
        and "config.yaml" in run.error_lines[0]
        and "Traceback" not in run.err
    ), run
    assert not [
        file for file in only_run(tmp_path).iterdir() if file.is_file() and file.stat().st_size
    ]


def test_no_room_for_a_result_leaves_none(tmp_path):
    code = (
        "import resource, sys; sys.path.insert(0, '.'); from src.inference.metrics import "
        "write_results; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); "
        f"write_results('{tmp_path}/r.json', [{{'top1': 1.5}}] * 20)"
    )
    run = execute(["python3", "-c", code])
    assert (
        "UserError: cannot write" in run.err
        and "r.json': File too large" in run.err
        and not list(tmp_path.iterdir())
    ), run


@pytest.mark.slow
@pytest.mark.parametrize("limit_kb", [300_000, 700_000, 1_167_360, 2_826_240])
def test_too_little_address_space_is_one_line(limit_kb, trained_run, image_root):
    """With the last two, MindSpore aborted with std::bad_alloc and by a segmentation fault."""
    words = f"predict.py --checkpoint_file_path={trained_run}/best.ckpt {image_root}/val/bee"
    run = execute(["bash", "-c", f"ulimit -v {limit_kb}; exec python3 {words}"])
    assert run.status == 2 and len(run.error_lines) == 1, run
    assert "free some" in run.error_lines[0] or "ulimit -v" in run.error_lines[0], run


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_ranks_start_by_themselves_and_keep_the_global_batch(image_root, tmp_path):
    common = (*TINY, f"--data_path={image_root}/train", "--max_epoch=2", "--lr=0.02", "--threads=1")
    by_itself = execute(
        ["python3", "train.py", *common, "--ranks=2", f"--output_path={tmp_path}/itself"]
    )
    by_mpirun = mpirun(
        2,
        "train.py",
        *common,
        "--run_distribute=1",
        "--global_batch_size=4",
        f"--output_path={tmp_path}/mpirun",
    )
    assert by_itself.status == 0 and by_mpirun.status == 0, (by_itself, by_mpirun)
    assert "on 2 x CPU: 48 images, 3 classes, 12 steps of 4 images" in by_itself.out, by_itself
    first, second = (
        read_weights(only_run(tmp_path / name) / "latest.ckpt")[0] for name in ("itself", "mpirun")
    )
    assert all(
        np.array_equal(first[name], second[name])
        for name in first
        if name not in ("metadata", "checksum")
    )


def test_ranks_that_cannot_be_started_are_one_line(tmp_path):
    for flags, words in (
        (["--ranks=auto", "--device_target=GPU"], "--ranks=8"),
        (["--ranks=2", "--run_distribute=0"], "run_distribute=0"),
        (["--ranks=-1"], "ranks=-1"),
        (["--ranks=100000"], "cores"),
        (["--ranks=two"], "valid integer"),
    ):
        run = execute(["python3", "train.py", *flags, f"--output_path={tmp_path}/out"])
        assert run.status == 2 and len(run.error_lines) == 1 and words in run.error_lines[0], run
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_commands_that_do_not_share_their_work_say_so_once(trained_run, image_root):
    command = [ROOT / "predict.py", f"--checkpoint_file_path={trained_run}/best.ckpt"]
    run = mpirun(2, *command, f"{image_root}/val/bee")
    words = "warning: predict.py does not share its work: each of the 2 processes"
    assert run.status == 0 and (run.out + run.err).count(words) == 1, run
