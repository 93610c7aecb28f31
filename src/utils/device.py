"""Prepares a process for its device before MindSpore is imported, and selects the device after."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from src.utils.errors import UserError
from src.utils.gpu import find_nccl, prepare_gpu
from src.utils.gpu_kernels import compile_kernels
from src.utils.machine import KERNELS_ISA
from src.utils.progress import ProgressBar, print_status

_NEEDS = {
    "GPU": "an NVIDIA driver and the CUDA 11 libraries",
    "Ascend": "an Ascend driver and CANN",
}


def prepare_process(device_target: str = "CPU") -> None:
    """Set the environment and load the libraries that ``device_target`` needs.

    Call it before MindSpore is imported.

    Raises:
        UserError: if a driver or library of the device is missing.
    """
    # MindSpore's C++ warnings tell a user nothing that our own errors do not.
    os.environ.setdefault("GLOG_v", "3")
    # Our own kernels may use everything that the user allows (src/kernels/library.py).
    os.environ.setdefault(KERNELS_ISA, os.environ.get("ONEDNN_MAX_CPU_ISA", ""))
    # With AVX-512, the oneDNN inside MindSpore falls back to its reference convolution for plain
    # layouts: a step is 6 to 25 times slower than with AVX2 (benchmarks/README.md).
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")
    # Our decoder reports oversized images itself; Pillow's other warnings are about metadata.
    warnings.filterwarnings("ignore", module="PIL")
    if device_target == "GPU":
        prepare_gpu()


def select_device(
    target: str,
    device_id: int = 0,
    compiles_kernels: bool = True,
    barrier: Callable[[], object] = lambda: None,
    collectives: bool = False,
) -> None:
    """Import MindSpore and make it run whole graphs on ``target`` ("CPU", "GPU" or "Ascend").

    Args:
        device_id: index of the GPU or Ascend on this machine.
        compiles_kernels: whether this rank compiles MindSpore's kernels for a GPU that is newer
            than they are; one rank per machine does.
        barrier: waits for the other ranks.
        collectives: connect the devices of all processes, for their own collective operations.

    Raises:
        UserError: if MindSpore cannot use the device here.
    """
    if target == "GPU":
        if compiles_kernels:
            compile_for_new_gpu(device_id, *([find_nccl()] if collectives else []))
        barrier()
    import mindspore

    mindspore.set_context(mode=mindspore.GRAPH_MODE)
    try:
        if target == "CPU":
            mindspore.set_device("CPU")
        else:
            mindspore.set_device(target, device_id)
    except (RuntimeError, ValueError, ImportError, TypeError) as failure:
        reason = str(failure).strip().splitlines()[0].strip(". ")
        raise UserError(
            f"device_target={target} cannot be used here: MindSpore reports '{reason}'; it needs "
            f"{_NEEDS.get(target)}. --device_target=CPU works on this machine"
        ) from None
    if collectives:
        _connect_devices(target)


def _connect_devices(target: str) -> None:
    import mindspore

    library = "NCCL" if target == "GPU" else "HCCL"
    try:
        mindspore.communication.init()
    except (RuntimeError, ValueError) as failure:
        reason = str(failure).strip().splitlines()[0].strip(". ")
        raise UserError(
            f"{library} cannot connect the devices of the ranks: '{reason}'; --reducer=mpi trains "
            f"without it, through the hosts" + ("; NCCL_DEBUG=INFO shows more" * (target == "GPU"))
        ) from None


def compile_for_new_gpu(device_id: int, *more_libraries: Path) -> None:
    """Compile MindSpore's kernels for a GPU that is newer than they are, once per machine.

    Args:
        more_libraries: further libraries with kernels to compile, such as NCCL.
    """
    mindspore = find_spec("mindspore")
    if mindspore is not None and mindspore.origin:
        plugin = Path(mindspore.origin).parent / "lib" / "plugin" / "gpu" / "libcuda_ops.so.11"
        for library in (plugin, *more_libraries):
            compile_kernels(library, device_id, partial(_watch_compilation, library.name))


@contextmanager
def _watch_compilation(library: str, modules: int) -> Iterator[ProgressBar]:
    print_status(
        f"this GPU is newer than the kernels of {library}: compiling them for it, once for this "
        "machine (minutes)"
    )
    with ProgressBar("compiled", modules, "kernel module") as progress:
        yield progress
