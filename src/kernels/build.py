"""Builds the kernels into the virtual environment:

    python3 -m src.kernels.build HEADERS COMPILER [ARGUMENT ...]

HEADERS is the folder that contains oneDNN's oneapi/dnnl/dnnl.hpp. COMPILER is a C++ compiler with
its arguments, such as `g++` or `python3 -m ziglang c++`. `--check` instead exits with status 0 if
the kernels are built.

The library links to a copy of the oneDNN inside MindSpore, under another name. So the two can be
limited to different instructions: MindSpore's plain layouts are slow with AVX-512, while blocked
layouts are fast with it.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from src.kernels.library import LIBRARY, SOURCES, TESTED, library_folder
from src.utils.errors import UserError

# Both have the same length, so that one can replace the other inside the file.
_NAME, _OWN_NAME = b"libdnnl.so.3\0", b"libacnn.so.3\0"
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-s")
# For the loops around oneDNN, which chooses instructions for itself.
_AVX2 = {"ziglang": ("-march=x86_64_v3",), "other": ("-mavx2", "-mfma")}


def build(headers: Path, compiler: list[str]) -> Path:
    """Compile and test the library, and move it into its folder, which is returned.

    Raises:
        UserError: if the library cannot be built or computes wrong results.
    """
    target = library_folder()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial.", dir=target.parent))
    try:
        onednn = partial / _OWN_NAME.decode().rstrip("\0")
        _copy_onednn(onednn)
        flags = (*_FLAGS, *_AVX2["ziglang" if "ziglang" in compiler else "other"], f"-I{headers}")
        _run(
            [
                *compiler,
                *flags,
                *map(str, sorted(SOURCES.glob("*.cpp"))),
                str(onednn),
                "-Wl,-rpath,$ORIGIN",
                "-o",
                str(partial / LIBRARY),
            ],
            "compilation failed",
        )
        _run(
            [sys.executable, "-m", "src.kernels.testing", str(partial / LIBRARY)],
            "the self-test failed",
        )
        (partial / TESTED).touch()
        partial.chmod(0o755)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for other in target.parent.iterdir():
        if other != target:
            shutil.rmtree(other, ignore_errors=True)
    return target


def _copy_onednn(target: Path) -> None:
    spec = find_spec("mindspore")
    library = Path(spec.origin).parent / "lib" / "libdnnl.so.3" if spec and spec.origin else None
    content = library.read_bytes() if library and library.is_file() else b""
    if content.count(_NAME) != 1:
        raise UserError("this MindSpore contains no known oneDNN")
    target.write_bytes(content.replace(_NAME, _OWN_NAME))


def _run(argv: list[str], problem: str) -> None:
    try:
        finished = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as failure:
        raise UserError(f"{problem}: {argv[0]}: {failure.strerror}") from None
    if finished.returncode:
        lines = [line for line in finished.stdout.splitlines() if line.strip()]
        reason = next(
            (line for line in lines if "error" in line),
            lines[-1] if lines else f"status {finished.returncode}",
        )
        raise UserError(f"{problem}: {reason}")


def main(arguments: list[str]) -> int:
    if arguments == ["--check"]:
        return 0 if (library_folder() / TESTED).is_file() else 1
    if len(arguments) < 2:
        print(__doc__)
        return 2
    try:
        build(Path(arguments[0]), arguments[1:])
    except (UserError, OSError) as failure:
        print(f"no fast kernels for CPU: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
