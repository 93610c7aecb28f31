"""Compiling GPU kernels ahead, with a stand-in driver that notes what it is given.

There may be no GPU.
"""

import mmap
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from src.utils.gpu_kernels import modules

DRIVER = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
int cuInit(unsigned f) {return 0;}
int cuDeviceGet(int *d, int n) {*d = n; return 0;}
int cuDevicePrimaryCtxRetain(void **c, int d) {return 0;}
int cuCtxSetCurrent(void *c) {return 0;}
int cuModuleUnload(void *m) {return 0;}
int cuDriverGetVersion(int *v) {*v = 13000; return 0;}
int cuDeviceGetAttribute(int *value, int attribute, int d) {
    *value = attribute == 75 ? atoi(getenv("CAPABILITY")) : 0;
    return 0;
}
int cuModuleLoadFatBinary(void **m, const char *module) {
    if (strcmp(getenv("CUDA_MODULE_LOADING"), "EAGER")) return 1;
    FILE *log = fopen(getenv("LOADED"), "a");
    fprintf(log, "%.1s", module + 16);
    return fclose(log) + (module[16] == *getenv("BROKEN"));
}
"""
pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="no compiler for a stand-in driver")


@pytest.fixture
def compiled(tmp_path):
    """A function.

    Compiles the modules a, b, c, d of a library, and returns (what the driver loaded, what was
    told).
    """
    (tmp_path / "driver.c").write_text(DRIVER)
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", tmp_path / "driver.c"],
        check=True,
    )
    library = tmp_path / "kernels.so"
    library.write_bytes(
        b"ELF" * 7
        + b"".join(
            struct.pack("<IHHQ", 0xBA55ED50, 1, 16, 8 * size) + letter * 8 * size + bytes(size)
            for letter, size in ((b"a", 1), (b"b", 5), (b"c", 3), (b"d", 2))
        )
        + struct.pack("<IHHQ", 0xBA55ED50, 1, 16, 1 << 40)
    )
    log = tmp_path / "loaded"
    code = (
        "import contextlib; from pathlib import Path; from src.utils.gpu_kernels import "
        "compile_kernels\n"
        "class Told:\n    def advance(self): print('one', end=' ')\n"
        f"compile_kernels(Path({str(library)!r}), 0, lambda count: print(count, end=' ') or "
        "contextlib.nullcontext(Told()))"
    )

    def run(**environment):
        log.write_text("")
        told = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
            env={
                **os.environ,
                "LD_LIBRARY_PATH": str(tmp_path),
                "CUDA_CACHE_PATH": str(tmp_path / "cache"),
                "LOADED": str(log),
                "CAPABILITY": "9",
                "BROKEN": "-",
                **environment,
            },
        )
        return "".join(sorted(log.read_text())), told.stdout.split()

    run.library = library
    return run


def test_each_module_is_compiled_once_for_a_machine(compiled):
    assert compiled() == ("abcd", ["4", "one", "one", "one", "one"])
    assert compiled() == ("", [])
    compiled.library.touch()  # another version of MindSpore
    assert compiled()[0] == "abcd"


def test_older_gpus_and_a_cache_that_is_off_compile_nothing(compiled):
    assert compiled(CAPABILITY="8") == ("", [])
    assert compiled(CUDA_CACHE_DISABLE="1") == ("", [])


def test_what_fails_is_tried_again_next_time(compiled):
    loaded, told = compiled(BROKEN="b")
    assert "b" in loaded and len(told) < 5
    assert compiled()[0] == "abcd"


def test_the_plug_in_of_mindspore_has_its_modules():
    import mindspore

    path = Path(mindspore.__file__).parent / "lib" / "plugin" / "gpu" / "libcuda_ops.so.11"
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        assert len(list(modules(content))) == 407
