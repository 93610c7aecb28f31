"""A null GPU: MindSpore's real GPU backend on a machine without a GPU.

generate.py makes stand-ins for the CUDA libraries, whose functions count their calls and compute
nothing. With them loaded, MindSpore compiles and runs its GPU graphs. So errors of graphs, kernel
launches, copies, synchronisations and collectives are real; results, times and memory are not: what
a kernel would compute comes back as zero, and every number is finite.

    python3 tests/gpu/generate.py FOLDER
    NULL_GPU=FOLDER python3 tests/gpu/null_gpu.py train.py --device_target=GPU --config_path=digits

runs a script of the project and prints what it asked of the GPU. `preload` does the same for a
process that has not imported MindSpore yet. More variables of the environment:

NULL_GPU_COUNT, CUDA_VISIBLE_DEVICES: the GPUs that a process sees, 8 by default.
NULL_GPU_CAPABILITY: compute capability, 8.0 by default.
NULL_GPU_MEMORY_GB: of each GPU, 80 by default.
NULL_GPU_FINITE=0: every gradient overflows.
NULL_GPU_NCCL=0: NCCL cannot connect the ranks.
"""

import atexit
import ctypes
import os
import re
import runpy
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

# Calls of cuDNN, cuBLAS and the run time that set something up and put nothing on a stream.
_NOT_LAUNCHED = re.compile(
    r"Create|Destroy|Descriptor|Stream|Event|MathMode|PointerMode|Get[A-Z]|Generator"
    r"|^cudaFree|^cudaSetDevice|^cuModule"
)
_COUNTING = (
    "libcudnn.so.8",
    "libcublas.so.11",
    "libcuda_ops.so.11",
    "libcudart.so.11.0",
    "libcuda.so.1",
    "libcurand.so.10",
    "libcufft.so.10",
    "libcusolver.so.11",
    "libcusparse.so.11",
)
_SHORT = {"libcudnn.so.8": "cuDNN", "libcublas.so.11": "cuBLAS", "libcuda_ops.so.11": "MindSpore"}
_loaded: dict[str, ctypes.CDLL] = {}


class _Event(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("calls", ctypes.c_uint64), ("bytes", ctypes.c_uint64))


@dataclass(frozen=True)
class Counters:
    """What was asked of the GPU.

    Attributes:
        launches: {(library, function without its template arguments): calls} of functions that
            start a kernel.
        calls: {event: times}, as "async copy H2D", "stream sync", "AllReduce".
        bytes: {event: bytes} of those that move or take memory.
    """

    launches: Counter[tuple[str, str]]
    calls: Counter[str]
    bytes: Counter[str]

    def __sub__(self, earlier: "Counters") -> "Counters":
        return Counters(
            self.launches - earlier.launches, self.calls - earlier.calls, self.bytes - earlier.bytes
        )

    def launched(self, pattern: str = "") -> int:
        """Launches of the functions in whose name the regular expression ``pattern`` is found."""
        return sum(count for (_, name), count in self.launches.items() if re.search(pattern, name))

    @property
    def syncs(self) -> int:
        return sum(count for name, count in self.calls.items() if name.endswith("sync"))

    def copies(self, direction: str) -> int:
        """Number of copies "H2D", "D2H" or "D2D"."""
        return sum(n for name, n in self.calls.items() if name.endswith(f"copy {direction}"))

    def summary(self) -> dict[str, int]:
        """{what: how often}, of what a step is judged by."""
        return {
            "launches": self.launched(),
            "transposes": self.launched("Transpose"),
            "casts": self.launched("^Cast"),
            **{direction: self.copies(direction) for direction in ("H2D", "D2H", "D2D")},
            "syncs": self.syncs,
            "all_reduces": self.calls["AllReduce"],
        }


def preload() -> None:
    """Load the stand-ins. MindSpore, imported later, takes a library that is loaded already."""
    assert "mindspore" not in sys.modules, "preload() comes before MindSpore is imported"
    out = Path(os.environ["NULL_GPU"]).resolve()
    os.environ["CUDA_HOME"] = str(out / "cuda_home")
    # A real GPU's cache of compiled kernels must not hear of this one.
    os.environ["CUDA_CACHE_PATH"] = str(out / "compute_cache")
    os.environ["LD_LIBRARY_PATH"] = ":".join(
        filter(None, [str(out), os.environ.get("LD_LIBRARY_PATH")])
    )
    for name in (out / "libraries").read_text().split():
        _loaded[name] = ctypes.CDLL(str(out / name), mode=ctypes.RTLD_GLOBAL)


def counters() -> Counters:
    """What was asked since the libraries were loaded."""
    own = _loaded["libnull_gpu.so"]
    kinds = ctypes.c_int.in_dll(own, "null_gpu_kinds").value
    events = [
        (event.name.decode(), event.calls, event.bytes)
        for event in (_Event * kinds).in_dll(own, "null_gpu_counters")
    ]
    launches: Counter[tuple[str, str]] = Counter()
    for library in _COUNTING:
        names = (Path(_loaded[library]._name).parent / f"{library}.names").read_text().split()
        for name, count in zip(
            names,
            (ctypes.c_uint64 * len(names)).in_dll(_loaded[library], "null_calls") if names else (),
        ):
            if count and not _NOT_LAUNCHED.search(name):
                launches[_SHORT.get(library, library), _plain(name)] += count
    return Counters(
        launches,
        Counter({name: calls for name, calls, _ in events}),
        Counter({name: size for name, _, size in events}),
    )


def _plain(name: str) -> str:
    """ "Cast" of "_Z4CastIf6__halfE...": a mangled C++ name begins with its length."""
    mangled = re.match(r"_Z(\d+)", name)
    return name[mangled.end() : mangled.end() + int(mangled[1])] if mangled else name


def replace_packages() -> None:
    """Have the project take the stand-ins for the libraries of the nvidia packages."""
    from src.utils import gpu

    paths = {name: Path(library._name) for name, library in _loaded.items()}
    gpu.find_libraries = lambda packages=None: list(paths.values())
    gpu.find_nccl = lambda packages=None: paths["libnccl.so.2"]


if __name__ == "__main__":
    del sys.argv[0]
    sys.path[0] = os.getcwd()
    preload()
    replace_packages()
    atexit.register(lambda: print(f"null GPU: {counters().summary()}", flush=True))
    runpy.run_path(sys.argv[0], run_name="__main__")
