"""A teacher: targets, its checks, and that a run with one resumes to the same bits."""

import shutil

import numpy as np
import pytest
from conftest import TINY, execute, make_config, only_run

from src.dataset.batches import Batch
from src.kernels.library import KernelChoice
from src.models.weight_files import read_weights
from src.training.distillation import Teacher, open_teacher
from src.utils.errors import UserError
from src.utils.log import no_log

CLASSES = {"ant": 0, "bee": 1, "cat": 2}


def test_the_loss_on_mixed_targets_is_hintons_weighted_sum():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    random = np.random.default_rng(0)
    logits, taught = random.normal(size=(2, 5, 3)).astype(np.float32)
    batch = Batch(np.zeros((5, 8, 8, 3), np.uint8), np.array([0, 2, 1, 1, 0], np.int32))
    mixed = Teacher(lambda images: taught, 0.3)(batch)
    assert mixed.labels.dtype == np.float32
    ours = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(mixed.labels))
    hard = torch.nn.functional.cross_entropy(
        torch.tensor(logits), torch.tensor(batch.labels.astype(np.int64))
    )
    soft = torch.nn.functional.cross_entropy(
        torch.tensor(logits), torch.softmax(torch.tensor(taught), 1)
    )
    assert float(ours) == pytest.approx(float(0.7 * hard + 0.3 * soft), rel=1e-5)
    # Targets that augmentations have mixed are mixed further.
    again = Teacher(lambda images: taught, 0.3)(mixed).labels
    assert np.allclose(
        again,
        0.7 * mixed.labels + 0.3 * np.exp(taught) / np.exp(taught).sum(1, keepdims=True),
        atol=1e-6,
    )


@pytest.mark.parametrize(
    "keys,classes,words",
    [
        ({"image_size": 64}, CLASSES, "takes images of 32 pixels, and image_size=64"),
        ({"num_classes": 4}, CLASSES, "has 3 classes, and the training images have 4"),
        ({}, {"ant": 1, "bee": 0, "cat": 2}, "was trained on other classes, or in another order"),
        ({"teacher": "missing.ckpt"}, CLASSES, "missing.ckpt"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(trained_run, keys, classes, words):
    teacher = {"teacher": str(trained_run), "image_size": 32, "num_classes": 3}
    with pytest.raises(UserError, match=words):
        open_teacher(make_config(**{**teacher, **keys}), classes, KernelChoice(), no_log)


@pytest.mark.slow
def test_a_run_does_not_continue_with_another_teacher(image_root, trained_run, tmp_path):
    teacher = tmp_path / "teacher.ckpt"
    shutil.copy(trained_run / "best.ckpt", teacher)
    words = ["python3", "train.py", *TINY, f"--data_path={image_root}/train", "--deploy=0"]
    words += [f"--teacher={teacher}", f"--output_path={tmp_path}/out"]
    assert execute([*words, "--max_steps=2"]).status == 0
    checkpoint = next((only_run(tmp_path / "out") / "ckpt_0").iterdir())
    shutil.copy(checkpoint, teacher)
    run = execute([*words, "--max_steps=3", "--resume=auto"])
    assert run.status == 2 and "is not the network that" in run.error_lines[0], run
    shutil.copy(trained_run / "best.ckpt", teacher)
    run = execute([*words, "--max_steps=2", "--resume=auto"])
    assert (
        run.status == 0
        and "nothing is left to train: it has done 2 steps of --max_steps=2" in run.out
    ), run


@pytest.mark.slow
def test_a_run_with_a_teacher_resumes_to_the_same_bits(image_root, trained_run, tmp_path):
    flags = [*TINY, f"--data_path={image_root}/train", f"--teacher={trained_run}/best.ckpt"]
    flags += ["--lr=0.02", "--deploy=0", "--ckpt_interval=1"]
    found = {}
    for name, epochs in (("whole", [2]), ("parts", [1, 2]), ("alone", [2])):
        for number, last in enumerate(epochs):
            resume = ["--resume=auto"] if number else []
            weight = ["--teacher_weight=1e-6"] if name == "alone" else []
            run = execute(
                ["python3", "train.py", *flags, *weight, *resume, "--T_max=2"]
                + [f"--max_epoch={last}", f"--output_path={tmp_path}/{name}"]
            )
            assert run.status == 0, run
        found[name] = read_weights(only_run(tmp_path / name) / "latest.ckpt")[0]
    assert all(
        np.array_equal(found["whole"][name], found["parts"][name]) for name in found["whole"]
    )
    key = "classifier.weight"
    assert not np.allclose(found["whole"][key], found["alone"][key], atol=1e-4)
