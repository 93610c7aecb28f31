"""Counting, and evaluation by the command."""

import json
import re
import shutil
import time

import numpy as np
import pytest
from conftest import execute, make_config, mpirun
from mindspore import Parameter, Tensor

from src.dataset.image_set import ImageSet
from src.dataset.sources import open_images
from src.distributed.communicator import Communicator
from src.inference import backends
from src.inference.evaluation import (
    EvalResult,
    Evaluator,
    class_table,
    count_by_class,
    count_correct,
    count_nonfinite,
    cross_entropy_sum,
)
from src.kernels.library import KernelChoice
from src.models.weight_files import read_weights, without_optimizer_state
from src.runs.checkpoint import save_checkpoint


def test_hits_are_counted_by_hand():
    logits = np.array(
        [
            [9, 1, 2, 3, 4, 5, 6],
            [9, 1, 2, 3, 4, 5, 6],
            [9, 1, 2, 3, 4, 5, 6],
            [0, 0, 0, 0, 0, 0, 0],
            [9, 1, 2, 3, 4, 5, 6],
        ],
        np.float32,
    )
    # ranks of the labels: 0, 4 (the last of the top five), 5, 0 (ties count for the lower index),
    # padding
    assert count_correct(logits, np.array([0, 3, 2, 0, -1])).tolist() == [2, 3, 4]


def test_loss_and_classes_are_counted_by_hand():
    logits = np.array(
        [[0, 0, 0], [2, 0, 0], [0, 1, 0], [np.nan, 0, 0], [5, 0, 0], [9, 9, 9]], np.float32
    )
    labels = np.array(
        [0, 0, 2, 2, -2, -1]
    )  # two that are right, two wrong, one undecodable, one of padding
    p = [1 / 3, np.exp(2) / (np.exp(2) + 2), 1 / (np.e + 2)]
    assert cross_entropy_sum(logits, labels) == pytest.approx([-np.log(p).sum(), 3])
    assert count_by_class(logits, labels, 3).tolist() == [[2, 0, 0], [2, 0, 2]]
    accuracy = EvalResult(50, 50, 4, 1, 0.5, (2, 0, 0), (2, 0, 2))
    assert accuracy.class_top1 == [100.0, None, 0.0]


def test_the_table_of_classes_has_the_worst_first():
    few = ImageSet({"ant": 0, "bee": 1, "cat": 2}, np.zeros(0, np.int32))
    assert class_table(EvalResult(0, 0, 4, 1, 0, (2, 0, 0), (2, 0, 3)), few) == [
        "  cat    0.00 % of 3 images",
        "  ant  100.00 % of 2 images",
    ]
    many = ImageSet({str(label): label for label in range(100)}, np.zeros(0, np.int32))
    lines = class_table(EvalResult(0, 0, 4, 1, 0, tuple(range(100)), (100,) * 100), many)
    assert (
        len(lines) == 13
        and lines[0].endswith("0.00 % of 100 images")
        and lines[-1] == "  and 88 classes above 11.00 %"
    )


def test_nan_is_wrong():
    assert count_correct(np.full((2, 3), np.nan, np.float32), np.array([0, 1])).tolist() == [
        0,
        0,
        2,
    ]


def test_a_long_evaluation_says_how_far_it_is():
    lines = []

    def slow(images):
        time.sleep(0.05)
        return np.zeros((len(images), 10), np.float32)

    images = open_images("digits", "val")
    evaluator = Evaluator(
        images,
        make_config(config_path="digits", per_batch_size=32),
        Communicator(),
        lines.append,
        line_s=0.1,
    )
    assert evaluator(slow).images == len(images)
    shares = [
        int(re.fullmatch(r"evaluated (\d+) % of the images, \d+ s left", line).group(1))
        for line in lines
    ]
    assert len(shares) >= 2 and shares == sorted(shares) and shares[-1] <= 100


@pytest.mark.parametrize(
    "ranks",
    [
        pytest.param(1),
        pytest.param(2, marks=pytest.mark.slow),
        pytest.param(3, marks=pytest.mark.extended),
    ],
)
def test_67_images_are_counted_once_on_any_number_of_ranks(
    trained_run, image_root, tmp_path, ranks
):
    result = tmp_path / "result.json"
    command = [
        "eval.py",
        f"--data_path={image_root}/val",
        f"--checkpoint_file_path={trained_run}/ckpt_0/",
        f"--result_path={result}",
        "--per_batch_size=10",
    ]
    run = execute(["python3", *command]) if ranks == 1 else mpirun(ranks, *command)
    assert run.status == 0, run
    results = json.loads(result.read_text())
    assert [entry["images"] for entry in results] == [67, 67]
    assert [entry["epoch"] for entry in results] == [1, 2]
    recorded = [
        json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines()
    ]
    assert [entry["top1"] for entry in results] == pytest.approx(
        [line["top1"] for line in recorded], abs=1e-3
    )
    assert set(results[0]) == {
        "checkpoint",
        "epoch",
        "step",
        "top1",
        "top5",
        "images",
        "images_per_second",
        "loss",
        "class_top1",
    }
    lines = run.out.splitlines()
    assert (
        f"acc={results[0]['top1']:.2f}%(TOP1)" in lines[0]
        and f"acc={results[0]['top5']:.2f}%(TOP5)" in lines[0]
    )
    best = max(results, key=lambda entry: entry["top1"])
    assert lines[2].startswith("best: ") and best["checkpoint"] in lines[2]


