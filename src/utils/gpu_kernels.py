"""Compiles the kernels of MindSpore's GPU plug-in for a GPU that is newer than the plug-in.

The plug-in has machine code for compute capability 8 and below. Before the first operation on a
newer GPU, the driver compiles all modules, which takes minutes on one core, and caches the result
("Just-in-Time Compilation", CUDA C++ Programming Guide). Here several processes, on all cores, load
some of the modules each and fill the same cache: once per machine.
"""

import ctypes
import fcntl
import mmap
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Protocol

_DRIVER = "libcuda.so.1"
_NEWEST_MACHINE_CODE = 8
_MAJOR_CAPABILITY, _MINOR_CAPABILITY = (
    75,
    76,
)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
# Each takes half a GiB of the GPU's memory. The largest module takes as long as all modules do on
# 15 processes (an H200, 16 cores).
_MAX_PROCESSES = 16
# A module: magic number, version and size of this header, then the size of what follows
# (fatbinary_section.h of the CUDA toolkit).
_HEADER = struct.Struct("<IHHQ")
_MAGIC = struct.pack("<IHH", 0xBA55ED50, 1, _HEADER.size)


class Progress(Protocol):
    """Told of each compiled module."""

    def advance(self) -> None: ...


def compile_kernels(
    library: Path, device_id: int, watch: Callable[[int], AbstractContextManager[Progress]]
) -> None:
    """Have the driver compile the modules of ``library`` for GPU ``device_id``, if not yet done.

    On failure nothing is lost: the driver compiles when the library is used.

    Args:
        watch: called with the number of modules before they are compiled, and told of each one.
    """
    with suppress(OSError, ValueError):
        driver, major, minor, version = (
            ctypes.CDLL(_DRIVER),
            ctypes.c_int(0),
            ctypes.c_int(0),
            ctypes.c_int(0),
        )
        _check(driver.cuInit(0))
        _check(driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR_CAPABILITY, device_id))
        _check(driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR_CAPABILITY, device_id))
        _check(driver.cuDriverGetVersion(ctypes.byref(version)))
        if major.value <= _NEWEST_MACHINE_CODE or os.environ.get("CUDA_CACHE_DISABLE") == "1":
            return
        cache, about = (
            Path(os.environ.get("CUDA_CACHE_PATH") or os.path.expanduser("~/.nv/ComputeCache")),
            library.stat(),
        )
        done = (
            cache / f"compiled-{major.value}.{minor.value}-{version.value}-{about.st_size}-"
            f"{about.st_mtime_ns}"
        )
        cache.mkdir(parents=True, exist_ok=True)
        with open(cache / "compiling", "w") as lock:
            # Several programs may begin on a machine together; one compiles.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists() and _compile(library, device_id, watch):
                done.touch()


def _compile(
    library: Path, device_id: int, watch: Callable[[int], AbstractContextManager[Progress]]
) -> bool:
    with (
        open(library, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        count = len(list(modules(content)))
    processes = min(os.cpu_count() or 1, _MAX_PROCESSES)
    environment = {**os.environ, "CUDA_MODULE_LOADING": "EAGER"}
    workers: list[subprocess.Popen[bytes]] = []
    reading, writing = os.pipe()
    try:
        with open(reading, "rb") as lines, watch(count) as progress:
            try:
                for number in range(processes):
                    words = [
                        sys.executable,
                        __file__,
                        str(library),
                        str(device_id),
                        str(number),
                        str(processes),
                    ]
                    workers.append(
                        subprocess.Popen(
                            words, stdout=writing, stderr=subprocess.DEVNULL, env=environment
                        )
                    )
            finally:
                os.close(writing)
            for _ in lines:
                progress.advance()
        return all(status == 0 for status in [worker.wait() for worker in workers])
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


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
    """Load every ``processes``-th module by size, from the ``number``-th; print a line for each.

    Raises:
        OSError: if the driver refuses one.
    """
    # A rank is bound to some of the cores. Use all of them: the other ranks are waiting for this.
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    driver, device, context, module = (
        ctypes.CDLL(_DRIVER),
        ctypes.c_int(0),
        ctypes.c_void_p(),
        ctypes.c_void_p(),
    )
    _check(driver.cuInit(0))
    _check(driver.cuDeviceGet(ctypes.byref(device), device_id))
    _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
    _check(driver.cuCtxSetCurrent(context))
    with open(library, "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    start = ctypes.addressof(ctypes.c_char.from_buffer(content))
    # The largest modules take longest, so each process begins with one of them.
    for place, _ in sorted(modules(content), key=lambda found: -found[1])[number::processes]:
        _check(driver.cuModuleLoadFatBinary(ctypes.byref(module), ctypes.c_void_p(start + place)))
        _check(driver.cuModuleUnload(module))
        print(flush=True)


def _check(status: int) -> None:
    if status:
        raise OSError(f"the driver answers {status}")


if __name__ == "__main__":
    load_share(sys.argv[1], *map(int, sys.argv[2:5]))
