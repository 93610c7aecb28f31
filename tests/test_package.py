"""An installed package: the command acnet, and the program from Python, outside the checkout."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, Started, execute, only_run

SCRIPTS = "setup|check_dataset|pack_dataset|preview_dataset"
# They name scripts to run them, or for who keeps the checkout.
OF_SCRIPTS = ("command.py", "dependencies.py")
pytestmark = pytest.mark.extended


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A new environment with the wheel; it sees the dependencies that are installed here."""
    folder = tmp_path_factory.mktemp("package")
    # pip builds inside the checkout, where two tests would meet.
    copy = folder / "checkout"
    unneeded = shutil.ignore_patterns(
        ".*", "__pycache__", "outputs", "build", "*.egg-info", "tests"
    )
    shutil.copytree(ROOT, copy, ignore=unneeded)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", folder, copy], check=True)
    (wheel,) = folder.glob("acnet_mindspore-*.whl")
    subprocess.run([sys.executable, "-m", "venv", folder / "env"], check=True)
    python = folder / "env" / "bin" / "python3"
    (packages,) = (folder / "env" / "lib").glob("python3.*/site-packages")
    (dependencies,) = (path for path in sys.path if path.endswith("site-packages"))
    (packages / "dependencies.pth").write_text(dependencies)
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", wheel], check=True)
    return folder / "env" / "bin"


@pytest.fixture
def act(installed, tmp_path):
    """act(words): what a user of that environment gets, whose own code is a package ``src``."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "__init__.py").write_text("OWN = True\n")
    path = f"{installed}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    return lambda *words: execute(words, tmp_path, PATH=path, PYTHONPATH="")


def test_commands_train_evaluate_predict_and_export(act, image_root, tmp_path):
    data, rate = f"--data_path={image_root}/train", "--lr=0.02"
    run = act("acnet", "train", data, *TINY, rate, "--max_epoch=2", "--run_eval=1", "--deploy=best")
    assert run.status == 0 and "acnet predict --checkpoint_file_path=" in run.out, run
    checkpoint = only_run(tmp_path / "outputs") / "best.ckpt"
    run = act("acnet", "eval", f"--checkpoint_file_path={checkpoint}", "--result_path=e.json")
    assert run.status == 0, run
    assert json.loads((tmp_path / "e.json").read_text())[0]["images"] == 67
    run = act("acnet", "predict", f"--checkpoint_file_path={checkpoint}", f"{image_root}/val/bee")
    assert run.status == 0 and run.out.count("000.jpg") == 1, run
    run = act("acnet", "export", f"--checkpoint_file_path={checkpoint}", "--file_format=ONNX")
    assert run.status == 0 and list(tmp_path.rglob("*.onnx")), run


def test_completion_is_printed(act):
    run = act("acnet", "completion")
    assert run.status == 0 and "complete -o default -F _acnet_complete" in run.out, run


def test_ranks_start_with_mpirun_and_without(act):
    words = ("train", "--run_distribute=1", "--max_steps=2", "--run_eval=0")
    run = act("mpirun", "-n", "2", "acnet", *words)
    assert run.status == 0 and "on 2 x CPU" in run.out, run
    run = act("acnet", "launch", "--nproc_per_node=2", "train.py", *words[1:])
    assert run.status == 0 and "on 2 x CPU" in run.out, run


def test_setup_builds_the_kernels_of_the_package(act, kernels):
    run = act("acnet", "train", "--max_steps=1")
    assert "oneDNN's kernels are about twice" in run.out and "acnet setup builds them" in run.out, (
        run
    )
    run = act("acnet", "setup")
    assert run.status == 0, run
    run = act("acnet", "train", "--max_steps=1", "--kernels=onednn")
    assert run.status == 0, run


def test_the_documents_example(act, image_root, trained_run, tmp_path):
    """docs/python.md, word for word, with other photos and fewer steps."""
    (code,) = re.findall(r"(?s)```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text())
    quick = "network='cifar_quick', image_size=32, per_batch_size=4, lr=0.02, max_epoch=2, ranks=2"
    code = code.replace("max_epoch=5", quick).replace("resnet18", str(trained_run / "best.ckpt"))
    (tmp_path / "my_photos").symlink_to(image_root / "train")
    (tmp_path / "more_photos").symlink_to(image_root / "val")
    (tmp_path / "folder_of_photos").symlink_to(image_root / "val" / "cat")
    (tmp_path / "photo.jpg").symlink_to(image_root / "val" / "bee" / "003.jpg")
    (tmp_path / "use.py").write_text(f"import src\nassert src.OWN\n{code}")
    run = act("python3", "use.py")
    assert run.status == 0 and "on 2 x CPU" in run.out and "epoch 2/2 loss" in run.out, run
    lines = run.out.splitlines()
    assert any(line.startswith("bee 0.") for line in lines), run
    assert (
        sum(line == f"folder_of_photos/{n:03d}.jpg cat" for n in range(30) for line in lines) > 15
    )
    assert float(lines[-1]) > 90, run


def test_errors_and_networks_in_python(act, tmp_path):
    (tmp_path / "use.py").write_text(
        """
