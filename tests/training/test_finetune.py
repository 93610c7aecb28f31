"""The recipe finetune: trained weights on other classes."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TINY, execute, make_config, mpirun, only_run, write_image_folder

from src.models.create import create_model
from src.models.weight_files import read_weights, without_optimizer_state
from src.training.optimizers import HostOptimizer
from src.training.trainer import BestSoFar, Trainer
from src.training.update_rules import create_update_rule

FINETUNE = ("--config_path=finetune", "--max_epoch=3", "--freeze_epochs=1", "--lr=0.02")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of class folders, without validation images.

    Other classes than those of ``trained_run``.
    """
    root = tmp_path_factory.mktemp("photos")
    write_image_folder(root, "mine", ("dog", "eel", "fox"), 20, seed=3)
    return root / "mine"


@pytest.fixture(scope="module")
def finetuned(trained_run, photos, tmp_path_factory):
    output = tmp_path_factory.mktemp("finetuned")
    run = execute(
        [
            "python3",
            "train.py",
            *FINETUNE,
            f"--data_path={photos}",
            f"--pretrained={trained_run}/best.ckpt",
            f"--output_path={output}",
        ]
    )
    assert run.status == 0, run
    return run, only_run(output)


@pytest.mark.slow
def test_one_line_does_all_of_it(finetuned, trained_run):
    run, folder = finetuned
    assert (
        f"starting from {trained_run}/best.ckpt without classifier.bias, classifier.weight: the "
        "classifier starts from random weights, "
        "for 3 classes instead of 3 other"
    ) in run.out, run
    config = json.loads(json.dumps(read_weights(folder / "best.ckpt")[1]["config"]))
    # Of the weights: network, block and preprocessing; of the data: the share that is split off,
    # and a batch of ten steps or eight images.
    assert (config["network"], config["block"], config["image_size"], config["val_split"]) == (
        "cifar_quick",
        "acb",
        32,
        0.2,
    )
    assert config["global_batch_size"] == 8 and config["lr"] == pytest.approx(0.02 * 8 / 32)
    assert "48 images, 3 classes, 6 steps of 8 images" in run.out, run
    last = run.out.splitlines()
    assert (
        last[-2]
        == f"next: python3 predict.py --checkpoint_file_path={folder}/fused.ckpt PHOTO_OR_FOLDER"
    ), run
    start = next(number for number, line in enumerate(last) if line.startswith("trained: "))
    assert f"{folder}/best.ckpt" in last[start] and last[start + 1] == "of each class:", run
    assert last[start + 2].split() == ["class", "images", "precision", "recall", "F1"], run
    classes = [line.split()[:2] for line in last[start + 3 : start + 6]]
    assert sorted(classes) == [["dog", "4"], ["eel", "4"], ["fox", "4"]], run


@pytest.mark.slow
def test_the_next_command_works(finetuned, photos):
    _, folder = finetuned
    run = execute(
        ["python3", "predict.py", f"--checkpoint_file_path={folder}/fused.ckpt", f"{photos}/dog"]
    )
    assert run.status == 0 and len(run.out.splitlines()) == 20, run


@pytest.mark.slow
def test_the_same_part_is_evaluated_later(finetuned):
    _, folder = finetuned
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    run = execute(["python3", "eval.py", f"--checkpoint_file_path={folder}/best.ckpt"])
    assert (
        run.status == 0
        and f"acc={max(line['top1'] for line in lines):.2f}%(TOP1)" in run.out
        and " 12 images" in run.out
    ), run


def test_only_the_classifier_learns_at_first(trained_run, photos, tmp_path):
    run = execute(
        [
            "python3",
            "train.py",
            *FINETUNE,
            f"--data_path={photos}",
            f"--pretrained={trained_run}/best.ckpt",
            f"--output_path={tmp_path}",
            "--max_epoch=1",
            "--deploy=0",
        ]
    )
    assert run.status == 0, run
    before = without_optimizer_state(read_weights(trained_run / "best.ckpt")[0])
    after = without_optimizer_state(read_weights(only_run(tmp_path) / "latest.ckpt")[0])
    moved = {name for name in after if not np.array_equal(before[name], after[name])}
    assert moved == {"classifier.weight", "classifier.bias"}


def test_the_accuracy_before_training_is_said_and_that_it_fell(image_root, trained_run, tmp_path):
    """With a learning rate that destroys the weights."""
    flags = [f"--data_path={image_root}/train", f"--pretrained={trained_run}/best.ckpt"]
    flags += ["--run_eval=1", "--lr=0.4", "--warmup_epochs=0", f"--output_path={tmp_path}"]
    run = execute(["python3", "train.py", *TINY, *flags, "--max_epoch=1"])
    assert run.status == 0, run
    began = float(re.search(r"before training: acc=([\d.]+)%\(TOP1\) \(\d+ of 67", run.out)[1])
    lines = (trained_run / "metrics.jsonl").read_text().splitlines()
    assert began == pytest.approx(max(json.loads(line)["top1"] for line in lines), abs=0.01)
    assert re.search(
        rf"warning: training ended with [\d.]+ % top-1, below the {began:.2f} %", run.out
    )


