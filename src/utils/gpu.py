"""Makes the CUDA 11 libraries of PyPI visible to MindSpore.

MindSpore's wheel has a GPU plug-in but not the libraries, nor a way to find them.
"""

import ctypes
import os
import re
import subprocess
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from src.utils.errors import UserError

# What libmindspore_gpu.so.11.6 needs (its NEEDED entries) and what those load at run time, with the
# package of each.
LIBRARIES = {
    "libcudart.so.11.0": "nvidia-cuda-runtime-cu11",
    "libcublasLt.so.11": "nvidia-cublas-cu11",
    "libcublas.so.11": "nvidia-cublas-cu11",
    "libnvrtc-builtins.so.11.8": "nvidia-cuda-nvrtc-cu11",
    "libnvrtc.so.11.2": "nvidia-cuda-nvrtc-cu11",
    "libcurand.so.10": "nvidia-curand-cu11",
    "libcufft.so.10": "nvidia-cufft-cu11",
    "libcusparse.so.11": "nvidia-cusparse-cu11",
    "libcusolver.so.11": "nvidia-cusolver-cu11",
    "libcudnn_ops_infer.so.8": "nvidia-cudnn-cu11",
    "libcudnn_ops_train.so.8": "nvidia-cudnn-cu11",
    "libcudnn_cnn_infer.so.8": "nvidia-cudnn-cu11",
    "libcudnn_cnn_train.so.8": "nvidia-cudnn-cu11",
    "libcudnn_adv_infer.so.8": "nvidia-cudnn-cu11",
    "libcudnn_adv_train.so.8": "nvidia-cudnn-cu11",
    "libcudnn.so.8": "nvidia-cudnn-cu11",
}
# NCCL connects the GPUs of several ranks. The one in MindSpore's wheel has machine code for Pascal
# only, and every newer GPU would compile it in each rank at each first start. This one has machine
# code up to compute capability 8.0.
NCCL = {"libnccl.so.2": "nvidia-nccl-cu11"}
_DRIVER = "libcuda.so.1"
_PLUGINS = ("11.1", "11.6")
_CUDA_HOME = Path(__file__).resolve().parent / "cuda_home"
_CPU_WORKS = "--device_target=CPU works on this machine"


def prepare_gpu(packages: Path | None = None) -> None:
    """Load the driver and the CUDA libraries, and tell MindSpore which of its plug-ins fits.

    Must run before MindSpore is imported. A loaded library is found by its name from then on, so
    the user need not set LD_LIBRARY_PATH.

    Args:
        packages: the site-packages folder to look in; None is this Python's.

    Raises:
        UserError: that names the missing driver or library and what to install.
    """
    found = [*find_libraries(packages), find_nccl(packages)]
    _load_driver()
    for path in found:
        try:
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        except OSError as failure:
            raise UserError(
                f"device_target=GPU: {path.name} cannot be loaded ({failure}); run "
                f"'bash scripts/setup.sh --gpu' again, or {_CPU_WORKS}"
            ) from None
    if cuda_release(os.environ.get("CUDA_HOME")) not in _PLUGINS:
        os.environ["CUDA_HOME"] = str(_CUDA_HOME)
    # MindSpore runs ldd to check that the libraries exist, and prints long warnings if it finds
    # none.
    folders = dict.fromkeys(str(path.parent) for path in found)
    os.environ["LD_LIBRARY_PATH"] = ":".join(
        [*folders, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    )


def find_libraries(packages: Path | None = None) -> list[Path]:
    """Paths of LIBRARIES, in the order to load them. Raises UserError for the first missing one."""
    return _find(LIBRARIES, packages)


def find_nccl(packages: Path | None = None) -> Path:
    """The NCCL to use instead of MindSpore's own. Raises UserError if it is missing."""
    return _find(NCCL, packages)[0]


def _find(libraries: Mapping[str, str], packages: Path | None) -> list[Path]:
    root = Path(packages or sysconfig.get_paths()["purelib"]) / "nvidia"
    present = {file.name: file for file in root.glob("*/lib/*.so.*")}
    for name, package in libraries.items():
        if name not in present:
            raise UserError(
                f"device_target=GPU needs {name} (of the package {package}): run "
                f"'bash scripts/setup.sh --gpu'; {_CPU_WORKS}"
            )
    return [present[name] for name in libraries]


def cuda_release(home: str | Path | None) -> str | None:
    """The release, such as 11.6, that ``home``/bin/nvcc reports; None if there is no nvcc."""
    try:
        told = subprocess.run(
            [f"{home}/bin/nvcc", "--version"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    release = re.search(r"release (\d+\.\d+)", told)
    return release[1] if release else None


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process sees: their numbers, or what CUDA_VISIBLE_DEVICES lists.

    Raises:
        UserError: if the driver finds none.
    """
    driver, count = _load_driver(), ctypes.c_int(0)
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status:
        raise UserError(
            f"device_target=GPU: the NVIDIA driver finds no GPU (CUDA error {status}); {_CPU_WORKS}"
        )
    listed = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if len(listed) < count.value or not listed[0]:
        return [str(number) for number in range(count.value)]
    return [name.strip() for name in listed[: count.value]]


def gpu_bytes() -> int:
    """Memory of the smallest GPU that this process sees, in bytes."""
    driver = _load_driver()
    sizes = []
    for device in range(len(visible_gpus())):
        size = ctypes.c_size_t(0)
        driver.cuDeviceTotalMem_v2(ctypes.byref(size), device)
        sizes.append(size.value)
    return min(sizes)


def _load_driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL(_DRIVER, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        raise UserError(
            f"device_target=GPU needs an NVIDIA driver: {_DRIVER} is not installed (it comes with "
            "the driver, not from PyPI; in a container, with the NVIDIA container toolkit); "
            f"{_CPU_WORKS}"
        ) from None
