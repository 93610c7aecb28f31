"""Counting, and evaluation by the command."""

import json
import re
import shutil
import time

import numpy as np
import pytest
from conftest import TINY, execute, make_config, mpirun, only_run
from mindspore import Parameter, Tensor
from scipy.special import softmax

from src.dataset.sources import open_images
from src.distributed.communicator import Communicator
from src.inference import backends
from src.inference.calibration import best_temperature
from src.inference.checkpoint_model import CheckpointModel
from src.inference.evaluation import Evaluator
from src.inference.metrics import (
    EvalResult,
    calibration_error,
    class_table,
    confusion_table,
    count_by_class,
    count_confidence,
    count_confusion,
    count_correct,
    count_nonfinite,
    cross_entropy_sum,
    interval,
)
from src.inference.prediction import Prediction, _probabilities
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
    assert count_by_class(logits, labels, 3).tolist() == [[2, 0, 0], [2, 0, 2], [2, 1, 0]]
    assert count_confusion(logits, labels, 3).tolist() == [[2, 0, 0], [0, 0, 0], [0, 1, 0]]
    accuracy = EvalResult(50, 50, 4, 1, 0.5, (2, 0, 0), (2, 0, 2), (2, 1, 0))
    assert accuracy.class_top1 == [100.0, None, 0.0]


def test_precision_recall_and_f1_are_those_of_their_definitions():
    """3 cats, of which 2 are found; 4 images are called cats; no bird; a dog is never named."""
    result = EvalResult(40, 100, 5, 1, 0.5, (2, 0, 0), (3, 0, 2), (4, 1, 0))
    assert result.by_class(["cat", "bird", "dog"]) == {
        "cat": {"images": 3, "precision": 50.0, "recall": 66.67, "f1": 57.14},
        "bird": {"images": 0, "precision": 0.0, "recall": None, "f1": None},
        "dog": {"images": 2, "precision": None, "recall": 0.0, "f1": 0.0},
    }
    assert result.balanced == pytest.approx((200 / 3 + 0) / 2)


@pytest.mark.parametrize(
    "correct,images,low,high",
    # Wilson's interval as R's binom::binom.wilson gives it.
    [(17, 32, 36.45, 69.13), (12, 14, 60.06, 95.99), (0, 10, 0.0, 27.75), (10, 10, 72.25, 100.0)],
)
def test_the_interval_is_wilsons(correct, images, low, high):
    assert interval(correct, images) == pytest.approx((low, high), abs=0.01)


def test_the_table_of_classes_has_the_worst_first():
    result = EvalResult(0, 0, 4, 1, 0, (2, 0, 0), (2, 0, 3), (5, 0, 0))
    assert class_table(result.by_class(["ant", "bee", "cat"])) == [
        "  class  images  precision   recall       F1",
        "  cat         3          -    0.0 %    0.0 %",
        "  ant         2     40.0 %  100.0 %   57.1 %",
    ]
    many = EvalResult(0, 0, 4, 1, 0, tuple(range(100)), (100,) * 100, (100,) * 100)
    lines = class_table(many.by_class([str(label) for label in range(100)]))
    assert len(lines) == 14 and lines[1].endswith("0.0 %    0.0 %")
    assert lines[-1] == "  and 88 classes with a recall of 11.0 % or more"


def test_the_confusion_matrix_is_printed_if_it_fits():
    assert confusion_table(((10, 2), (0, 3)), ["dogs", "birds"]) == [
        "  rows: true class, columns: predicted",
        "         dogs birds",
        "  dogs     10     2",
        "  birds     0     3",
    ]
    assert confusion_table(None, ["a"]) == confusion_table(((0,) * 13,) * 13, ["x"] * 13) == []


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
        "correct",
        "top1_interval",
        "balanced_top1",
        "images_per_second",
        "loss",
        "class_top1",
        "classes",
        "confusion",
        "calibration_error",
        "other_predictions",
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
            "--data_path=digits",
            f"--eval_data_path={tmp_path}/val",
            f"--result_path={result}",
            f"--checkpoint_file_path={trained_run}/best.ckpt",
        ]
    )
    assert run.status == 0, run
    assert "warning: --data_path changes nothing with --eval_data_path" in run.out
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


