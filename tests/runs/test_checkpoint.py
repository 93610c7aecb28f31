"""Checkpoints on disk: complete or absent, damage found."""

import multiprocessing
import os
import re
import signal
import time
from dataclasses import fields

import numpy as np
import pytest
from conftest import TINY, execute, only_run
from mindspore import Tensor

from src.models.create import create_model
from src.models.weight_files import read_weights
from src.runs.checkpoint import TrainingState, save_checkpoint
from src.runs.run_folder import (
    RunFolder,
    choose_checkpoint,
    create_run_folder,
    dated_run_folder,
    find_checkpoints,
)
from src.utils.errors import UserError
from src.utils.files import remove_partials


def test_nothing_but_the_checkpoint_is_left(tmp_path):
    save_checkpoint(tmp_path / "a.ckpt", create_model("cifar_quick", 10).get_parameters(), {})
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]


def test_missing_files_are_named(tmp_path):
    for path, message in (
        (tmp_path / "none.ckpt", "does not exist"),
        (tmp_path, "no .ckpt file"),
        ("", "no checkpoint given"),
    ):
        with pytest.raises(UserError, match=message):
            find_checkpoints(str(path))


def test_unwritable_folder_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        save_checkpoint(tmp_path / "file" / "a.ckpt", [], {})


def test_any_flipped_bit_is_found(tmp_path):
    save_checkpoint(
        tmp_path / "a.ckpt", create_model("cifar_quick", 10).get_parameters(), {"epoch": 3}
    )
    content, damaged = (tmp_path / "a.ckpt").read_bytes(), tmp_path / "b.ckpt"
    expected, _ = read_weights(tmp_path / "a.ckpt")
    random = np.random.default_rng(0)
    # Everywhere, and more densely in the beginning, where names, types and shapes are.
    positions = [*random.integers(0, len(content), 60), *random.integers(0, 400, 60)]
    found = 0
    for position in positions:
        flipped = bytearray(content)
        flipped[position] ^= 1 << int(random.integers(8))
        damaged.write_bytes(flipped)
        try:
            arrays, metadata = read_weights(damaged)
        except UserError:
            found += 1
        else:
            # A bit that means nothing; all that the file says is as before, or what it lost is
            # missed by name.
            same = set(arrays) == set(expected) and all(
                np.array_equal(arrays[name], expected[name]) for name in expected
            )
            assert same and metadata == {"epoch": 3} or set(arrays) != set(expected)
    assert found >= 110


def _save_forever(folder):
    parameters = list(create_model("cifar_quick", 10).get_parameters())
    number = 0
    while True:
        number += 1
        save_checkpoint(os.path.join(folder, f"{number % 3}.ckpt"), parameters, {"number": number})


@pytest.mark.slow
def test_kill_9_at_random_moments_of_saving_leaves_whole_files(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mindspore"])
    random, interrupted = np.random.default_rng(0), 0
    for _ in range(20):
        writer = context.Process(target=_save_forever, args=(str(tmp_path),), daemon=True)
        writer.start()
        deadline, before = time.monotonic() + 60, _complete(tmp_path)
        while _complete(tmp_path) == before:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.05))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        interrupted += any(".partial." in name for name in os.listdir(tmp_path))
        for name in _complete(tmp_path):
            assert read_weights(tmp_path / name)[1]["number"] > 0
        remove_partials(tmp_path)
        assert all(name.endswith(".ckpt") and name[0] != "." for name in os.listdir(tmp_path))
    assert interrupted >= 3, "too few of the kills fell into a save"


def _complete(folder):
    """{name: time} of the checkpoints that have their names."""
    return {
        entry.name: entry.stat().st_mtime_ns
        for entry in os.scandir(folder)
        if not entry.name.startswith(".")
    }


@pytest.mark.slow
def test_full_disk_ends_in_one_line_and_keeps_what_was_complete(image_root, tmp_path):
    """A limit on file sizes stands for a full disk.

    The checkpoint fits without momentum, and does not fit with it.
    """
    command = [
        "python3",
        "train.py",
        f"--data_path={image_root}/train",
        f"--output_path={tmp_path}/out",
        *TINY,
        "--max_epoch=2",
        "--lr=0.02",
        "--ckpt_interval_steps=5",
    ]
    first = execute([*command, "--max_steps=5"])
    assert first.status == 0, first
    (complete,) = only_run(tmp_path / "out").glob("ckpt_0/*.ckpt")
    content = complete.read_bytes()
    run = execute(["bash", "-c", f"ulimit -f 300; exec {' '.join(command)} --resume=auto"])
    assert run.status == 2 and re.match(
        r"error: cannot write '.*-1_10\.ckpt': ", run.error_lines[0]
    ), run
    assert len(run.error_lines) == 1 and "Traceback" not in run.err
    assert [file.name for file in complete.parent.iterdir()] == [
        complete.name
    ] and complete.read_bytes() == content
    again = execute([*command, "--resume=auto"])
    assert again.status == 0, again


def test_latest_points_at_the_newest_and_old_ones_go(trained_run):
    assert os.readlink(trained_run / "latest.ckpt") == "ckpt_0/cifar_quick-2_12.ckpt"
    assert read_weights(trained_run / "latest.ckpt")[1]["step"] == 24


def test_half_a_line_of_metrics_is_passed_over(tmp_path):
    folder = create_run_folder(dated_run_folder(str(tmp_path)))
    folder.add_metrics(epoch=1, step=12)
    with open(folder.metrics, "a") as file:
        file.write('{"epoch": 2, "st')
    assert RunFolder(folder.path).read_metrics() == [{"epoch": 1, "step": 12}]


def test_of_a_folder_the_best_or_the_newest_is_taken_and_said(tmp_path):
    for name in ("net-9_5.ckpt", "net-10_5.ckpt", "net-10_3.ckpt"):
        (tmp_path / name).write_text("")
    said = []
    # What was made of a checkpoint is no later one.
    (tmp_path / "net-10_5_exported.ckpt").write_text("")
    (tmp_path / "net-10_5_fused.ckpt").write_text("")
    assert choose_checkpoint(str(tmp_path), said.append).name == "net-10_5.ckpt"
    (tmp_path / "best.ckpt").write_text("")
    assert choose_checkpoint(str(tmp_path), said.append).name == "best.ckpt"
    for line, name in zip(said, ("net-10_5.ckpt", "best.ckpt"), strict=True):
        assert f"{name}, one of" in line
    assert (
        choose_checkpoint(str(tmp_path / "net-9_5.ckpt"), said.append).name == "net-9_5.ckpt"
        and len(said) == 2
    )
    (tmp_path / "run").mkdir()
    for name in ("latest.ckpt", "latest_exported.ckpt"):
        (tmp_path / "run" / name).write_text("")
    assert choose_checkpoint(str(tmp_path / "run"), said.append).name == "latest.ckpt"


def test_what_is_not_finite_is_not_written(tmp_path):
    network = create_model("cifar_quick", 10)
    values = {field.name: 0 for field in fields(TrainingState)}
    state = TrainingState(**{**values, "step": 7})
    state.write(tmp_path / "a.ckpt", network, [])
    parameters = {parameter.name: parameter for parameter in network.get_parameters()}
    parameters["conv1.norm.moving_variance"].set_data(Tensor(np.full(32, np.nan, np.float32)))
    with pytest.raises(UserError, match="moving_variance is not finite after step 7"):
        state.write(tmp_path / "b.ckpt", network, [])
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]
