"""What a wheel holds: the package acnet_mindspore, and inside it the rest of this checkout.

There `src` becomes `acnet_mindspore.src`, because other projects have a package `src` too, and
messages name the commands of an installed package.
"""

import re
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
COMMANDS = ("train", "eval", "export", "predict", "serve", "report")
FOLDERS = ("src", "scripts", "configs", "constraints", "data")
# From special to general.
SUBSTITUTIONS = (
    (r"(?m)^(\s*)(from|import) src\b", r"\1\2 acnet_mindspore.src"),
    (r"([\"' ])src\.(\w+[.:\"' ])", r"\1acnet_mindspore.src.\2"),
    (r"bash scripts/setup\.sh --kernels installs", "pip install ziglang installs"),
    (r"bash scripts/setup\.sh --kernels\b", "acnet setup"),
    (r"bash scripts/setup\.sh --(\w+)", r"pip install acnet-mindspore[\1]"),
    (r"bash scripts/setup\.sh', then 'source \.venv/bin/activate", "pip install acnet-mindspore"),
    (r"\(scripts/setup\.sh builds them\)", "(acnet setup builds them)"),
    (r"\(scripts/setup\.sh --(\w+)\)", r"(pip's extra \1)"),
    (r"(python3 )?scripts/(preview|check|pack)_dataset\.py", r"acnet \2"),
    (r"python3 scripts/launch\.py", "acnet launch"),
    (r"python3 \{script\}", "acnet {_command_name()}"),
    (r"python3 (train|eval|export|predict|serve|report)\.py", r"acnet \1"),
)


class BuildPackage(build_py):
    """Copies the checkout into the package."""

    def run(self) -> None:
        if self.editable_mode:
            raise SystemExit("error: 'pip install -e' is not supported; use the checkout itself")
        package = Path(self.build_lib) / "acnet_mindspore"
        # What an earlier build has left there would come along.
        shutil.rmtree(package, ignore_errors=True)
        super().run()
        for name in FOLDERS:
            ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
            shutil.copytree(ROOT / name, package / name, ignore=ignore, dirs_exist_ok=True)
        for name in COMMANDS:
            shutil.copy(ROOT / f"{name}.py", package)
        for file in (*package.rglob("*.py"), *package.glob("scripts/*.sh")):
            text = file.read_text(encoding="utf-8")
            for pattern, replacement in SUBSTITUTIONS:
                text = re.sub(pattern, replacement, text)
            file.write_text(text, encoding="utf-8")


setup(cmdclass={"build_py": BuildPackage})
