"""Every command that the README shows works, or is run by the test named beside it."""

import re
import shlex

import pytest
from conftest import ROOT, execute

from src.utils.config import load_config, parse_flags


def shown(document="README.md"):
    text = (ROOT / document).read_text()
    blocks = re.findall(r"(?m)^    (\S.*)$", text)
    inline = re.findall(r"`((?:python3|mpirun|bash|source) [^`]*)`", text)
    commands = [line.partition("  #")[0].strip() for line in blocks + inline]
    return [command for command in dict.fromkeys(commands) if command.startswith(("python3", "mpirun", "bash"))]


def test_scripts_in_the_readme_exist():
    for command in shown():
        for word in shlex.split(command.replace("[", "").replace("]", "")):
            if word.endswith((".py", ".sh")) and "/path" not in word:
                assert word in ("acnet/do_acnet.py",) or (ROOT / word).is_file(), command


def test_flags_in_the_readme_are_keys():
    for command in shown():
        if "torch.distributed" in command or not re.search(r"(train|eval|export|predict)\.py", command):
            continue
        if "--help" in command or "--list" in command:
            continue  # tests/test_help.py
        words = shlex.split(command.replace("...", ""))
        start = max(index for index, word in enumerate(words) if word.endswith(".py"))
        flags, _ = parse_flags(words[start + 1:])
        load_config({key: value for key, value in flags.items() if "/" not in value and value.isupper() is False or key in
                     ("file_format", "device_target")})


def test_tests_that_the_list_of_seeds_names_exist():
    named = set(re.findall(r"\btest_\w+(?!\.py)\b", re.sub(r"tests/[\w/]+\.py", "", (ROOT / "docs/seeds.md").read_text())))
    assert len(named) >= 9 and named <= set(re.findall(r"def (test_\w+)", (ROOT / "tests/test_seeds.py").read_text()))


@pytest.mark.slow
def test_short_training_commands_of_the_documents_run(tmp_path):
    commands = [command for command in (*shown(), *shown("docs/recipes.md")) if "config_path=digits" in command and "..." not in command]
    assert len(commands) >= 4
    for command in commands:
        run = execute([*shlex.split(command), "--max_steps=2", f"--output_path={tmp_path}/out"])
        assert run.status == 0, run


@pytest.mark.slow
def test_quickstart(tmp_path):
    """The main job end to end, in a copy with this environment, as the first README command runs it."""
    import os
    import shutil
    import sys
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv", ".git", "outputs", "__pycache__"))
    (copy / ".venv").symlink_to(os.path.dirname(os.path.dirname(sys.executable)))
    if not (copy / ".venv" / "installed").exists():
        pytest.skip("quickstart.sh wants the environment that scripts/setup.sh makes")
    run = execute(["bash", "scripts/quickstart.sh"], cwd=copy, timeout=400)
    assert run.status == 0, run
    found = re.fullmatch(r"quickstart: top1=([\d.]+) top5=([\d.]+) fused_top1=([\d.]+) fused_max_diff=(\S+) seconds=\d+",
                         run.out.splitlines()[-1])
    assert float(found[1]) >= 97 and found[1] == found[3] and 0 < float(found[4]) < 1e-4, run
    assert (copy / run.out.splitlines()[-2].partition(": ")[2]).is_file()
