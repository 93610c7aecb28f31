"""Shared fixtures: real image folders, commands run as a user runs them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from src.utils.device import prepare_process  # noqa: E402

prepare_process(local_rank=0, local_size=1)

import mindspore  # noqa: E402

mindspore.set_context(mode=mindspore.GRAPH_MODE)
mindspore.set_device("CPU")

TINY = ("--image_size=32", "--network=cifar_quick", "--train_crop=padded", "--per_batch_size=4")


class Run:
    """A finished command: its status, output and errors; ``error_lines`` are the lines that begin with error:."""

    def __init__(self, command, finished):
        self.command, self.status = " ".join(map(str, command)), finished.returncode
        self.out, self.err = finished.stdout, finished.stderr
        self.error_lines = [line for line in self.err.splitlines() if line.startswith("error:")]

    def __repr__(self):
        return f"{self.command}\nstatus {self.status}\n{self.out[-3000:]}\n{self.err[-3000:]}"


def execute(command, cwd=ROOT, timeout=240, **environment):
    """Run ``command`` with the environment of an activated .venv and what Open MPI asks of root."""
    folder = os.path.dirname(sys.executable)
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "OMPI_ALLOW_RUN_AS_ROOT": "1",
           "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", **environment}
    finished = subprocess.run([str(word) for word in command], cwd=cwd, env=env, timeout=timeout, text=True,
                              capture_output=True, stdin=subprocess.DEVNULL)
    return Run(command, finished)


def mpirun(ranks, *command, **options):
    """Run a Python script on ``ranks`` ranks."""
    return execute(["mpirun", "--map-by", ":OVERSUBSCRIBE", "-n", ranks, "python3", *command], **options)


def only_run(output_path):
    """The one run folder in ``output_path``."""
    (folder,) = Path(output_path).iterdir()
    return folder


def write_image_folder(root, split, classes, per_class, size=(40, 32), seed=0):
    """JPEG files of coloured noise, one folder a class; the colour tells the class."""
    random = np.random.default_rng(seed)
    for label, name in enumerate(classes):
        folder = Path(root) / split / name
        folder.mkdir(parents=True)
        for number in range(per_class):
            image = random.integers(0, 120, (size[1], size[0], 3), np.uint8)
            image[:, :, label % 3] += 120
            cv2.imwrite(str(folder / f"{number:03d}.jpg"), image)


@pytest.fixture(scope="session")
def image_root(tmp_path_factory):
    """train/ with 3 classes of 16 JPEGs, val/ with 67 images in all."""
    root = tmp_path_factory.mktemp("images")
    write_image_folder(root, "train", ("ant", "bee", "cat"), 16)
    write_image_folder(root, "val", ("ant", "bee", "cat"), 23, seed=1)
    for surplus in ("ant/000.jpg", "ant/001.jpg"):
        (root / "val" / surplus).unlink()
    return root


@pytest.fixture(scope="session")
def trained_run(image_root, tmp_path_factory):
    """The run folder of two epochs of cifar_quick with ACB on ``image_root``."""
    output = tmp_path_factory.mktemp("trained")
    run = execute(["python3", "train.py", f"--data_path={image_root}/train", f"--output_path={output}", *TINY,
                   "--block=acb", "--max_epoch=2", "--lr=0.02", "--run_eval=1", "--ckpt_interval=1"])
    assert run.status == 0, run
    return only_run(output)


@pytest.fixture
def broken_copy(image_root, tmp_path):
    """A copy of ``image_root`` that a test may damage."""
    shutil.copytree(image_root, tmp_path / "copy")
    return tmp_path / "copy"


def randomise(network, seed=0):
    """Give batch norms random scales, offsets and running statistics, so that no term of a formula vanishes."""
    random = np.random.default_rng(seed)
    for parameter in network.get_parameters():
        kind = parameter.name.rpartition(".")[2]
        if kind in ("moving_variance", "gamma"):
            parameter.set_data(mindspore.Tensor(random.uniform(0.5, 1.5, parameter.shape).astype(np.float32)))
        elif kind in ("moving_mean", "beta"):
            parameter.set_data(mindspore.Tensor(random.normal(0, 0.2, parameter.shape).astype(np.float32)))


def make_config(**values):
    """A resolved configuration with ``values`` over the defaults."""
    from src.utils.config import load_config
    return load_config({"data_path": "none", **values})
