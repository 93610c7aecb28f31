"""Shared fixtures: real image folders, commands run as a user runs them."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from src.utils.device import prepare_process  # noqa: E402

prepare_process()

import mindspore  # noqa: E402

mindspore.set_context(mode=mindspore.GRAPH_MODE)
mindspore.set_device("CPU")

TINY = ("--image_size=32", "--network=cifar_quick", "--train_crop=padded", "--per_batch_size=4")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Keep compiled graphs out of the user's cache, and share them within this session."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


class Run:
    """A finished command: its status, output and errors.

    ``error_lines`` are the lines that begin with error:.
    """

    def __init__(self, command, finished):
        self.command, self.status = " ".join(map(str, command)), finished.returncode
        self.out, self.err = finished.stdout, finished.stderr
        self.error_lines = [line for line in self.err.splitlines() if line.startswith("error:")]

    def __repr__(self):
        return f"{self.command}\nstatus {self.status}\n{self.out[-3000:]}\n{self.err[-3000:]}"


def user_environment(**changes):
    """The environment of an activated .venv and what Open MPI asks of root."""
    return {
        **os.environ,
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        **changes,
    }


def execute(command, cwd=ROOT, timeout=400, **environment):
    """Run ``command`` as a user does."""
    finished = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=user_environment(**environment),
        timeout=timeout,
        text=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )
    return Run(command, finished)


def mpirun_words(ranks, *command):
    """The command line of a Python script on ``ranks`` ranks."""
    return ["mpirun", "--map-by", ":OVERSUBSCRIBE", "-n", str(ranks), "python3", *map(str, command)]


def mpirun(ranks, *command, **options):
    """Run a Python script on ``ranks`` ranks."""
    return execute(mpirun_words(ranks, *command), **options)


class Started:
    """A command that runs while a test acts on it; its session is killed in the end."""

    def __init__(self, command, folder, **environment):
        self.command, self._out, self._err = (
            command,
            Path(folder) / "out.txt",
            Path(folder) / "err.txt",
        )
        # A killed mpirun leaves a folder there by which a later one with the same process number
        # fails to start.
        environment = user_environment(TMPDIR=str(folder), **environment)
        with open(self._out, "w") as out, open(self._err, "w") as err:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                cwd=ROOT,
                env=environment,
                stdout=out,
                stderr=err,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def wait_for(self, condition, timeout=240):
        """Wait until ``condition()`` holds."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, (
                f"it ended before: {self._out.read_text()}{self._err.read_text()}"
            )
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def wait_for_text(self, text):
        self.wait_for(lambda: text in self.output())

    def output(self):
        """What it has written to standard output so far."""
        return self._out.read_text()

    def errors(self):
        """What it has written to standard error so far."""
        return self._err.read_text()

    def ranks(self):
        """Process numbers of the ranks, in order of rank."""
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                variables = dict(
                    pair.split("=", 1)
                    for pair in (entry / "environ").read_text().split("\0")
                    if "=" in pair
                )
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError, IndexError):
                continue
            if parent == self.process.pid and "OMPI_COMM_WORLD_RANK" in variables:
                found[int(variables["OMPI_COMM_WORLD_RANK"])] = int(entry.name)
        return [found[rank] for rank in sorted(found)]

    def finish(self, timeout):
        """Wait for the end; the Run and the seconds that it took."""
        started = time.monotonic()
        status = self.process.wait(timeout)
        finished = subprocess.CompletedProcess(
            self.command, status, self._out.read_text(), self._err.read_text()
        )
        return Run(self.command, finished), time.monotonic() - started

    def kill(self):
        """kill -9 of the whole session."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def only_run(output_path):
    """The one run folder in ``output_path``."""
    (folder,) = Path(output_path).iterdir()
    return folder


def write_image_folder(root, split, classes, per_class, size=(40, 32), seed=0):
    """JPEG files of coloured noise, one folder per class; the colour shows the class."""
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
    run = execute(
        [
            "python3",
            "train.py",
            f"--data_path={image_root}/train",
            f"--output_path={output}",
            *TINY,
            "--block=acb",
            "--max_epoch=2",
            "--lr=0.02",
            "--run_eval=1",
            "--ckpt_interval=1",
        ]
    )
    assert run.status == 0, run
    return only_run(output)


@pytest.fixture
def start(tmp_path):
    """Start a command that a test acts on: start(words) -> Started."""
    started = []

    def begin(words):
        started.append(Started(words, tmp_path))
        return started[-1]

    yield begin
    for one in started:
        if one.process.poll() is None:
            one.kill()


@pytest.fixture
def measured(record_property):
    """measured(text): print a figure that a test found at the end of the whole run."""
    return lambda text: record_property("measured", text)


def pytest_terminal_summary(terminalreporter):
    """The figures of ``measured``."""
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    found = [
        text for report in reports for name, text in report.user_properties if name == "measured"
    ]
    if found:
        terminalreporter.section("measured")
        for text in found:
            terminalreporter.write_line(text)


@pytest.fixture(scope="session")
def kernels():
    """The library of oneDNN's kernels, for one thread."""
    from src.kernels.library import KernelsUnavailable, open_library

    try:
        return open_library(1)
    except KernelsUnavailable as failure:
        # With a compiler set-up builds them, and their absence is a defect.
        assert not (shutil.which("g++") and os.uname().machine == "x86_64"), failure
        return pytest.skip(f"no kernels: {failure}")


@pytest.fixture
def broken_copy(image_root, tmp_path):
    """A copy of ``image_root`` that a test may damage."""
    shutil.copytree(image_root, tmp_path / "copy")
    return tmp_path / "copy"


def randomise(network, seed=0):
    """Give batch norms random scales, offsets and running statistics.

    Then no term of a formula vanishes.
    """
    random = np.random.default_rng(seed)
    for parameter in network.get_parameters():
        kind = parameter.name.rpartition(".")[2]
        if kind in ("moving_variance", "gamma"):
            parameter.set_data(
                mindspore.Tensor(random.uniform(0.5, 1.5, parameter.shape).astype(np.float32))
            )
        elif kind in ("moving_mean", "beta"):
            parameter.set_data(
                mindspore.Tensor(random.normal(0, 0.2, parameter.shape).astype(np.float32))
            )


def make_config(**values):
    """A resolved configuration with ``values`` over the defaults."""
    from src.cli.recipes import load_config

    return load_config({"data_path": "none", **values})
