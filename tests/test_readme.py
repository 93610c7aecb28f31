"""Every command in the README and the documents works, here or in the test that is named."""

import contextlib
import fcntl
import json
import re
import shlex
import shutil
import subprocess
import tempfile
import urllib.request
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import ROOT, execute, user_environment

from src.cli.flags import parse_flags
from src.cli.recipes import load_config

DOCUMENTS = (
    "README.md",
    *sorted(str(file.relative_to(ROOT)) for file in (ROOT / "docs").glob("*.md")),
)
DATE = "2026-01-31_time_12_00_00"
COMMANDS = ("train", "eval", "export", "predict", "report", "serve")


def shown(document="README.md"):
    """The commands of a document, in lines of their own and among words."""
    text = (ROOT / document).read_text()
    blocks = re.findall(r"(?m)^    (\S.*)$", text)
    inline = re.findall(r"`((?:python3|mpirun|bash|source) [^`]*)`", text)
    commands = [line.partition("  #")[0].strip() for line in blocks + inline]
    return [
        command
        for command in dict.fromkeys(commands)
        if command.startswith(("python3", "mpirun", "bash"))
    ]


def lines_of(document):
    """The lines of a document that are typed, in order."""
    return re.findall(
        r"(?m)^    ((?:python3|mpirun|bash|curl|find) .*)$", (ROOT / document).read_text()
    )


# Lines of seeds.md are of other programs, and their own test runs them.
@pytest.mark.parametrize(
    "document", [document for document in DOCUMENTS if document != "docs/seeds.md"]
)
def test_scripts_and_flags_that_are_shown_exist(document):
    for command in shown(document):
        words = shlex.split(command.replace("[", "").replace("]", "").replace("...", ""))
        for word in words:
            if word.endswith((".py", ".sh")) and "/path" not in word:
                assert word in ("acnet/do_acnet.py",) or (ROOT / word).is_file(), command
        ours = [
            index for index, word in enumerate(words) if word in {f"{name}.py" for name in COMMANDS}
        ]
        if ours and "--help" not in words and "--list" not in words:
            flags, _ = parse_flags(words[ours[-1] + 1 :])
            load_config(
                {
                    key: value
                    for key, value in flags.items()
                    if "/" not in value
                    and value.isupper() is False
                    or key in ("file_format", "device_target")
                }
            )


@pytest.mark.parametrize("document", (*DOCUMENTS, "CONTRIBUTING.md", "benchmarks/README.md"))
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text()
    for target, _, anchor in (
        found.partition("#") for found in re.findall(r"\]\((?!https?:)([^)]*)\)", text)
    ):
        place = (ROOT / document).parent / target if target else ROOT / document
        assert place.exists(), f"{document}: {target}"
        headings = (
            [
                re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
                for heading in re.findall(r"(?m)^#+ (.*)$", place.read_text())
            ]
            if anchor
            else []
        )
        assert not anchor or anchor in headings, f"{document}: {target}#{anchor}"


def test_tests_that_the_list_of_seeds_names_exist():
    named = set(
        re.findall(
            r"\btest_\w+(?!\.py)\b",
            re.sub(r"tests/[\w/]+\.py", "", (ROOT / "docs/seeds.md").read_text()),
        )
    )
    assert len(named) >= 9 and named <= set(
        re.findall(r"def (test_\w+)", (ROOT / "tests/test_seeds.py").read_text())
    )


@pytest.mark.extended
def test_short_training_commands_of_the_documents_run(tmp_path):
    # tests/test_extending.py runs what extending.md adds.
    every = {
        command
        for document in DOCUMENTS
        if document != "docs/extending.md"
        for command in shown(document)
    }
    commands = sorted(
        command
        for command in every
        if re.search(r"python3 (scripts/launch.py .*)?train.py.*config_path=digits", command)
        and "..." not in command
        and "--dry_run" not in command
    )
    assert len(commands) >= 4
    for command in commands:
        run = execute([*shlex.split(command), "--max_steps=2", f"--output_path={tmp_path}/out"])
        assert run.status == 0, run


