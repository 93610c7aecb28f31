"""Launchers: arguments, usage lines, mpirun's command."""

import importlib.util
import io
import os
import shutil
import sys

import pytest
from conftest import ROOT, execute


@pytest.fixture(scope="module")
def launch():
    sys.path.insert(0, str(ROOT / "scripts"))
    spec = importlib.util.spec_from_file_location("launch", ROOT / "scripts" / "launch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "ranks,cores,expected", [(2, 8, "slot:PE=4"), (2, 2, "slot:PE=1"), (8, 2, "slot:OVERSUBSCRIBE")]
)
def test_cores_are_divided_and_shared_only_when_short(launch, ranks, cores, expected):
    command = launch.mpirun_command(
        launch.parse([f"--nproc_per_node={ranks}", "train.py", "--lr=1"]), "train.py", cores
    )
    assert expected in command and command[-2:] == ["train.py", "--lr=1"]


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--nproc_per_node=2", "--visible_devices=0", "train.py"], "names 1 devices"),
        (["--nproc_per_node=0", "train.py"], "at least 1"),
        (["nowhere.py"], "does not exist"),
        (["--nproc=2", "train.py"], "unrecognized|required|does not exist"),
        (["--env_sh=/nowhere.sh", "train.py"], "/nowhere.sh"),
        ([], "script"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message):
    import re

    run = execute(["python3", "scripts/launch.py", *arguments])
    assert (
        run.status == 2
        and len(run.err.splitlines()) == 1
        and re.search(message, run.error_lines[0])
    ), run


def test_an_error_of_the_ranks_is_one_line():
    """mpirun's own paragraph about it, and the command that --ranks stands for, are not shown."""
    run = execute(["python3", "train.py", "--ranks=2", "--output_path=/proc/nowhere"])
    assert run.status == 2 and len(run.err.splitlines()) == 1, run
    assert "cannot write to output_path" in run.error_lines[0] and "mpirun" not in run.out, run


@pytest.mark.parametrize(
    "ends,words", [("sys.exit(3)", "non-zero status"), ("os.kill(os.getpid(), 9)", "signal 9")]
)
def test_mpirun_reports_what_no_rank_does(tmp_path, ends, words):
    (tmp_path / "silent.py").write_text(f"import os, sys\n{ends}\n")
    run = execute(["python3", "scripts/launch.py", "--nproc_per_node=2", tmp_path / "silent.py"])
    assert run.status != 0 and words in run.err, run


def test_an_error_line_passes_at_once_and_mpiruns_report_in_the_end(launch):
    """Whichever comes first, and also if a rank's line arrives within mpirun's paragraph."""
    rule, report, error = "-" * 74 + "\n", "a rank exited with non-zero status\n", "error: x\n"
    for lines, shown in (
        ([rule, report, rule, error], error),
        ([rule, report, error, rule], error),
        ([rule, report, rule], rule + report + rule),
        ([rule, "a host is lost\n", rule, error], rule + "a host is lost\n" + rule + error),
    ):
        found = io.BytesIO()
        launch.pass_on(io.BytesIO("".join(lines).encode()), found)
        assert found.getvalue().decode() == shown


@pytest.mark.parametrize(
    "environment,passed",
    [
        ({}, set()),
        ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, {"ONEDNN_MAX_CPU_ISA"}),
        # A process of this program, which limits MindSpore's own kernels only, or the user's limit.
        ({"ONEDNN_MAX_CPU_ISA": "AVX2", "ACNET_KERNELS_ISA": ""}, set()),
        ({"ONEDNN_MAX_CPU_ISA": "AVX2", "ACNET_KERNELS_ISA": "AVX"}, {"ACNET_KERNELS_ISA"}),
    ],
)
def test_the_limit_of_instructions_reaches_other_machines(launch, monkeypatch, environment, passed):
    names = ("ONEDNN_MAX_CPU_ISA", "ACNET_KERNELS_ISA")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert {*launch.passed_on(dict(os.environ))} & {*names} == passed


def test_environment_file_reaches_the_ranks(tmp_path):
    (tmp_path / "env.sh").write_text("export OF_THE_SEED='a b'\n")
    (tmp_path / "show.py").write_text(
        "import os; print(os.environ['OF_THE_SEED'], os.environ['CUDA_VISIBLE_DEVICES'])"
    )
    run = execute(
        [
            "python3",
            "scripts/launch.py",
            "--nproc_per_node=2",
            "--visible_devices=3,5",
            f"--env_sh={tmp_path}/env.sh",
            tmp_path / "show.py",
        ]
    )
    assert run.status == 0 and run.out.count("a b 3,5\n") == 2, run