def test_of_equal_accuracies_the_one_with_less_loss_is_the_best():
    best, improved = BestSoFar(), []
    for step, (top1, loss) in enumerate([(75, 2.5), (75, 0.9), (50, 0.1), (75, 0.9), (80, 3.0)], 1):
        best = best.after(top1, loss)
        if best.evaluations_since == 0:
            improved.append(step)
    assert improved == [1, 2, 5] and best == BestSoFar(80, 3.0, 0)
    assert best.after(80, 3.0).after(79, 0.1).evaluations_since == 2


def test_the_rest_learns_at_its_own_rate():
    network = create_model("cifar_quick", 3)
    parameters = network.trainable_params()
    before = {p.name: p.asnumpy().copy() for p in parameters}
    config = make_config(optimizer="momentum", weight_decay=0, backbone_lr_factor=0.1)
    optimizer = HostOptimizer(parameters, create_update_rule(config), config)
    gradients = [np.ones(p.shape, np.float32) for p in parameters]
    optimizer(0.5, gradients)
    for p in parameters:
        step = 0.5 if p.name.startswith("classifier.") else 0.05
        assert np.allclose(before[p.name] - p.asnumpy(), step, atol=1e-6), p.name


@pytest.mark.extended
def test_early_stopping_ends_with_the_best_and_stays_ended(trained_run, photos, tmp_path):
    words = [
        *FINETUNE,
        f"--data_path={photos}",
        f"--pretrained={trained_run}/best.ckpt",
        f"--output_path={tmp_path}",
        "--max_epoch=40",
        "--early_stopping=2",
        "--lr=0.1",
        "--deploy=0",
    ]
    run = mpirun(2, "train.py", *words)
    assert run.status == 0 and "no improvement in 2 evaluations: stopping early" in run.out, run
    lines = [
        json.loads(line) for line in (only_run(tmp_path) / "metrics.jsonl").read_text().splitlines()
    ]
    best = max(
        range(len(lines)), key=lambda epoch: (lines[epoch]["top1"], -lines[epoch]["val_loss"])
    )
    assert len(lines) == best + 3 < 40
    again = mpirun(2, "train.py", *words, "--resume=auto")
    assert again.status == 0 and "\nepoch " not in again.out, again
    assert "nothing is left to train: it stopped early" in again.out, again
    assert len((only_run(tmp_path) / "metrics.jsonl").read_text().splitlines()) == len(lines)
    # With more patience the run continues.
    longer = [*words, "--resume=auto", f"--max_steps={lines[-1]['step'] + 1}"]
    run = mpirun(2, "train.py", *longer, "--early_stopping=9")
    assert run.status == 0 and f"\nepoch {len(lines) + 1}/40" in run.out, run


@pytest.mark.parametrize(
    "flags,words",
    [
        (("--config_path=finetune",), ("freeze_epochs=2", "--pretrained=FILE")),
        (
            ("--early_stopping=3", "--run_eval=0", "--config_path=digits"),
            ("early_stopping=3", "--run_eval=1"),
        ),
    ],
)
def test_what_is_missing_is_said(photos, tmp_path, flags, words):
    run = execute(
        ["python3", "train.py", f"--data_path={photos}", f"--output_path={tmp_path}", *flags]
    )
    assert (
        run.status == 2
        and len(run.error_lines) == 1
        and all(word in run.error_lines[0] for word in words)
    ), run


@pytest.mark.slow
def test_a_fused_network_is_not_trained_on(finetuned, photos, tmp_path):
    _, folder = finetuned
    run = execute(
        [
            "python3",
            "train.py",
            *FINETUNE,
            f"--data_path={photos}",
            f"--pretrained={folder}/fused.ckpt",
            f"--output_path={tmp_path}",
        ]
    )
    assert (
        run.status == 2
        and len(run.error_lines) == 1
        and "fused" in run.error_lines[0]
        and not list(tmp_path.iterdir())
    ), run


def test_a_run_that_evaluated_nothing_did_not_get_worse():
    """A finished run that was resumed ended with 0.00 %, it said."""
    trainer = SimpleNamespace(
        config=make_config(), best=BestSoFar(), _last_top1=None, _first_top1=94.3
    )
    assert Trainer.accuracy_drop_warning(trainer) is None
    trainer._last_top1 = 90.0
    assert "below the 94.30 %" in Trainer.accuracy_drop_warning(trainer)


@pytest.mark.slow
def test_validation_images_that_the_weights_have_seen_are_told(image_root, trained_run, tmp_path):
    """The accuracy was nearly that of training, and evaluation called the images held out."""
    flags = [f"--data_path={image_root}/train", f"--pretrained={trained_run}/best.ckpt"]
    flags += ["--val_split=0.25", "--max_steps=1", f"--output_path={tmp_path}"]
    run = execute(["python3", "train.py", *TINY, *flags])
    assert run.status == 0, run
    assert f"12 of 12 validation images are among those that {trained_run}/best.ckpt" in run.out
    checkpoint = only_run(tmp_path) / "latest.ckpt"
    run = execute(["python3", "eval.py", f"--checkpoint_file_path={checkpoint}"])
    assert "weights that training began with were trained on 12 of these 12" in run.out, run
    # A third run from these weights, on the same validation images, knows of the first one.
    again = [f"--pretrained={checkpoint}", *(word for word in flags if "pretrained" not in word)]
    run = execute(["python3", "train.py", *TINY, *again])
    assert f"12 of 12 validation images are among those that {checkpoint}" in run.out, run