def test_missing_class_in_the_validation_folder_shifts_nothing(trained_run, image_root, tmp_path):
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "cat").symlink_to(image_root / "val" / "cat")
    result = tmp_path / "result.json"
    run = execute(
        [
            "python3",
            "eval.py",
            f"--data_path={tmp_path}/val",
            f"--result_path={result}",
            f"--checkpoint_file_path={trained_run}/best.ckpt",
        ]
    )
    assert run.status == 0, run
    assert json.loads(result.read_text())[0]["images"] == 23
    assert (
        json.loads(result.read_text())[0]["top1"] > 90
    )  # the blue class is learnt; shifted labels would give 0


@pytest.mark.parametrize("engine", ["mindspore", "onnx"])
def test_every_engine_finds_the_same(trained_run, image_root, tmp_path, engine):
    if engine == "onnx":
        pytest.importorskip("onnxruntime")
    run = execute(
        [
            "python3",
            "eval.py",
            f"--data_path={image_root}/val",
            f"--checkpoint_file_path={trained_run}/best.ckpt",
            f"--eval_engine={engine}",
            f"--result_path={tmp_path}/result.json",
        ]
    )
    assert run.status == 0, run
    recorded = [
        json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines()
    ]
    (result,) = json.loads((tmp_path / "result.json").read_text())
    assert result["top1"] == pytest.approx(max(line["top1"] for line in recorded), abs=1e-3)


def test_users_who_could_evaluate_faster_are_told(monkeypatch):
    slow = KernelChoice(reason="bash scripts/setup.sh --kernels builds them")
    assert backends.faster_backend_hint(make_config(eval_engine="mindspore"), slow) is None
    monkeypatch.setattr(backends, "onnx_is_installed", lambda: False)
    assert "scripts/setup.sh --kernels" in backends.faster_backend_hint(make_config(), slow)
    monkeypatch.setattr(backends, "onnx_is_installed", lambda: True)
    assert backends.faster_backend_hint(make_config(), slow) is None


def write_huge(trained_run, path):
    """A checkpoint whose weights are finite and whose outputs are not."""
    arrays, metadata = read_weights(trained_run / "best.ckpt")
    huge = [
        Parameter(Tensor(np.full_like(array, 1e38) if name == "fc1.weight" else array), name=name)
        for name, array in without_optimizer_state(arrays).items()
    ]
    save_checkpoint(path, huge, metadata)


def test_one_damaged_checkpoint_does_not_end_the_evaluation_of_the_others(
    trained_run, image_root, tmp_path
):
    whole = sorted((trained_run / "ckpt_0").iterdir())
    for file in whole:
        shutil.copy(file, tmp_path)
    (tmp_path / "damaged.ckpt").write_bytes(whole[0].read_bytes()[:1000])
    write_huge(trained_run, tmp_path / "huge.ckpt")
    run = execute(
        [
            "python3",
            "eval.py",
            f"--data_path={image_root}/val",
            f"--checkpoint_file_path={tmp_path}",
            f"--result_path={tmp_path}/result.json",
        ]
    )
    assert (
        run.status == 1 and len(run.error_lines) == 1 and "2 of 4 checkpoints" in run.error_lines[0]
    ), run
    assert "are not finite" in run.out
    assert (
        "damaged.ckpt" in run.error_lines[0]
        and len(json.loads((tmp_path / "result.json").read_text())) == 2
    )


def test_outputs_that_are_not_finite_are_an_error(trained_run, image_root, tmp_path):
    assert count_nonfinite(np.array([[0, 1], [np.nan, 1], [np.inf, 0]], np.float32)) == 2
    write_huge(trained_run, tmp_path / "huge.ckpt")
    for words in (
        ["eval.py", f"--data_path={image_root}/val"],
        ["predict.py", f"{image_root}/val/bee"],
    ):
        run = execute(
            [
                "python3",
                *words,
                f"--checkpoint_file_path={tmp_path}/huge.ckpt",
                f"--result_path={tmp_path}/r.json",
            ]
        )
        assert (
            run.status == 2
            and "are not finite" in run.error_lines[0]
            and not (tmp_path / "r.json").exists()
        ), run
