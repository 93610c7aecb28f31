"""A run that was killed and resumed is bit-identical to an uninterrupted run."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import yaml
from conftest import TINY, execute, mpirun, mpirun_words, only_run
from mindspore import Parameter, Tensor

from src.models.weight_files import read_weights
from src.runs.checkpoint import save_checkpoint

# Batch norm, momentum, augmentation, evaluation: all that has state.
FLAGS = (
    *TINY,
    "--block=acb",
    "--max_epoch=3",
    "--run_eval=1",
    "--ckpt_interval_steps=5",
    "--keep_checkpoint_max=100",
    "--global_batch_size=4",
    "--lr=0.02",
)


def command(ranks, image_root, output, *more):
    words = [
        "train.py",
        f"--data_path={image_root}/train",
        f"--output_path={output}",
        *FLAGS,
        *more,
    ]
    return ["python3", *words] if ranks == 1 else mpirun_words(ranks, *words)


def outcome(output):
    """(arrays of the last checkpoint, metrics without rates)."""
    folder = only_run(output)
    arrays, metadata = read_weights(folder / "ckpt_0" / "cifar_quick-3_12.ckpt")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("images_per_second", "rank_seconds")
    return (
        arrays,
        metadata,
        [{key: value for key, value in line.items() if key not in timed} for line in lines],
    )


@pytest.fixture(scope="module")
def undisturbed(image_root, tmp_path_factory):
    """undisturbed(ranks) -> the outcome of the run that was never stopped."""
    found = {}

    def on(ranks):
        if ranks not in found:
            output = tmp_path_factory.mktemp("whole")
            run = execute(command(ranks, image_root, output))
            assert run.status == 0, run
            found[ranks] = outcome(output)
        return found[ranks]

    return on


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks,first_kill",
    [(1, "cifar_quick-1_5.ckpt"), (1, "cifar_quick-2_3.ckpt"), (2, "cifar_quick-1_10.ckpt")],
)
def test_killed_and_resumed_run_ends_with_the_same_bits(
    image_root, tmp_path, start, undisturbed, ranks, first_kill
):
    killed = tmp_path / "killed"
    running = start(command(ranks, image_root, killed))
    running.wait_for(lambda: any(killed.glob(f"*/ckpt_0/{first_kill}")))
    running.kill()
    run = execute(command(ranks, image_root, killed, "--resume=auto"))
    assert run.status == 0 and "resuming from" in run.out, run
    (expected, told, metrics), (arrays, resumed, resumed_metrics) = (
        undisturbed(ranks),
        outcome(killed),
    )
    assert set(arrays) == set(expected) and any(
        name.startswith("optimizer.momentum.") for name in arrays
    )
    for name, value in expected.items():
        assert np.array_equal(arrays[name], value), name
    assert resumed_metrics == metrics and [line["epoch"] for line in metrics] == [1, 2, 3]
    assert resumed["best_top1"] == told["best_top1"]
    # Who repeats the run begins at its beginning.
    config = yaml.safe_load((only_run(killed) / "config.yaml").read_text())
    assert config["resume"] == "" and config["max_epoch"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("change", ["class", "swap", "name"])
def test_a_run_does_not_continue_with_other_images(broken_copy, tmp_path, change):
    """The vector of labels is the same after each of these changes."""
    words = command(1, broken_copy, tmp_path / "out", "--ckpt_interval=1")
    assert execute([*words, "--max_steps=12"]).status == 0
    train = broken_copy / "train"
    if change == "class":
        for part in ("train", "val"):
            (broken_copy / part / "ant").rename(broken_copy / part / "zebra")
    elif change == "swap":
        (train / "ant").rename(train / "other")
        (train / "bee").rename(train / "ant")
        (train / "other").rename(train / "bee")
    else:
        (train / "ant" / "000.jpg").rename(train / "ant" / "zzz.jpg")
    run = execute([*words, "--resume=auto"])
    assert run.status == 2 and "trained on other images" in run.error_lines[0], run


@pytest.mark.slow
def test_the_best_starts_again_with_other_validation_images(broken_copy, tmp_path):
    words = command(1, broken_copy, tmp_path / "out", "--ckpt_interval=1", "--run_eval=1")
    assert execute([*words, "--max_steps=12"]).status == 0
    next((broken_copy / "val" / "ant").iterdir()).unlink()
    run = execute([*words, "--max_steps=24", "--resume=auto"])
    assert run.status == 0 and "warning: the validation images have changed" in run.out, run


@pytest.mark.slow
def test_the_best_survives_a_part_of_the_run_without_evaluation(image_root, tmp_path):
    """The best of the first part is compared with the third part's, which has a rate of 0."""
    words = command(1, image_root, tmp_path / "out", "--ckpt_interval=1", "--T_max=1")
    for steps, evaluates in ((12, 1), (24, 0), (36, 1)):
        more = ["--resume=auto"] if steps > 12 else []
        run = execute([*words, f"--max_steps={steps}", f"--run_eval={evaluates}", *more])
        assert run.status == 0 and "validation images have changed" not in run.out, run
    metadata = read_weights(only_run(tmp_path / "out") / "latest.ckpt")[1]
    assert metadata["best_top1"] > 0 and metadata["validation"] is not None
    first = read_weights(only_run(tmp_path / "out") / "best.ckpt")[1]
    assert first["epoch"] in (1, 3) and first["best_top1"] == metadata["best_top1"]


