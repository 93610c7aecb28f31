"""Device set-up that must happen before MindSpore is imported, and the choice of the device after."""

import os

from src.utils.errors import UserError
from src.utils.gpu import check_device, prepare_gpu


def prepare_process(local_rank, local_size, device_target="CPU"):
    """Environment, libraries and processor placement of a rank; call it before MindSpore is imported.

    Args:
        local_rank, local_size: this rank's number and the count of ranks on this machine.

    Raises:
        UserError: where a driver or library of the device is missing.
    """
    # MindSpore's C++ warnings tell a user nothing that our own errors do not.
    os.environ.setdefault("GLOG_v", "3")
    # With AVX-512, the oneDNN inside MindSpore falls back to its reference convolution for plain layouts: a step is
    # 6 to 25 times slower than with its AVX2 kernels (benchmarks/README.md).
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")
    # OpenCV reads it when it is imported: a small file may claim, and decode to, many gigabytes.
    os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(1 << 26))
    _pin_to_own_cores(local_rank, local_size)
    if device_target == "GPU":
        prepare_gpu()


def available_cores():
    """Number of processor cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def select_device(target, device_id, ranks=1):
    """Make MindSpore run whole graphs on ``target`` ("CPU", "GPU" or "Ascend"), and with several ranks connect their devices.

    On CPU the ranks' devices are not connected: gradients go through MPI.

    Raises:
        UserError: where MindSpore has no such device here.
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
            if ranks > 1:
                mindspore.communication.init()
    except (RuntimeError, ValueError, ImportError, TypeError) as failure:
        needs = {"GPU": "an NVIDIA driver and the CUDA 11 libraries", "Ascend": "an Ascend driver and CANN"}.get(target)
        reason = str(failure).strip().splitlines()[0].strip(". ")
        raise UserError(f"device_target={target} cannot be used here: MindSpore says '{reason}'; it needs {needs}. "
                        "--device_target=CPU works on this machine") from None


def _pin_to_own_cores(local_rank, local_size):
    """Give each rank of a machine its own cores where the launcher bound none: ranks that share cores wait for each other."""
    cores = sorted(os.sched_getaffinity(0))
    if local_size == 1 or len(cores) < (os.cpu_count() or 1):
        return
    share = max(len(cores) // local_size, 1)
    first = (local_rank * share) % len(cores)
    os.sched_setaffinity(0, cores[first:first + share])
