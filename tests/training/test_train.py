"""train.py as a user starts it: outputs, ranks, wrong input."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import yaml
from conftest import ROOT, TINY, execute, make_config, mpirun, only_run
from PIL import Image

from src.dataset.batches import epoch_order
from src.models.weight_files import read_weights, without_optimizer_state
from src.training.job import rate_warning, stop_hint, val_loss_hint, warmup_warning


def test_run_folder_holds_what_the_readme_says(trained_run):
    assert {file.name for file in trained_run.iterdir()} == {
        "best.ckpt",
        "ckpt_0",
        "class_indexing.json",
        "config.yaml",
        "curves.png",
        "environment.json",
        "latest.ckpt",
        "log.txt",
        "metrics.jsonl",
    }
    assert {file.name for file in (trained_run / "ckpt_0").iterdir()} == {
        "cifar_quick-1_12.ckpt",
        "cifar_quick-2_12.ckpt",
    }
    assert json.loads((trained_run / "class_indexing.json").read_text()) == {
        "ant": 0,
        "bee": 1,
        "cat": 2,
    }
    config = yaml.safe_load((trained_run / "config.yaml").read_text())
    assert config["lr"] == 0.02 and config["num_classes"] == 3 and config["block"] == "acb"
    lines = [json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2] and [line["step"] for line in lines] == [
        12,
        24,
    ]
    assert set(lines[0]) == {
        "epoch",
        "step",
        "loss",
        "lr",
        "images_per_second",
        "rank_seconds",
        "top1",
        "top5",
        "correct",
        "val_images",
        "val_loss",
        "class_top1",
    }
    assert (trained_run / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_last_line_of_the_log_gives_the_rates(trained_run):
    assert "img/s in total," in (trained_run / "log.txt").read_text()


def test_best_checkpoint_is_the_best(trained_run):
    lines = [json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines()]
    _, metadata = read_weights(trained_run / "best.ckpt")
    assert (
        metadata["epoch"] == max(lines, key=lambda line: (line["top1"], -line["val_loss"]))["epoch"]
    )


@pytest.mark.slow
def test_no_argument_trains_the_digits_and_says_so(tmp_path):
    run = execute(["python3", str(ROOT / "train.py"), "--max_steps=3"], cwd=tmp_path)
    assert run.status == 0 and "bundled handwritten digits" in run.out.splitlines()[1], run
    assert only_run(tmp_path / "outputs").joinpath("ckpt_0", "cifar_quick-1_3.ckpt").exists()


@pytest.mark.slow
def test_validation_images_split_off_are_those_that_are_evaluated_later(image_root, tmp_path):
    run = mpirun(
        2,
        "train.py",
        f"--data_path={image_root}/train",
        "--val_split=0.25",
        f"--output_path={tmp_path}/run",
        *TINY,
        "--max_epoch=2",
        "--lr=0.02",
    )
    assert run.status == 0 and ": 36 images, 3 classes" in run.out, run
    folder = only_run(tmp_path / "run")
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    evaluated = execute(["python3", "eval.py", f"--checkpoint_file_path={folder}/latest.ckpt"])
    assert (
        evaluated.status == 0
        and " 12 images" in evaluated.out
        and f"acc={last['top1']:.2f}%(TOP1)" in evaluated.out
    ), evaluated
    assert (
        "12 images of" in evaluated.out and "that training held out for validation" in evaluated.out
    )
    (tmp_path / "link").symlink_to(image_root)
    spelling = os.path.relpath(tmp_path / "link" / "train", ROOT) + "/"
    same = execute(
        [
            "python3",
            "eval.py",
            f"--checkpoint_file_path={folder}/latest.ckpt",
            f"--data_path={spelling}",
        ]
    )
    assert " 12 images" in same.out and f"acc={last['top1']:.2f}%(TOP1)" in same.out, same
    others = execute(
        [
            "python3",
            "eval.py",
            f"--checkpoint_file_path={folder}/latest.ckpt",
            f"--data_path={image_root}/val",
        ]
    )
    assert others.status == 0 and " 67 images" in others.out, others


@pytest.mark.extended
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_threads_give_the_same_bits_on_machines_with_other_numbers_of_cores(image_root, tmp_path):
    """A process that may use one core stands for a machine with one core."""
    first, second = sorted(os.sched_getaffinity(0))[:2]
    weights = {}
    for name, cores, threads in (("one", {second}, 0), ("two, one used", {first, second}, 1)):
        flags = [
            f"--data_path={image_root}/train",
            f"--output_path={tmp_path}/{name}",
            "--network=resnet18",
            "--image_size=64",
            "--per_batch_size=8",
            "--max_steps=4",
            "--lr=0.02",
            f"--threads={threads}",
        ]
        restricted = (
            f"import os, sys; os.sched_setaffinity(0, {cores}); os.execvp('python3', ['python3', "
            "*sys.argv[1:]])"
        )
        run = execute(["python3", "-c", restricted, "train.py", *flags])
        assert run.status == 0, run
        weights[name], metadata = read_weights(only_run(tmp_path / name) / "latest.ckpt")
        assert metadata["threads"] == [1]
    for key, array in without_optimizer_state(weights["one"]).items():
        assert np.array_equal(array, weights["two, one used"][key]), key


@pytest.mark.extended
def test_world_sizes_follow_the_same_loss(image_root, tmp_path):
    """The same global batch gives the same losses on 1 and 2 ranks (no batch norm, no dropout)."""
    losses = []
    for ranks in (1, 2):
        run = mpirun(
            ranks,
            "train.py",
            f"--data_path={image_root}/train",
            f"--output_path={tmp_path}/{ranks}",
            "--network=alexnet",
            "--image_size=64",
            "--dropout=0",
            "--global_batch_size=12",
            "--max_epoch=3",
            "--ckpt_interval=3",
            "--lr=0.01",
        )
        assert run.status == 0, run
        lines = (only_run(tmp_path / str(ranks)) / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert np.allclose(*losses, rtol=2e-5), losses


@pytest.mark.extended
def test_compressed_gradients_train_nearly_the_same(image_root, tmp_path):
    losses = {}
    for form in ("none", "float16"):
        run = mpirun(
            2,
            "train.py",
            f"--data_path={image_root}/train",
            f"--output_path={tmp_path}/{form}",
            *TINY,
            "--max_epoch=1",
            "--lr=0.05",
            f"--gradient_compression={form}",
        )
        assert run.status == 0, run
        losses[form] = json.loads((only_run(tmp_path / form) / "metrics.jsonl").read_text())["loss"]
    # 11 binary digits of each gradient
    assert losses["float16"] != losses["none"] and losses["float16"] == pytest.approx(
        losses["none"], rel=2e-3
    ), losses


def train(*flags, cwd=ROOT):
    return execute(["python3", str(ROOT / "train.py"), *flags], cwd=cwd)


def assert_one_error(run, *words):
    assert run.status == 2, run
    assert len(run.error_lines) == 1 and "Traceback" not in run.err + run.out, run
    for word in words:
        assert word in run.error_lines[0], run


@pytest.mark.parametrize(
    "flags,words",
    [
        (("--lrr=0.1",), ("'--lrr'", "did you mean 'lr'")),
        (("--data_path=/nowhere",), ("/nowhere", "does not exist")),
        (("--lr=-1",), ("lr=-1", "greater than 0")),
        (("--config_path=digit",), ("did you mean 'digits'",)),
        (("--run_distribute=1",), ("needs mpirun",)),
        (("--config_path=alexnet_imagenet",), ("--data_path=DIR",)),
        (("--device_target=GPU",), ("GPU", "CPU works")),
        (("--device_target=Ascend",), ("Ascend", "CPU works")),
        (("--network=resnet19",), ("unknown network", "did you mean 'resnet1")),
        (
            ("--per_batch_size=2000", "--global_batch_size=0"),
            ("fewer than one global batch", "--per_batch_size=1442"),
        ),
        (("--num_classes=7",), ("num_classes=7", "10 classes")),
        (("--checkpoint_file_path=/nowhere.ckpt",), ("/nowhere.ckpt", "does not exist")),
        (("--val_split=0.1", "--eval_data_path=."), ("val_split", "eval_data_path")),
        (("--deploy=1", "--run_eval=0"), ("deploy=1", "--run_eval=1")),
        (("--amp_level=O3",), ("amp_level=O3", "GPU")),
        (("--amp_level=O2", "--kernels=mindspore"), ("amp_level=O2", "bfloat16", "kernels=onednn")),
        (("picture.jpg",), ("picture.jpg", "--KEY=VALUE")),
    ],
)
def test_wrong_command_is_one_line_and_leaves_nothing(tmp_path, flags, words):
    assert_one_error(train(f"--output_path={tmp_path}/out", *flags), *words)
    assert not (tmp_path / "out").exists()


def test_strict_makes_each_warning_an_error(image_root, tmp_path):
    flags = (*TINY, f"--data_path={image_root}/train", "--max_steps=1", "--lr_epochs=5")
    told = "--lr_epochs changes nothing without --lr_scheduler=step|exponential"
    lenient = train(f"--output_path={tmp_path}/out", *flags)
    assert lenient.status == 0 and f"warning: {told}\n" in lenient.out, lenient
    assert f"warning: {told}\n" in (only_run(tmp_path / "out") / "log.txt").read_text()
    strict = train(f"--output_path={tmp_path}/strict", *flags, "--strict=1")
    assert_one_error(strict, told, "--strict=1")
    assert not list((tmp_path / "strict").glob("*/ckpt_0/*.ckpt"))


def test_unwritable_output_path(image_root, tmp_path):
    (tmp_path / "file").write_text("")
    assert_one_error(
        train(f"--output_path={tmp_path}/file", *TINY, f"--data_path={image_root}/train"),
        "output_path",
    )


def test_other_class_count_needs_permission(trained_run, tmp_path):
    flags = (
        "--config_path=digits",
        "--max_steps=1",
        f"--output_path={tmp_path}/out",
        f"--checkpoint_file_path={trained_run}/best.ckpt",
    )
    assert_one_error(train(*flags), "classifier", "--allow_head_mismatch=1")
    allowed = train(*flags, "--allow_head_mismatch=1")
    assert allowed.status == 0 and "without classifier.bias, classifier.weight" in allowed.out, (
        allowed
    )


@pytest.mark.slow
def test_text_file_among_the_images_ends_every_rank(broken_copy, tmp_path):
    (broken_copy / "train" / "bee" / "003.jpg").write_text("text")
    run = mpirun(
        3,
        "train.py",
        f"--data_path={broken_copy}/train",
        f"--output_path={tmp_path}/out",
        *TINY,
        "--max_epoch=2",
    )
    assert_one_error(run, "bee/003.jpg")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_image_that_one_rank_alone_fails_on_ends_every_rank(broken_copy, tmp_path):
    """It begins and ends like a JPEG, so that it is found in the middle of an epoch.

    By the rank in whose share it is.
    """
    index = 16 + 3
    place = int(np.flatnonzero(epoch_order(1, 0, 3 * 16) == index)[0])
    (broken_copy / "train" / "bee" / "003.jpg").write_bytes(
        b"\xff\xd8\xff\xe0 and no more \xff\xd9"
    )
    run = mpirun(
        3,
        "train.py",
        f"--data_path={broken_copy}/train",
        f"--output_path={tmp_path}/out",
        *TINY,
        "--max_epoch=2",
    )
    assert place % 3 > 0
    assert_one_error(run, f"error: rank {place % 3}: ", "bee/003.jpg", "--bad_samples=replace")
    assert (only_run(tmp_path / "out") / "log.txt").exists()


def test_truncated_image_is_told_before_the_first_step(broken_copy, tmp_path):
    file = broken_copy / "train" / "cat" / "015.jpg"
    file.write_bytes(file.read_bytes()[:-100])
    assert_one_error(
        train(f"--data_path={broken_copy}/train", f"--output_path={tmp_path}/out", *TINY),
        "cat/015.jpg",
        "--bad_samples=replace",
        "check_dataset.py",
    )
    assert not (tmp_path / "out").exists()


def test_training_and_evaluation_on_the_same_images_is_told(image_root, tmp_path):
    data = f"--data_path={image_root}/train"
    output = f"--output_path={tmp_path}/out"
    same = (f"--eval_data_path={image_root}/train", "--run_eval=1", "--max_steps=2")
    run = execute(["python3", "train.py", data, output, *same, *TINY])
    assert run.status == 0 and "48 of 48 validation images are training images" in run.out, run
    checkpoint = only_run(tmp_path / "out") / "best.ckpt"
    run = execute(["python3", "eval.py", data, f"--checkpoint_file_path={checkpoint}"])
    assert run.status == 0 and "look like the images that training used" in run.out, run
    words = (f"--data_path={image_root}/val", f"--checkpoint_file_path={checkpoint}")
    run = execute(["python3", "eval.py", *words])
    assert run.status == 0 and "look like" not in run.out, run


def write_pictures(folder, count, seed):
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for number in range(count):
        pixels = random.integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}_{number}.png")


def test_copies_of_images_are_told(tmp_path):
    """Under another name, in another class or in both parts; on one line for all ranks."""
    data = tmp_path / "data"
    for seed, place in enumerate(("train/a", "train/b", "val/a", "val/b")):
        write_pictures(data / place, 4, seed)
    copy = data / "val" / "b" / "renamed.png"
    shutil.copy(data / "train" / "b" / "1_2.png", copy)
    shutil.copytree(data / "train" / "a", data / "train" / "c")
    (data / "val" / "c").mkdir()
    shutil.copy(data / "val" / "a" / "2_0.png", data / "val" / "c" / "own.png")
    words = [f"--data_path={data}", f"--output_path={tmp_path}/out", "--max_steps=1", *TINY]
    run = mpirun(2, "train.py", *words, "--run_eval=1", "--per_batch_size=2")
    assert run.status == 0, run
    both = f"1 of 10 validation images are training images too, such as {copy};"
    assert run.out.count(both) == 1, run
    classes = "4 training images are the same as one of another class, such as "
    assert run.out.count(classes) == 1 and f"{data}/train/c/" in run.out, run
    checkpoint = only_run(tmp_path / "out") / "best.ckpt"
    words = [f"--data_path={data}/val", f"--checkpoint_file_path={checkpoint}"]
    run = execute(["python3", "eval.py", *words])
    assert run.status == 0 and both in run.out, run


def test_two_losses_are_not_taken_for_one():
    other = {"loss": "binary_cross_entropy", "run_eval": 1}
    assert "val_loss is the softmax cross-entropy" in val_loss_hint(make_config(**other))
    assert val_loss_hint(make_config(**{**other, "run_eval": 0})) is None
    assert val_loss_hint(make_config(run_eval=1)) is None


@pytest.mark.parametrize(
    "flags,words",
    [
        ({"lr_scheduler": "step", "max_epoch": 3, "warmup_epochs": 0}, "never falls in 3 epochs"),
        ({"lr_scheduler": "step", "max_epoch": 3, "lr_epochs": "2", "warmup_epochs": 0}, None),
        ({"lr_scheduler": "cosine_restarts(period=1)", "max_epoch": 3}, "never falls"),
        ({"lr_scheduler": "cosine_restarts", "max_epoch": 12}, None),
        ({"lr_scheduler": "cosine_restarts(period=5)", "max_epoch": 6, "warmup_epochs": 0}, None),
        ({"T_max": 2, "max_epoch": 4}, "is 0 in 50 % of the run"),
        ({"T_max": 2, "max_epoch": 4, "eta_min": 0.01}, None),
        ({"lr_scheduler": "one_cycle", "max_epoch": 1}, None),
        ({"lr_scheduler": "one_cycle(rise=0.3)", "max_epoch": 5, "warmup_epochs": 10}, None),
        ({"max_epoch": 5}, None),
    ],
)
def test_a_rate_that_never_falls_or_is_0_is_told(flags, words):
    config = make_config(**flags)
    for steps_per_epoch in (4, 50, 5000):
        message = warmup_warning(config) or rate_warning(config, steps_per_epoch)
        assert message is None if words is None else words in message


def test_a_run_that_stops_within_its_schedule_is_told():
    config = make_config(max_epoch=10, max_steps=3, lr=0.3, warmup_epochs=1)
    # The third of 100 steps of warm-up.
    assert "of 1000 steps, ends: the last learning rate is 0.009" in stop_hint(config, 100)
    for max_steps in (0, 1000, 2000):
        assert stop_hint(make_config(max_epoch=10, max_steps=max_steps), 100) is None


@pytest.mark.slow
def test_bad_images_are_replaced_and_counted(broken_copy, tmp_path):
    for name in ("bee/003.jpg", "cat/000.jpg"):
        (broken_copy / "train" / name).write_bytes(b"")
    run = mpirun(
        2,
        "train.py",
        f"--data_path={broken_copy}/train",
        f"--output_path={tmp_path}/out",
        *TINY,
        "--max_epoch=2",
        "--lr=0.02",
        "--bad_samples=replace",
    )
    assert run.status == 0 and run.out.count("2 replaced images") == 2, run
    lines = (only_run(tmp_path / "out") / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["replaced_images"] for line in lines] == [2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_numbers_gone_wrong_stop_the_run_and_keep_the_last_checkpoint(image_root, tmp_path, ranks):
    """The learning rate of the second epoch is far too high."""
    words = [
        "train.py",
        f"--data_path={image_root}/train",
        f"--output_path={tmp_path}/out",
        *TINY,
        "--global_batch_size=4",
        "--lr=1e20",
        "--max_epoch=3",
        "--lr_scheduler=cosine_annealing",
        "--warmup_epochs=2",
        "--ckpt_interval_steps=1",
    ]
    run = execute(["python3", *words]) if ranks == 1 else mpirun(ranks, *words)
    assert_one_error(run, "step", "learning rate", "is not finite", "last good checkpoint")
    found = re.search(
        r"at step (\d+) .*the gradient of (\S+) is not finite; the last good checkpoint is (\S+);",
        run.error_lines[0],
    )
    arrays, metadata = read_weights(found[3])
    assert metadata["step"] == int(found[1]) - 1 and found[2] in arrays


def test_without_the_environment_the_error_says_what_to_run(tmp_path):
    # -S leaves out site-packages: this Python as it is before the environment is made.
    run = execute(["python3", "-S", str(ROOT / "train.py")])
    assert_one_error(run, "bash scripts/setup.sh", "source .venv/bin/activate")


def test_help_tells_the_usage():
    run = train("--lr=0.1", "--help")
    assert run.status == 0 and "--data_path" in run.out and "--help KEY" in run.out
    assert_one_error(train("--workers=3"), "--workers", "num_parallel_workers")
    assert_one_error(train("--help", "learning-rate"), "learning-rate", "'lr'")


@pytest.mark.slow
def test_mistake_under_mpirun_is_told_once(tmp_path):
    run = mpirun(
        3, "train.py", "--data_path=/nowhere", "--run_distribute=1", f"--output_path={tmp_path}/out"
    )
    assert_one_error(run, "/nowhere")
    refused = mpirun(2, "train.py", "--run_distribute=0", f"--output_path={tmp_path}/out")
    assert_one_error(refused, "run_distribute=0")
    assert not (tmp_path / "out").exists()
