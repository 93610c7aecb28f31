"""Compiling the kernels of MindSpore's GPU plug-in for a GPU that is newer than they are: once for a machine, on all its cores.

The plug-in has machine code for compute capability 8 and below. Before the first operation on a newer GPU the driver compiles all of its
modules, which takes it minutes on one core, and keeps the result ("Just-in-Time Compilation", CUDA C++ Programming Guide).
Processes that each load a share of the modules fill the same cache.
"""

import ctypes
import fcntl
import mmap
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

_NEWEST_MACHINE_CODE = 8
_MAJOR_CAPABILITY = 75  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
# A module: magic number, version and size of this header, then the size of what follows (fatbinary_section.h of CUDA's toolkit).
_HEADER = struct.Struct("<IHHQ")
_MAGIC = struct.pack("<IHH", 0xBA55ED50, 1, _HEADER.size)
_DRIVER = "libcuda.so.1"


class Progress(Protocol):
    """What is told of each module."""

    def advance(self) -> None: ...


def compile_kernels(library: Path, device_id: int, processes: int, watch: Callable[[int], AbstractContextManager[Progress]]) -> None:
    """Have the driver compile the modules of ``library`` for GPU ``device_id``, if it has to and has not; after ``check_device``.

    Whatever fails here is left to the driver, which compiles when the library is used.

    Args:
        watch: called with the number of modules when they are about to be compiled; told of each that is.
    """
    driver = ctypes.CDLL(_DRIVER)
    major, version = ctypes.c_int(0), ctypes.c_int(0)
    unknown = driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR_CAPABILITY, device_id)
    if unknown or major.value <= _NEWEST_MACHINE_CODE or os.environ.get("CUDA_CACHE_DISABLE") == "1":
        return
    driver.cuDriverGetVersion(ctypes.byref(version))
    cache = Path(os.environ.get("CUDA_CACHE_PATH") or Path.home() / ".nv" / "ComputeCache")
    try:
        about = library.stat()
        done = cache / f"compiled-{major.value}-{version.value}-{about.st_size}-{about.st_mtime_ns}"
        cache.mkdir(parents=True, exist_ok=True)
        with open(cache / "compiling", "w") as lock:
            # The ranks of a machine come here together; one compiles.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists() and _compile(library, device_id, processes, watch):
                done.touch()
    except OSError:
        return


def _compile(library: Path, device_id: int, processes: int, watch: Callable[[int], AbstractContextManager[Progress]]) -> bool:
    with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        count = len(list(modules(content)))
    reading, writing = os.pipe()
    environment = {**os.environ, "CUDA_MODULE_LOADING": "EAGER"}
    workers = [subprocess.Popen([sys.executable, __file__, str(library), str(device_id), str(number), str(processes)], stdout=writing,
                                stderr=subprocess.DEVNULL, env=environment) for number in range(processes)]
    os.close(writing)
    with open(reading, "rb") as lines, watch(count) as progress:
        for _ in lines:
            progress.advance()
    statuses = [worker.wait() for worker in workers]
    return not any(statuses)


def modules(content: mmap.mmap) -> Iterator[tuple[int, int]]:
    """(place, size) of each module in a library's content, in bytes."""
    place = content.find(_MAGIC)
    while place >= 0:
        size = _HEADER.size + _HEADER.unpack_from(content, place)[3]
        whole = _HEADER.size < size <= len(content) - place
        if whole:
            yield place, size
        place = content.find(_MAGIC, place + (size if whole else 1))


def load_share(library: str, device_id: int, number: int, processes: int) -> None:
    """Load every ``processes``-th module, from the ``number``-th of them by size, and print a line for each. Raises OSError."""
    driver, device, context, module = ctypes.CDLL(_DRIVER), ctypes.c_int(0), ctypes.c_void_p(), ctypes.c_void_p()
    _check(driver.cuInit(0))
    _check(driver.cuDeviceGet(ctypes.byref(device), device_id))
    _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
    _check(driver.cuCtxSetCurrent(context))
    with open(library, "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    start = ctypes.addressof(ctypes.c_char.from_buffer(content))
    # The largest take longest, so that each process begins with one of them.
    for place, _ in sorted(modules(content), key=lambda found: -found[1])[number::processes]:
        _check(driver.cuModuleLoadFatBinary(ctypes.byref(module), ctypes.c_void_p(start + place)))
        _check(driver.cuModuleUnload(module))
        print(flush=True)


def _check(status: int) -> None:
    if status:
        raise OSError(f"the driver answers {status}")


if __name__ == "__main__":
    load_share(sys.argv[1], *map(int, sys.argv[2:5]))