def test_the_calibration_error_is_that_of_guo():
    """Three of four images at 80 % are right, and one of two at 55 %."""
    probabilities = np.array([0.8] * 4 + [0.55] * 2)
    logits = np.log(np.stack([probabilities, 1 - probabilities], axis=1))
    labels = np.array([0, 0, 0, 1, 0, 1], np.int32)
    # 4/6 |0.75 - 0.8| + 2/6 |0.5 - 0.55|
    found = calibration_error(count_confidence(logits, labels))
    assert found == pytest.approx(100 * (4 / 6 * 0.05 + 2 / 6 * 0.05))
    # Padding, undecodable images and outputs that are not finite do not count.
    more = np.concatenate([logits, [[9.0, 0], [9.0, 0], [np.nan, 0]]])
    assert calibration_error(count_confidence(more, np.append(labels, [-1, -2, 0]))) == found


def test_the_temperature_is_the_one_that_labels_were_drawn_with():
    """Labels drawn from the softmax of logits; then the logits are taken three times as large."""
    random = np.random.default_rng(0)
    logits = random.normal(size=(20000, 5)) * 2
    labels = (softmax(logits, axis=1).cumsum(axis=1) < random.random((20000, 1))).sum(axis=1)
    assert best_temperature(3 * logits, labels) == pytest.approx(3, rel=0.03)
    assert best_temperature(logits, labels) == pytest.approx(1, rel=0.03)


@pytest.mark.slow
def test_each_checkpoint_of_a_folder_is_compared_with_its_own_training(
    trained_run, image_root, tmp_path
):
    """One of two has been trained on the images that both are evaluated on."""
    other = train_on(image_root / "val", tmp_path / "out")
    (tmp_path / "two").mkdir()
    shutil.copy(trained_run / "latest.ckpt", tmp_path / "two" / "a-1_1.ckpt")
    shutil.copy(other / "latest.ckpt", tmp_path / "two" / "b-1_2.ckpt")
    run = evaluated(f"--checkpoint_file_path={tmp_path}/two", f"--data_path={image_root}/val")
    warnings = [line for line in run.out.splitlines() if "training used" in line]
    assert len(warnings) == 1 and warnings[0].startswith("warning: b-1_2.ckpt: these look"), run


@pytest.mark.slow
def test_other_evaluation_images_are_not_split_as_training_split_its_own(image_root, tmp_path):
    run_folder = train_on(image_root / "train", tmp_path / "out", "--val_split=0.25")
    checkpoint = f"--checkpoint_file_path={run_folder}/latest.ckpt"
    assert "the 12 images of" in evaluated(checkpoint).out
    result = tmp_path / "result.json"
    evaluated(checkpoint, f"--eval_data_path={image_root}/val", f"--result_path={result}")
    found = json.loads(result.read_text())
    whole = len(list((image_root / "val").glob("*/*")))
    assert found[0]["images"] == whole


def train_on(folder, output, *flags):
    run = execute(
        [
            "python3",
            "train.py",
            f"--data_path={folder}",
            f"--output_path={output}",
            *TINY,
            "--max_epoch=1",
            *flags,
        ]
    )
    assert run.status == 0, run
    return only_run(output)


def evaluated(*flags):
    run = execute(["python3", "eval.py", *flags])
    assert run.status == 0, run
    return run


def test_the_order_of_classes_survives_very_small_probabilities(image_root):
    """With a low temperature all but one are 0 in float32."""
    logits = np.array([[0.0, 150.0, 300.0, 450.0]], np.float32)
    (path, *_) = sorted((image_root / "val" / "ant").iterdir())
    model = CheckpointModel(make_config(num_classes=4, top_k=4, image_size=32), False, None)
    ((_, probabilities, _),) = _probabilities([str(path)], model, lambda images: logits)
    assert Prediction.of("x", probabilities, model).classes == ["3", "2", "1", "0"]
