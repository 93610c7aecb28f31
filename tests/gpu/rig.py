"""Runs the project on a null GPU: see null_gpu.py."""

import json
import platform
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from conftest import execute, mpirun_words

HERE = Path(__file__).parent


def missing():
    """What this machine lacks for a null GPU, or None."""
    if platform.machine() != "x86_64":
        return "the stand-ins are written in assembler for x86-64"
    lacking = [name for name in ("gcc", "nm") if not shutil.which(name)]
    if lacking:
        return f"{' and '.join(lacking)} not installed (Debian: apt-get install gcc binutils)"
    plugins = Path(find_spec("mindspore").origin).parent / "lib" / "plugin" / "gpu"
    return None if plugins.is_dir() else "this MindSpore has no GPU plug-in"


class NullGpu:
    """Runs scripts of the project on a null GPU."""

    def __init__(self, folder):
        self._folder = folder
        subprocess.run([sys.executable, HERE / "generate.py", folder], check=True)

    def run(self, *words, ranks=1, under=(), **environment):
        """A script and its flags, as a user types them after python3.

        Args:
            under: a Python script that starts the process of each rank.
        """
        command = [*under, HERE / "null_gpu.py", *words]
        command = mpirun_words(ranks, *command) if ranks > 1 else ["python3", *command]
        return execute(command, NULL_GPU=str(self._folder), **environment)

    def try_networks(self, *cases):
        """{case: what it asked of the GPU, or its error}; see try_networks.py."""
        run = execute(
            ["python3", HERE / "try_networks.py", *cases], timeout=1800, NULL_GPU=str(self._folder)
        )
        reports = [json.loads(line) for line in run.out.splitlines() if line.startswith("{")]
        assert run.status == 0 and len(reports) == len(cases), run
        return {report["case"]: report for report in reports}
