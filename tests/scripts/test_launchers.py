"""Launchers: arguments, usage lines, mpirun's command."""

import importlib.util

import pytest
from conftest import ROOT, execute


@pytest.fixture(scope="module")
def launch():
    spec = importlib.util.spec_from_file_location("launch", ROOT / "scripts" / "launch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("ranks,cores,expected", [(2, 8, "slot:PE=4"), (2, 2, "slot:PE=1"), (8, 2, ":OVERSUBSCRIBE")])
def test_cores_are_divided_and_shared_only_when_short(launch, ranks, cores, expected):
    command = launch.mpirun_command(launch.parse([f"--nproc_per_node={ranks}", "train.py", "--lr=1"]), "train.py", cores)
    assert expected in command and command[-2:] == ["train.py", "--lr=1"]


@pytest.mark.parametrize("arguments,message", [
    (["--nproc_per_node=2", "--visible_devices=0", "train.py"], "names 1 devices"),
    (["--nproc_per_node=0", "train.py"], "at least 1"),
    (["nowhere.py"], "does not exist"),
    (["--nproc=2", "train.py"], "unrecognized|required|does not exist"),
    (["--env_sh=/nowhere.sh", "train.py"], "/nowhere.sh"),
    ([], "script"),
])
def test_wrong_arguments_are_one_line(arguments, message):
    import re
    run = execute(["python3", "scripts/launch.py", *arguments])
    assert run.status == 2 and len(run.err.splitlines()) == 1 and re.search(message, run.error_lines[0]), run


def test_environment_file_reaches_the_ranks(tmp_path):
    (tmp_path / "env.sh").write_text("export OF_THE_SEED='a b'\n")
    (tmp_path / "show.py").write_text("import os; print(os.environ['OF_THE_SEED'], os.environ['CUDA_VISIBLE_DEVICES'])")
    run = execute(["python3", "scripts/launch.py", "--nproc_per_node=2", "--visible_devices=3,5",
                   f"--env_sh={tmp_path}/env.sh", tmp_path / "show.py"])
    assert run.status == 0 and run.out.count("a b 3,5\n") == 2, run


@pytest.mark.parametrize("script,usage", [
    ("run_standalone_train.sh", "DATA_PATH"), ("run_distribute_train.sh", "DEVICE_NUM DATA_PATH"),
    ("run_eval.sh", "DATA_PATH CHECKPOINT_FILE_OR_FOLDER")])
def test_shell_launchers_tell_their_usage(script, usage):
    run = execute(["bash", f"scripts/{script}"])
    assert run.status == 2 and len(run.err.splitlines()) == 1 and f"scripts/{script} {usage}" in run.error_lines[0], run


@pytest.mark.slow
def test_shell_launchers_run(image_root, tmp_path):
    common = ["--image_size=32", "--network=cifar_quick", "--per_batch_size=4", "--max_steps=2"]
    for number, command in enumerate((["run_standalone_train.sh", f"{image_root}/train"],
                                      ["run_distribute_train.sh", "2", f"{image_root}/train", "CPU"])):
        run = execute(["bash", f"scripts/{command[0]}", *command[1:], *common, f"--output_path={tmp_path}/{number}"])
        assert run.status == 0, run
    (checkpoints,) = (tmp_path / "1").glob("*/ckpt_0")
    run = execute(["bash", "scripts/run_eval.sh", f"{image_root}/val", str(checkpoints)])
    assert run.status == 0 and "67 images" in run.out, run
