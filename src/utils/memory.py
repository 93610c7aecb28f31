"""Memory of this process and this machine."""

import os
from pathlib import Path


def peak_bytes() -> int:
    """The most that was resident of this process since it began. getrusage also counts what its parent held when it was started."""
    line = next(line for line in _lines(Path("/proc/self/status")) if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def available_bytes() -> float:
    """Memory that processes on this machine may still take; infinite where the system does not say."""
    limits = [float("inf")]
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            limits.append(1024.0 * int(line.split()[1]))
    for folder, most, used in (("", "memory.max", "memory.current"), ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes")):
        values = [line for name in (most, used) for line in _lines(Path("/sys/fs/cgroup", folder, name))]
        if len(values) == 2 and all(value.isdigit() for value in values):
            limits.append(float(int(values[0]) - int(values[1])))
    return max(min(limits), 0.0)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines() if os.path.isfile(path) else []
    except OSError:
        return []