SCRIPTS = [
    "run_standalone_train.sh",
    "run_standalone_train_for_gpu.sh",
    "run_distribute_train.sh",
    "run_distribute_train_for_gpu.sh",
    "run_eval.sh",
]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["0"],
        ["/nowhere"],
        ["0", "tests", "/nowhere.ckpt"],
        ["tests", "tests", "tests", "tests"],
        [""],
    ],
)
def test_anything_else_is_one_line_with_the_usage(script, arguments):
    run = execute(["bash", f"scripts/{script}", *arguments])
    assert (
        run.status == 2
        and len(run.err.splitlines()) == 1
        and "usage: bash scripts/run_" in run.error_lines[0]
    ), run


@pytest.fixture
def written_commands(tmp_path):
    """A function: a script's arguments -> the words of the Python command that it becomes."""
    stand_in = tmp_path / "bin" / "python3"
    stand_in.parent.mkdir()
    stand_in.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(0o755)
    scripts = tmp_path / "scripts"  # no .venv next to it
    shutil.copytree(ROOT / "scripts", scripts)
    (tmp_path / "data").mkdir()
    (tmp_path / "x.ckpt").write_text("")
    (tmp_path / "table.json").write_text(
        '{"server_list": [{"device": [{"device_id": "0"}, {"device_id": "1"}]}]}'
    )

    def words(script, *arguments, **environment):
        run = execute(
            ["bash", scripts / script, *arguments],
            cwd=tmp_path,
            PATH=f"{stand_in.parent}:/usr/bin:/bin",
            **environment,
        )
        assert run.status == 0, run
        return run.out.splitlines()

    return words


# The model zoo's forms (research/cv/ResNeXt/scripts) first, then ours.
@pytest.mark.parametrize(
    "script,arguments,expected",
    [
        (
            "run_standalone_train.sh",
            ["3", "data"],
            {"--run_distribute=0", "--device_id=3", "--data_path=data", "--output_path=./output"},
        ),
        (
            "run_standalone_train.sh",
            ["3", "data", "x.ckpt"],
            {"--device_id=3", "--data_path=data", "--checkpoint_file_path=x.ckpt"},
        ),
        (
            "run_standalone_train_for_gpu.sh",
            ["1", "data", "x.ckpt"],
            {"--device_target=GPU", "--device_id=1", "--checkpoint_file_path=x.ckpt"},
        ),
        (
            "run_distribute_train_for_gpu.sh",
            ["data", "x.ckpt"],
            {
                "--nproc_per_node=8",
                "--run_distribute=1",
                "--device_target=GPU",
                "--data_path=data",
                "--checkpoint_file_path=x.ckpt",
                "--output_path=./output",
            },
        ),
        (
            "run_distribute_train.sh",
            ["table.json", "data"],
            {"--nproc_per_node=2", "--device_target=Ascend", "--data_path=data"},
        ),
        (
            "run_eval.sh",
            ["2", "data", "x.ckpt", "GPU"],
            {
                "--device_id=2",
                "--data_path=data",
                "--checkpoint_file_path=x.ckpt",
                "--device_target=GPU",
            },
        ),
        (
            "run_standalone_train.sh",
            ["data", "Ascend", "3", "--lr=0.1"],
            {"--device_target=Ascend", "--device_id=3", "--lr=0.1"},
        ),
        (
            "run_distribute_train.sh",
            ["4", "data", "GPU", "--lr=0.1"],
            {"--nproc_per_node=4", "--device_target=GPU", "--lr=0.1"},
        ),
        (
            "run_eval.sh",
            ["data", "x.ckpt", "CPU"],
            {"--device_target=CPU", "--data_path=data", "--checkpoint_file_path=x.ckpt"},
        ),
    ],
)
def test_shell_launchers_take_the_model_zoos_forms_and_ours(
    written_commands, script, arguments, expected
):
    assert expected <= set(written_commands(script, *arguments))


def test_the_number_of_gpus_is_rank_size(written_commands):
    assert "--nproc_per_node=4" in written_commands(
        "run_distribute_train_for_gpu.sh", "data", RANK_SIZE="4"
    )


@pytest.mark.slow
def test_shell_launchers_run(image_root, tmp_path):
    common = ["--image_size=32", "--network=cifar_quick", "--per_batch_size=4", "--max_steps=2"]
    for number, command in enumerate(
        (
            ["run_standalone_train.sh", "0", f"{image_root}/train"],
            ["run_distribute_train.sh", "2", f"{image_root}/train", "CPU"],
        )
    ):
        run = execute(
            [
                "bash",
                f"scripts/{command[0]}",
                *command[1:],
                *common,
                f"--output_path={tmp_path}/{number}",
            ]
        )
        assert run.status == 0, run
    (checkpoints,) = (tmp_path / "1").glob("*/ckpt_0")
    run = execute(
        ["bash", "scripts/run_eval.sh", "0", f"{image_root}/val", str(checkpoints), "CPU"]
    )
    assert run.status == 0 and "67 images" in run.out, run
