"""Device set-up that must happen before MindSpore is imported, and the choice of the device after."""

import os
import warnings

from PIL.Image import DecompressionBombWarning

from src.utils.errors import UserError
from src.utils.gpu import check_device, prepare_gpu

# The environment variable that keeps what ONEDNN_MAX_CPU_ISA said before this program set it for MindSpore.
KERNELS_ISA = "ACNET_KERNELS_ISA"


def prepare_process(device_target: str = "CPU") -> None:
    """Set the environment and load the libraries that ``device_target`` needs; call it before MindSpore is imported.

    Raises:
        UserError: if a driver or library of the device is missing.
    """
    # MindSpore's C++ warnings say nothing to a user that our own errors do not.
    os.environ.setdefault("GLOG_v", "3")
    # Our own kernels may use all that the user allows (src/kernels/library.py).
    os.environ.setdefault(KERNELS_ISA, os.environ.get("ONEDNN_MAX_CPU_ISA", ""))
    # With AVX-512, the oneDNN inside MindSpore falls back to its reference convolution for plain layouts: a step is
    # 6 to 25 times slower than with its AVX2 kernels (benchmarks/README.md).
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")
    # The decoder refuses such images itself, in our words.
    warnings.filterwarnings("ignore", category=DecompressionBombWarning)
    if device_target == "GPU":
        prepare_gpu()


def available_cores() -> int:
    """Number of processor cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def select_device(target: str, device_id: int = 0, collectives: bool = False) -> None:
    """Make MindSpore run whole graphs on ``target`` ("CPU", "GPU" or "Ascend").

    Args:
        device_id: number of the GPU or Ascend on this machine.
        collectives: connect the devices of all processes, for their own collective operations.

    Raises:
        UserError: if MindSpore has no such device here.
    """
    import mindspore
    if target == "GPU":
        check_device(device_id)
    mindspore.set_context(mode=mindspore.GRAPH_MODE)
    try:
        if target == "CPU":
            mindspore.set_device("CPU")
        else:
            mindspore.set_device(target, device_id)
            if collectives:
                mindspore.communication.init()
    except (RuntimeError, ValueError, ImportError, TypeError) as failure:
        needs = {"GPU": "an NVIDIA driver and the CUDA 11 libraries", "Ascend": "an Ascend driver and CANN"}.get(target)
        reason = str(failure).strip().splitlines()[0].strip(". ")
        raise UserError(f"device_target={target} cannot be used here: MindSpore says '{reason}'; it needs {needs}. "
                        "--device_target=CPU works on this machine") from None
