"""docs/extending.md, word for word: each addition is made from outside src/ and used."""

import re
import shutil

import numpy as np
import pytest
import yaml
from conftest import ROOT, execute, only_run

from src.models.weight_files import read_weights

TEXT = (ROOT / "docs" / "extending.md").read_text()
SECTIONS = (
    "A network",
    "A block",
    "An optimizer",
    "A schedule",
    "A loss",
    "An augmentation",
    "A data source",
    "An export format",
)
SCRIPT = """
import sys
sys.path[:0] = [{root!r}, {here!r}]
{entry}
import {command}
from src.cli.run import run
run({command}.main, {command}.__doc__)
"""


def example(section):
    """(name of the file, its text, the entry) of a section of the document."""
    part = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S)[1]
    file, entry = re.findall(r"```python\n(.*?)```", part, re.S)
    return re.match(r"# (\w+\.py)", file)[1], file, entry


@pytest.fixture
def extended(tmp_path):
    """extended(section) -> a function that runs a command with the addition of that section."""

    def add(section):
        name, text, entry = example(section)
        (tmp_path / name).write_text(text)

        def run(command, *flags):
            script = tmp_path / f"run_{command}.py"
            script.write_text(
                SCRIPT.format(root=str(ROOT), here=str(tmp_path), entry=entry, command=command)
            )
            finished = execute(["python3", script, *flags])
            assert finished.status == 0, finished
            return finished

        return run

    return add


def train(run, tmp_path, *flags):
    run(
        "train",
        "--config_path=digits",
        "--max_steps=2",
        f"--output_path={tmp_path}/out",
        "--run_eval=0",
        *flags,
    )
    return only_run(tmp_path / "out") / "latest.ckpt"


def test_each_addition_is_a_file_of_under_30_lines_and_one_entry():
    for section in SECTIONS:
        _, file, entry = example(section)
        assert len(file.splitlines()) + len(entry.splitlines()) < 30, section


def test_a_network(extended, tmp_path):
    run = extended("A network")
    checkpoint = train(run, tmp_path, "--network=tiny", "--block=acb")
    assert (
        "355 images"
        in run("eval", f"--checkpoint_file_path={checkpoint}", "--data_path=digits").out
    )
    fused = tmp_path / "fused.ckpt"
    run("export", f"--checkpoint_file_path={checkpoint}", f"--result_path={fused}")
    assert set(read_weights(fused)[0]) == {
        f"{name}.{leaf}" for name in ("conv1", "conv2", "classifier") for leaf in ("weight", "bias")
    }


def test_a_block(extended, tmp_path):
    run = extended("A block")
    checkpoint = train(run, tmp_path, "--block=twin")
    exported = run(
        "export", f"--checkpoint_file_path={checkpoint}", f"--result_path={tmp_path}/fused.ckpt"
    )
    assert float(re.search(r"difference (\S+)", exported.out)[1]) < 1e-5
    assert "conv1.weight" in read_weights(tmp_path / "fused.ckpt")[0]


def test_an_optimizer(extended, tmp_path):
    checkpoint = train(
        extended("An optimizer"), tmp_path, "--optimizer=rmsprop(smoothing=0.9)", "--lr=0.001"
    )
    arrays, _ = read_weights(checkpoint)
    assert all(
        arrays[f"optimizer.square_mean.{name}"].max() > 0
        for name in ("classifier.weight", "fc1.weight")
    )


@pytest.mark.slow
def test_an_augmentation(extended, tmp_path):
    run = extended("An augmentation")
    train(run, tmp_path, "--augmentations=crop, grayscale(probability=0.5)")


@pytest.mark.slow
def test_a_data_source(extended, tmp_path):
    random, folder = np.random.default_rng(0), tmp_path / "arrays"
    folder.mkdir()
    for split in ("train", "val"):
        np.savez(
            folder / f"{split}.npz",
            images=random.integers(0, 256, (64, 32, 32, 3), np.uint8),
            labels=np.arange(64) % 4,
        )
    run = extended("A data source")
    checkpoint = train(run, tmp_path, f"--data_path={folder}")
    evaluated = run("eval", f"--checkpoint_file_path={checkpoint}", f"--data_path={folder}")
    assert "64 images" in evaluated.out


def test_a_schedule(extended, tmp_path):
    run = extended("A schedule")
    checkpoint = train(run, tmp_path, "--lr_scheduler=polynomial(power=1.5)", "--max_epoch=1")
    config = yaml.safe_load((checkpoint.parent / "config.yaml").read_text())
    assert config["lr_scheduler"] == "polynomial(power=1.5)"


@pytest.mark.slow
def test_a_loss(extended, tmp_path):
    train(extended("A loss"), tmp_path, "--loss=focal(gamma=1.5)")


@pytest.mark.slow
def test_an_export_format(extended, tmp_path):
    run = extended("An export format")
    checkpoint = train(run, tmp_path, "--block=acb")
    target = tmp_path / "weights.npz"
    exported = run(
        "export",
        f"--checkpoint_file_path={checkpoint}",
        "--file_format=NPZ",
        f"--result_path={target}",
    )
    assert float(re.search(r"difference (\S+)", exported.out)[1]) < 1e-5
    assert "conv1.weight" in np.load(target)


def test_a_key(tmp_path):
    part = TEXT.partition("## A configuration key")[2]
    field = re.search(r"```python\n(.*?)```", part, re.S)[1]
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    config = tmp_path / "src" / "cli" / "config.py"
    config.write_text(
        config.read_text().replace("    network: str = key", field + "    network: str = key", 1)
    )
    code = (
        "from src.cli.config import *; from src.cli.recipes import load_config; "
        "c = load_config({'cutout_pixels': '4', 'data_path': 'x'}); "
        "print(c.cutout_pixels, 'cutout_pixels' in keys_affecting(Affects.TRAINING), "
        "'cutout_pixels: 4' in c.to_yaml(), 'cutout_pixels: 0 ' in default_yaml())"
    )
    run = execute(["python3", "-c", code], cwd=tmp_path)
    assert run.out.split() == ["4", "True", "True", "True"], run


@pytest.mark.extended
def test_model_trains_on_the_batches(tmp_path):
    """mindspore.train.Model, as in the document, from the checkout."""
    part = re.search(r"^## mindspore.train.Model\n(.*?)(?=^## )", TEXT, re.M | re.S)[1]
    script = tmp_path / "train_with_model.py"
    script.write_text(re.search(r"```python\n(.*?)```", part, re.S)[1])
    run = execute(["python3", script], PYTHONPATH=str(ROOT))
    assert run.status == 0 and "epoch: 4 step: 45, loss is " in run.out, run
    assert float(re.search(r"'accuracy': ([\d.]+)", run.out)[1]) > 0.9, run
