"""The command ``acnet`` of an installed package: `acnet COMMAND [ARGUMENT ...]`."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from src.utils import errors

# The folder of the scripts. src.cli.config knows it too, but needs packages that may be missing.
ROOT = Path(errors.__file__).resolve().parents[2]
# {command: (its script, what it does)}.
COMMANDS = {
    "train": ("train.py", "train or fine-tune"),
    "eval": ("eval.py", "evaluate checkpoints"),
    "export": ("export.py", "write CKPT, SAFETENSORS, MINDIR or ONNX"),
    "predict": ("predict.py", "classify images"),
    "serve": ("serve.py", "classify over HTTP"),
    "report": ("report.py", "write an HTML page about runs"),
    "preview": ("scripts/preview_dataset.py", "show what a network sees of a data set"),
    "check": ("scripts/check_dataset.py", "find damaged images in a data set"),
    "pack": ("scripts/pack_dataset.py", "pack a data set into few files"),
    "launch": ("scripts/launch.py", "start several processes, also on several machines"),
    "completion": ("", 'print bash\'s TAB completion: eval "$(acnet completion)"'),
    "setup": ("scripts/finish_setup.sh", "build the kernels for CPU, and prepare mpirun"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Become the script of the command that the arguments name."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
        return
    if name not in COMMANDS:
        near = errors.suggestion(name, COMMANDS)
        sys.exit(_error(f"unknown command '{name}'{near}; acnet --help lists all"))
    if name == "completion":
        package = errors.__name__.removesuffix(".utils.errors")
        os.execv(sys.executable, [sys.executable, "-m", f"{package}.cli.help", *rest])
    script = ROOT / COMMANDS[name][0]
    if script.suffix == ".sh":
        os.execvp("bash", ["bash", str(script), sys.executable, *rest])
    os.execv(sys.executable, [sys.executable, str(script), *rest])


def _help() -> str:
    lines = [f"  {name:<10} {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["acnet COMMAND [ARGUMENT ...]; --help after a command describes it", *lines])


def _error(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return 2
