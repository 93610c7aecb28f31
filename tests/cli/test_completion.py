"""TAB completion after `python3 train.py`, in a real bash."""

import subprocess

import pytest

from src.cli.help import completion_script


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
    ],
)
def test_tab(words, found):
    typed = words.split(" ")
    run = f"""{completion_script()}
COMP_WORDS=({" ".join(f"'{word}'" for word in typed)}); COMP_CWORD={len(typed) - 1}
_acnet_complete; printf '%s\\n' "${{COMPREPLY[@]}}" """
    finished = subprocess.run(["bash", "-c", run], capture_output=True, text=True)
    assert finished.stdout.split() == found and finished.returncode == 0, finished
