"""Build the kernels into the virtual environment: `python3 -m src.kernels.build HEADERS COMPILER [ARGUMENT ...]`.

HEADERS is the folder with oneDNN's oneapi/dnnl/dnnl.hpp, COMPILER a C++ compiler with its arguments: `g++`, or `python3 -m ziglang c++`.
`--check` in their place tells by its status whether they are built.

The library links to a copy of the oneDNN inside MindSpore under a name of its own. So the two can be held to different instructions:
MindSpore's plain layouts are slow with AVX-512, blocked ones are fast with it.
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

# Of one length, so that one can stand in the other's place in the file.
_NAME, _OWN_NAME = b"libdnnl.so.3\0", b"libacnn.so.3\0"
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-s")
# oneDNN chooses by the processor itself; this is for the loops around it.
_AVX2 = {"ziglang": ("-march=x86_64_v3",), "other": ("-mavx2", "-mfma")}


def build(headers: Path, compiler: list[str]) -> Path:
    """Compile, test, and put the library into its folder, which is returned.

    Raises:
        UserError: with the reason, if it cannot be built or computes something wrong.
    """
    target = library_folder()
    target.parent.mkdir(parents=True, exist_ok=True)
    growing = Path(tempfile.mkdtemp(prefix=".growing.", dir=target.parent))
    try:
        onednn = growing / _OWN_NAME.decode().rstrip("\0")
        _copy_onednn(onednn)
        flags = (*_FLAGS, *_AVX2["ziglang" if "ziglang" in compiler else "other"], f"-I{headers}")
        _run([*compiler, *flags, *map(str, sorted(SOURCES.glob("*.cpp"))), str(onednn), "-Wl,-rpath,$ORIGIN",
              "-o", str(growing / LIBRARY)], "they cannot be compiled")
        _run([sys.executable, "-m", "src.kernels.selftest", str(growing / LIBRARY)], "they do not compute what they should")
        (growing / TESTED).touch()
        growing.chmod(0o755)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(growing, target)
    finally:
        shutil.rmtree(growing, ignore_errors=True)
    for other in target.parent.iterdir():
        if other != target:
            shutil.rmtree(other, ignore_errors=True)
    return target


def _copy_onednn(target: Path) -> None:
    spec = find_spec("mindspore")
    library = Path(spec.origin).parent / "lib" / "libdnnl.so.3" if spec and spec.origin else None
    content = library.read_bytes() if library and library.is_file() else b""
    if content.count(_NAME) != 1:
        raise UserError("this MindSpore has no oneDNN that is known")
    target.write_bytes(content.replace(_NAME, _OWN_NAME))


def _run(words: list[str], problem: str) -> None:
    try:
        finished = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                  errors="replace", check=False)
    except OSError as failure:
        raise UserError(f"{problem}: {words[0]}: {failure.strerror}") from None
    if finished.returncode:
        lines = [line for line in finished.stdout.splitlines() if line.strip()]
        reason = next((line for line in lines if "error" in line), lines[-1] if lines else f"status {finished.returncode}")
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