@pytest.mark.slow
def test_resuming_elsewhere_or_otherwise(image_root, tmp_path):
    run = execute(command(1, image_root, tmp_path / "out", "--max_steps=15"))
    assert run.status == 0, run
    refused = execute(command(1, image_root, tmp_path / "out", "--resume=auto", "--lr=0.3"))
    assert refused.status == 2 and "lr=0.02 there and 0.3 here" in refused.error_lines[0], refused
    refused = execute(
        command(1, image_root, tmp_path / "out", "--resume=auto", "--global_batch_size=8")
    )
    assert refused.status == 2 and "keep the global batch" in refused.error_lines[0], refused
    refused = execute(command(1, image_root, tmp_path / "none", "--resume=auto"))
    assert refused.status == 2 and "finds no checkpoint" in refused.error_lines[0], refused
    run = mpirun(2, *command(1, image_root, tmp_path / "out", "--resume=auto")[1:])
    assert run.status == 0 and "it ran on 1 ranks and continues on 2" in run.out, run
    lines = (only_run(tmp_path / "out") / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [12, 24, 36]


@pytest.mark.slow
def test_told_to_stop_and_resumed_ends_with_the_same_bits(image_root, tmp_path, start, undisturbed):
    stopped = tmp_path / "stopped"
    running = start(command(1, image_root, stopped, "--log_interval=1"))
    running.wait_for_text("epoch 2/3 step 4/12")
    running.process.send_signal(signal.SIGTERM)
    run, _ = running.finish(30)
    assert run.status == 143 and "stopped by SIGTERM after step" in run.out, run
    run = execute(command(1, image_root, stopped, "--resume=auto"))
    assert run.status == 0, run
    (expected, _, metrics), (arrays, _, resumed_metrics) = undisturbed(1), outcome(stopped)
    assert (
        all(np.array_equal(arrays[name], expected[name]) for name in expected)
        and resumed_metrics == metrics
    )


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_and_other_images_are_refused(
    image_root, broken_copy, tmp_path
):
    run = execute(command(1, image_root, tmp_path / "out", "--max_steps=15"))
    assert run.status == 0, run
    newest = only_run(tmp_path / "out") / "ckpt_0" / "cifar_quick-2_3.ckpt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.chmod(0o600)
    newest.write_bytes(content)
    (broken_copy / "train" / "ant" / "000.jpg").rename(broken_copy / "train" / "bee" / "more.jpg")
    refused = execute(command(1, broken_copy, tmp_path / "out", "--resume=auto"))
    assert refused.status == 2 and "other images" in refused.error_lines[0], refused
    refused = execute(command(1, image_root, tmp_path / "out", f"--resume={newest}"))
    # Which of the two is seen depends on what the byte belongs to.
    words = ("is damaged", "is truncated")
    assert refused.status == 2 and any(w in refused.error_lines[0] for w in words), refused
    run = execute(command(1, image_root, tmp_path / "out", "--resume=auto", "--max_steps=16"))
    assert run.status == 0 and f"skipped, as damaged or of another run: {newest}" in run.out, run


@pytest.mark.slow
def test_an_epoch_that_was_cut_short_is_reported_once_and_with_its_own_loss(
    image_root, tmp_path, undisturbed
):
    for flags in (["--max_steps=15"], ["--resume=auto", "--max_steps=20"], ["--resume=auto"]):
        run = execute(command(1, image_root, tmp_path / "out", *flags))
        assert run.status == 0, run
    arrays, _, metrics = outcome(tmp_path / "out")
    expected, _, expected_metrics = undisturbed(1)
    assert metrics == expected_metrics and all(
        np.array_equal(arrays[name], expected[name]) for name in expected
    )


@pytest.mark.slow
def test_killed_between_the_best_and_the_last_checkpoint(image_root, tmp_path, undisturbed):
    """What such a kill leaves, made by hand: best.ckpt of the last step, and nothing else."""
    flags = ["--ckpt_interval_steps=0", "--ckpt_interval=3", "--eval_interval=3"]
    run = execute(command(1, image_root, tmp_path / "out", *flags))
    assert run.status == 0, run
    folder = only_run(tmp_path / "out")
    assert read_weights(folder / "best.ckpt")[1]["step"] == 36
    for leftover in (*(folder / "ckpt_0").iterdir(), folder / "latest.ckpt", folder / "curves.png"):
        leftover.unlink()
    run = execute(command(1, image_root, tmp_path / "out", *flags, "--resume=auto"))
    assert run.status == 0, run
    assert (folder / "curves.png").is_file() and (
        folder / "latest.ckpt"
    ).resolve() == folder / "ckpt_0" / "cifar_quick-3_12.ckpt"
    arrays, expected = outcome(tmp_path / "out")[0], undisturbed(1)[0]
    assert all(np.array_equal(arrays[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_two_resumes_of_one_run_at_once_and_a_longer_one(image_root, tmp_path, start):
    words = command(1, image_root, tmp_path / "out", "--lr_scheduler=step", "--log_interval=1")
    running = start(words)
    running.wait_for(lambda: any((tmp_path / "out").glob("*/ckpt_0/cifar_quick-1_5.ckpt")))
    running.process.send_signal(signal.SIGSTOP)
    refused = execute([*words, "--resume=auto"])
    assert refused.status == 2 and "another run is writing to" in refused.error_lines[0], refused
    running.kill()
    # The lock went with the process; with this schedule more epochs change nothing that is past.
    run = execute([*words, "--resume=auto", "--max_epoch=4"])
    assert run.status == 0, run
    lines = (only_run(tmp_path / "out") / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    [
        "adamw",
        pytest.param("nesterov", marks=pytest.mark.extended),
        pytest.param("lars(trust=0.01)", marks=pytest.mark.extended),
    ],
)
def test_every_optimizer_and_augmentation_resumes_to_the_same_bits(image_root, tmp_path, optimizer):
    more = [
        f"--optimizer={optimizer}",
        "--augmentations=crop, flip, color_jitter, randaugment, random_erasing, mixup, cutmix",
    ]
    outcomes = []
    for name, parts in (("whole", [[]]), ("parts", [["--max_steps=17"], ["--resume=auto"]])):
        for flags in parts:
            run = execute(command(1, image_root, tmp_path / name, *more, *flags))
            assert run.status == 0, run
        outcomes.append(outcome(tmp_path / name))
    (expected, _, metrics), (arrays, _, resumed_metrics) = outcomes
    assert sum(name.startswith("optimizer.") for name in expected) >= 14 and set(arrays) == set(
        expected
    )
    assert (
        all(np.array_equal(arrays[name], expected[name]) for name in expected)
        and resumed_metrics == metrics
    )


@pytest.mark.slow
def test_a_run_that_goes_back_forgets_what_came_later(image_root, tmp_path):
    """Later checkpoints were taken by the next --resume=auto, and a later best.ckpt stayed."""
    words = command(1, image_root, tmp_path / "out", "--ckpt_interval=1", "--ckpt_interval_steps=0")
    assert execute(words).status == 0
    folder = only_run(tmp_path / "out")
    write_best_of(folder, folder / "ckpt_0" / "cifar_quick-3_12.ckpt")
    first = folder / "ckpt_0" / "cifar_quick-1_12.ckpt"
    run = execute([*words, f"--resume={first}", "--max_steps=24"])
    assert run.status == 0 and f"later steps to {folder}/superseded" in run.out, run
    kept = sorted(file.name for file in (folder / "ckpt_0").iterdir())
    assert kept == ["cifar_quick-1_12.ckpt", "cifar_quick-2_12.ckpt"]
    assert read_weights(folder / "best.ckpt")[1]["epoch"] == 2
    run = execute([*words, "--resume=auto"])
    assert run.status == 0 and "superseded" not in run.out, run
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]


def write_best_of(folder, checkpoint):
    """Make best.ckpt that of the last epoch."""
    (folder / "best.ckpt").unlink()
    shutil.copy(checkpoint, folder / "best.ckpt")


@pytest.mark.slow
def test_checkpoints_are_kept_by_their_steps_whatever_the_clock_said(image_root, tmp_path):
    words = command(1, image_root, tmp_path / "out", "--ckpt_interval=1", "--ckpt_interval_steps=0")
    words.append("--keep_checkpoint_max=2")
    assert execute([*words, "--max_steps=24"]).status == 0
    folder = only_run(tmp_path / "out")
    for file in (folder / "ckpt_0").iterdir():
        os.utime(file, (2 * 10**9, 2 * 10**9))
    (folder / "ckpt_0" / "mine.ckpt").write_text("a copy of the user's")
    assert execute([*words, "--resume=auto"]).status == 0
    kept = sorted(file.name for file in (folder / "ckpt_0").iterdir())
    assert kept == ["cifar_quick-2_12.ckpt", "cifar_quick-3_12.ckpt", "mine.ckpt"]
    assert (folder / "latest.ckpt").resolve().name == "cifar_quick-3_12.ckpt"


@pytest.mark.slow
def test_a_run_keeps_its_global_batch(image_root, tmp_path):
    """An epoch of 48 images has three steps of 13 images or of 16, and an order of its own."""
    words = command(1, image_root, tmp_path / "out", "--ckpt_interval=1")
    assert execute([*words, "--global_batch_size=13", "--max_steps=2"]).status == 0
    run = execute([*words, "--global_batch_size=16", "--resume=auto"])
    assert run.status == 2 and "keep the global batch: --global_batch_size=13" in run.err, run


@pytest.mark.slow
def test_a_run_that_was_stopped_before_its_last_evaluation_stops_early_all_the_same(
    image_root, tmp_path
):
    """A signal in the last step of an epoch leaves its evaluation to the resumed run."""
    words = command(1, image_root, tmp_path / "out", "--ckpt_interval_steps=0", "--warmup_epochs=0")
    words += ["--early_stopping=1", "--lr=1e-30", "--ckpt_interval=1", "--max_epoch=4"]
    assert execute(words).status == 0
    folder = only_run(tmp_path / "out")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    stopped_at = json.loads(lines[-1])["epoch"]
    assert stopped_at < 4
    # What such a signal leaves: the state of the last step, of an epoch that is not finished.
    last = folder / "latest.ckpt"
    change_metadata(last.resolve(), finished_epoch=False, since_best=0)
    run = execute([*words, "--resume=auto"])
    assert run.status == 0 and "stopping early" in run.out, run
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == stopped_at


def change_metadata(path, **changes):
    arrays, metadata = read_weights(path)
    parameters = [Parameter(Tensor(array), name=name) for name, array in arrays.items()]
    save_checkpoint(path, parameters, {**metadata, **changes})


@pytest.mark.slow
def test_a_run_that_never_evaluated_deploys_its_last_weights(image_root, tmp_path):
    words = command(1, image_root, tmp_path / "out", "--max_epoch=1", "--run_eval=0")
    assert execute(words).status == 0
    run = execute([*words, "--resume=auto", "--run_eval=1", "--deploy=best"])
    assert run.status == 0 and "warning: there is no best.ckpt" in run.out, run


@pytest.mark.extended
def test_images_that_grow_resume_to_the_same_bits(image_root, tmp_path):
    """One step of 32 images an epoch: stopped after the second size of images."""
    words = [
        "train.py",
        f"--data_path={image_root}/train",
        "--network=wrn16_8_cifar",
        "--train_crop=padded",
        "--image_size=32",
        "--progressive_size=16",
        "--max_epoch=4",
        "--per_batch_size=32",
        "--run_eval=1",
        "--threads=1",
    ]
    saved = []
    for name, parts in (("whole", [[]]), ("parts", [["--max_steps=2"], ["--resume=auto"]])):
        for flags in parts:
            run = execute(["python3", *words, f"--output_path={tmp_path / name}", *flags])
            assert run.status == 0, run
        saved.append(read_weights(only_run(tmp_path / name) / "latest.ckpt")[0])
    log = (only_run(tmp_path / "whole") / "log.txt").read_text()
    assert [line.split("training on ")[1] for line in log.splitlines() if "-pixel" in line] == [
        "16-pixel images from epoch 1",
        "24-pixel images from epoch 2",
        "32-pixel images from epoch 4",
    ]
    assert all(np.array_equal(saved[0][name], saved[1][name]) for name in saved[0])
    longer = execute(
        ["python3", *words, f"--output_path={tmp_path}/parts", "--max_epoch=8", "--resume=auto"]
    )
    assert longer.status == 2 and "max_epoch=4 there and 8 here" in longer.error_lines[0], longer


@pytest.mark.slow
def test_a_resumed_run_says_what_stays_and_what_has_changed(image_root, tmp_path):
    """best.ckpt and fused.ckpt stayed those of the first epoch, and were taken for the newest."""
    words = command(1, image_root, tmp_path, "--ckpt_interval_steps=0", "--max_steps=12")
    assert execute([*words, "--deploy=1"]).status == 0
    folder = only_run(tmp_path)
    assert (folder / "fused.ckpt").exists()
    run = execute([*words, "--max_steps=16", "--run_eval=0", "--resume=auto"])
    assert run.status == 0, run
    assert "warning: best.ckpt stays as it was" in run.out and "it ran with" not in run.out, run
    assert not (folder / "fused.ckpt").exists() and (folder / "superseded/fused.ckpt").exists()