@pytest.mark.extended
def test_quickstart(tmp_path):
    """The README's first command, in a copy with this environment."""
    import os
    import sys

    copy = tmp_path / "copy"
    shutil.copytree(
        ROOT, copy, ignore=shutil.ignore_patterns(".venv", ".git", "outputs", "__pycache__")
    )
    (copy / ".venv").symlink_to(os.path.dirname(os.path.dirname(sys.executable)))
    if not (copy / ".venv" / "installed").exists():
        pytest.skip("quickstart.sh wants the environment that scripts/setup.sh makes")
    run = execute(["bash", "scripts/quickstart.sh"], cwd=copy, timeout=400)
    assert run.status == 0, run
    found = re.fullmatch(
        r"quickstart: top1=([\d.]+) top5=([\d.]+) fused_top1=([\d.]+) fused_max_diff=(\S+) "
        r"seconds=\d+",
        run.out.splitlines()[-1],
    )
    assert float(found[1]) >= 97 and found[1] == found[3] and 0 < float(found[4]) < 1e-4, run
    assert (copy / run.out.splitlines()[-2].partition(": ")[2]).is_file()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder as the documents presume it: the program, photos, and weights."""
    from safetensors.numpy import save_file

    from src.models.create import create_model
    from src.models.networks import torch_name

    for file in (
        "train.py",
        "eval.py",
        "report.py",
        "predict.py",
        "export.py",
        "serve.py",
        "scripts",
        "src",
        "configs",
    ):
        (tmp_path / file).symlink_to(ROOT / file)
    random = np.random.default_rng(0)
    for number in range(15):
        for label, name in enumerate(("cat", "dog")):
            image = random.integers(0, 120, (60, 80, 3), np.uint8)
            image[:, :, label] += 120
            for folder in (
                (f"my_photos/{name}", "holiday_photos") if number < 2 else (f"my_photos/{name}",)
            ):
                (tmp_path / folder).mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(tmp_path / folder / f"{name}{number}.jpg"), image)
    # Where docs/weights.md says to put the file on a machine without a network.
    weights = tmp_path / "cache/acnet-mindspore/weights/resnet18.tv_in1k/model.safetensors"
    weights.parent.mkdir(parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_file(
        {
            torch_name(p.name, "resnet18"): p.asnumpy()
            for p in create_model("resnet18", 1000).get_parameters()
        },
        weights,
    )
    return tmp_path


@pytest.mark.extended
def test_the_tutorial_word_for_word(home):
    """Only the dates are replaced by the real one."""
    lines = lines_of("docs/tutorial.md")
    assert [re.search(r"(\w+)\.py", line)[1] for line in lines] == [
        "preview_dataset",
        "train",
        "train",
        "report",
        "predict",
        "export",
        "serve",
    ]
    for line in lines[:-1]:
        words = shlex.split(line)
        # What is shortened: the sides of images, and with them the epochs.
        small = ["--image_size=64", "--max_epoch=3"] if "train.py" in line else []
        run = execute([*words, *small], cwd=home)
        assert run.status == 0, run
        if "--ranks=auto" in words:
            (made,) = (home / "outputs").iterdir()
            made.rename(made.with_name(DATE))
            assert "of each class:" in run.out and "next: python3 predict.py" in run.out, run
    assert (home / "preview.png").is_file() and (home / "outputs" / DATE / "report.html").is_file()
    assert len((home / "found.csv").read_text().splitlines()) == 1 + 4 * 2
    assert (home / "outputs" / DATE / "best_int8.onnx").is_file()
    with _started(lines[-1], home):
        body = (home / "holiday_photos" / "dog0.jpg").read_bytes()
        assert (
            b"predictions" in urllib.request.urlopen("http://127.0.0.1:8000/predict", body).read()
        )


@pytest.mark.extended
@pytest.mark.parametrize(
    "document", ["README.md", "docs/data.md", "docs/training.md", "docs/using.md"]
)
def test_lines_of_a_document_in_their_order(home, image_root, trained_run, document):
    """Word for word, with a folder for /path/to and DIR, and only a few steps of small images."""
    (home / "path/to").mkdir(parents=True)
    (home / "path/to/imagenet").symlink_to(image_root)
    (home / "folder_of_photos").symlink_to("holiday_photos")
    (home / "photo.jpg").symlink_to("holiday_photos/cat0.jpg")
    (home / "list_of_photos.txt").write_text("photo.jpg\nmy_photos/dog/dog3.jpg\n")
    (home / "best.ckpt").symlink_to(trained_run / "best.ckpt")
    for date in (DATE, "2026-02-01_time_09_30_00"):
        shutil.copytree(trained_run, home / "outputs" / date, symlinks=True)
    lines = [line for line in lines_of(document) if not line.startswith("bash")]
    assert len(lines) >= 4
    with contextlib.ExitStack() as servers:
        for line in lines:
            typed = line.partition("  #")[0].replace("/path/to", str(home / "path/to"))
            typed = typed.replace("=DIR", "=path/to/imagenet")
            if "train.py" in typed:
                typed += (
                    " --max_steps=25"
                    if "config_path=digits" in typed
                    else " --max_steps=2 --image_size=64"
                )
                typed += "" if "config_path" in typed else " --per_batch_size=4"
            if "serve.py" in typed:
                servers.enter_context(_started(typed, home))
                continue
            run = execute(["bash", "-o", "pipefail", "-c", typed], cwd=home)
            assert run.status == 0, run
            if "curl" in typed:
                assert len(json.loads(run.out)["predictions"]) == 3, run
            if "/path/to/out" in line and "train.py" in line:
                for made in (home / "path/to/out").iterdir():
                    if made.name != DATE:
                        shutil.rmtree(home / "path/to/out" / DATE, ignore_errors=True)
                        made.rename(made.with_name(DATE))
            if "--resume=auto" in typed:
                assert "resuming from" in run.out, run


class _started:
    """A server that runs until the end of the block, on the port that documents name.

    One test at a time.
    """

    def __init__(self, line, folder):
        self._line, self._folder = line, folder

    def __enter__(self):
        self._lock = open(Path(tempfile.gettempdir()) / "acnet-test-of-port-8000", "w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._process = subprocess.Popen(
            shlex.split(self._line),
            cwd=self._folder,
            env=user_environment(),
            text=True,
            stdout=subprocess.PIPE,
        )
        line = self._process.stdout.readline()
        if "serving" not in line:
            self._process.kill()
            raise AssertionError(line)

    def __exit__(self, *exception):
        self._process.terminate()
        status = self._process.wait(60)
        self._lock.close()
        assert status == 0
