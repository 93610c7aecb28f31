"""TAB completion after `python3 train.py`, in a real bash."""

import re
import subprocess

import pytest

from acnet_mindspore.command import COMMANDS
from src.cli.help import completion_script


def test_every_command_of_the_package_is_completed():
    script = completion_script()
    (listed,) = re.findall(r'= 1 \]; then\n.*compgen -W "(.*?)"', script)
    assert set(listed.split()) == set(COMMANDS)


@pytest.mark.parametrize(
    "words,found",
    [
        ("python3 train.py --free", ["--freeze_epochs="]),
        ("python3 ./eval.py --test", ["--test_flip="]),
        ("python3 train.py --network = resnet1", ["resnet18"]),
        ("python3 train.py --block =", ["base", "acb", "repvgg", "dbb"]),
        ("python3 train.py --config_path = fine", ["finetune"]),
        ("python3 train.py --amp_level = O", ["O0", "O2", "O3"]),
        ("python3 train.py --run_eval =", ["0", "1"]),
        ("python3 train.py --deploy =", ["best", "0", "1"]),
        ("python3 train.py --lr =", []),
        ("python3 other.py --free", []),
        ("python3 other.py data/train --free", []),
        ("acnet pre", ["predict", "preview"]),
        ("acnet train --free", ["--freeze_epochs="]),
        ("acnet train --block =", ["base", "acb", "repvgg", "dbb"]),
    ],
)
def test_tab(words, found):
    typed = words.split(" ")
    run = f"""{completion_script()}
COMP_WORDS=({" ".join(f"'{word}'" for word in typed)}); COMP_CWORD={len(typed) - 1}
_acnet_complete; printf '%s\\n' "${{COMPREPLY[@]}}" """
    finished = subprocess.run(["bash", "-c", run], capture_output=True, text=True)
    assert finished.stdout.split() == found and finished.returncode == 0, finished