from acnet_mindspore import UserError, create_network, fit

for flags in ({"data_path": "nowhere"}, {"data_path": "digits", "leraning_rate": 1}):
    try:
        fit(**flags)
    except UserError as failure:
        print("refused:", failure)
network = create_network("resnet18", 5, block="acb", image_size=64)
print("parameters:", sum(parameter.size for parameter in network.trainable_params()))
"""
    )
    run = act("python3", "use.py")
    assert run.status == 0 and "refused: data_path 'nowhere' does not exist" in run.out, run
    assert "refused: unknown flag '--leraning_rate'" in run.out, run
    # torchvision's ResNet-18 has 11,179,077 for 5 classes; the two thinner kernels of each 3x3 and
    # their batch norms come on top.
    assert int(run.out.split("parameters:")[1]) > 11_179_077 * 1.5, run


@pytest.mark.parametrize(
    "words,status,text", [(["trian"], 2, "did you mean 'train'"), (["--help"], 0, "preview")]
)
def test_what_can_be_typed_is_said(act, words, status, text):
    run = act("acnet", *words)
    assert run.status == status and text in run.out + run.err, run


def test_nothing_of_the_checkout_is_needed(installed):
    (package,) = Path(installed).parent.glob("lib/python3.*/site-packages/acnet_mindspore")
    for file in package.rglob("*.py"):
        text = file.read_text()
        assert "from src" not in text and "import src" not in text, file
        # Messages name the commands that are there; docstrings need not.
        tree = ast.parse(text)
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and id(node) not in docstrings:
                named = re.search(rf"scripts/({SCRIPTS})|python3 \w+\.py", str(node.value))
                assert not named or file.name in OF_SCRIPTS, (file, node.value)


def test_a_signal_ends_an_installed_command_as_it_does_in_the_checkout(installed, tmp_path):
    """Nothing may start a thread before the signals are blocked, or it would receive them."""
    (package,) = Path(installed).parent.glob("lib/python3.*/site-packages/acnet_mindspore")
    code = (
        "import sys; from acnet_mindspore.src.cli import run; "
        "print(*sorted({'numpy', 'cv2', 'pydantic', 'mindspore'} & set(sys.modules)))"
    )
    run = execute([installed / "python3", "-c", code], tmp_path)
    assert run.status == 0 and not run.out.strip(), run
    words = [installed / "acnet", "train", "--max_epoch=1000", f"--output_path={tmp_path}/out"]
    started = Started(words, tmp_path)
    started.wait_for_text("epoch 3/1000 loss")
    started.process.terminate()
    run, _ = started.finish(60)
    assert run.status == 128 + 15 and (only_run(tmp_path / "out") / "latest.ckpt").exists(), run


def test_setup_takes_no_arguments(act):
    run = act("acnet", "setup", "--help")
    assert run.status == 2 and len(run.error_lines) == 1, run
