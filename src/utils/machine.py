"""The machine that a process runs on: cores, memory, versions of the software."""

import hashlib
import os
import platform
import re
import resource
import sys
from importlib import metadata
from pathlib import Path

from src.utils.errors import UserError

# Keeps the user's ONEDNN_MAX_CPU_ISA, which this program sets for MindSpore (src/utils/device.py).
KERNELS_ISA = "ACNET_KERNELS_ISA"
# MindSpore maps about 3 GB in a process with two cores (docs/troubleshooting.md). With less it
# ends with an error, aborts or reads what is not there.
_MIN_ADDRESS_SPACE = 3e9
_ROOT = Path(__file__).resolve().parents[2]
_LIBRARIES = ("mindspore", "numpy")
_CGROUP_LIMITS = (
    ("", "memory.max", "memory.current"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def available_cores() -> int:
    """Number of processor cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def set_cpu_affinity(local_rank: int, local_size: int, threads: int = 0) -> None:
    """Bind each rank of a machine to its own cores, unless the launcher has bound it already.

    Ranks that share cores wait for each other.

    Args:
        local_rank, local_size: this rank and the number of ranks on this machine.
        threads: number of cores to use; 0: all that the rank may use.

    Raises:
        UserError: if the rank may use fewer cores than that.
    """
    cores = sorted(os.sched_getaffinity(0))
    if local_size > 1 and len(cores) >= (os.cpu_count() or 1):
        per_rank = max(len(cores) // local_size, 1)
        first = (local_rank * per_rank) % len(cores)
        cores = cores[first : first + per_rank]
    if threads > len(cores):
        raise UserError(
            f"threads={threads} but a rank may use {len(cores)} cores here; use fewer threads or "
            "fewer ranks"
        )
    os.sched_setaffinity(0, cores[: threads or None])


def peak_bytes() -> int:
    """Peak resident memory of this process.

    getrusage would include the parent's, inherited at fork.
    """
    status = Path("/proc/self/status").read_text()
    found = re.search(r"^VmHWM:\s*(\d+)", status, re.M)
    return 1024 * int(found[1]) if found else 0


def available_bytes() -> float:
    """Memory that processes on this machine can still allocate; infinite if unknown."""
    limits = [float("inf")]
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            limits.append(1024.0 * int(line.split()[1]))
    for folder, limit, used in _CGROUP_LIMITS:
        values = [
            line for name in (limit, used) for line in _lines(Path("/sys/fs/cgroup", folder, name))
        ]
        if len(values) == 2 and all(value.isdigit() for value in values):
            limits.append(float(int(values[0]) - int(values[1])))
    return max(min(limits), 0.0)


def check_address_space() -> None:
    """Raise UserError if this process may map less memory than MindSpore does."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < _MIN_ADDRESS_SPACE:
        raise UserError(
            f"the address-space limit is {limit / 1e9:.1f} GB, but MindSpore needs "
            f"{_MIN_ADDRESS_SPACE / 1e9:.0f} GB: raise it with ulimit -v"
        )


def software_versions() -> dict[str, str]:
    """{name: version} of Python, of the libraries that round numbers, and of this program.

    The program's version is a digest of its files.
    """
    libraries = {name: _version(name) for name in _LIBRARIES}
    return {"program": _digest(), "python": platform.python_version(), **libraries}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines() if os.path.isfile(path) else []
    except OSError:
        return []


def _digest() -> str:
    digest = hashlib.sha256()
    for file in sorted([*_ROOT.glob("src/**/*.py"), Path(sys.argv[0])]):
        if file.is_file():
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"
