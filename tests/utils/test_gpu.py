"""The GPU set-up as far as it shows without a GPU."""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from conftest import execute

from src.utils import gpu
from src.utils.errors import UserError

PACKAGES = Path(sysconfig.get_paths()["purelib"])
needs_packages = pytest.mark.skipif(
    not (PACKAGES / "nvidia" / "cudnn").is_dir(), reason="bash scripts/setup.sh --gpu was not run"
)


def fake_packages(root, without=()):
    for number, name in enumerate(gpu.LIBRARIES):
        if name not in without:
            folder = root / "nvidia" / f"part{number % 3}" / "lib"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"")
    return root


def test_libraries_are_found_wherever_a_package_has_them_and_in_order(tmp_path):
    found = gpu.find_libraries(fake_packages(tmp_path))
    assert [path.name for path in found] == list(gpu.LIBRARIES)


@pytest.mark.parametrize("name", ["libcudnn.so.8", "libcublasLt.so.11"])
def test_a_missing_library_is_named_with_its_package(tmp_path, name):
    with pytest.raises(
        UserError, match=f"{name}.*{gpu.LIBRARIES[name]}.*setup.sh --gpu.*CPU works"
    ):
        gpu.find_libraries(fake_packages(tmp_path, without=(name,)))


def test_a_missing_nccl_is_named_with_its_package(tmp_path):
    with pytest.raises(UserError, match="libnccl.so.2.*nvidia-nccl-cu11.*setup.sh --gpu"):
        gpu.find_nccl(fake_packages(tmp_path))


def test_nvcc_of_ours_answers_for_the_plug_in_of_11_6(tmp_path):
    assert gpu.cuda_release(gpu._CUDA_HOME) == "11.6"
    assert gpu.cuda_release(tmp_path) is None and gpu.cuda_release(None) is None


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has a driver")
def test_without_driver_or_libraries_the_command_says_what_to_install():
    run = execute(["python3", "train.py", "--device_target=GPU"])
    assert run.status == 2 and len(run.err.splitlines()) == 1, run
    missing = (
        "NVIDIA driver"
        if (PACKAGES / "nvidia" / "cudnn").is_dir()
        else "bash scripts/setup.sh --gpu"
    )
    assert missing in run.error_lines[0] and "--device_target=CPU works" in run.error_lines[0]


@needs_packages
def test_every_library_of_the_plug_in_resolves_up_to_the_driver():
    """Against the real packages: what ldd misses is the driver's libcuda.so.1 alone."""
    import mindspore

    libraries = Path(mindspore.__file__).parent / "lib"
    folders = {str(path.parent) for path in gpu.find_libraries()} | {
        str(libraries),
        str(libraries / "plugin" / "gpu"),
    }
    for name in (
        "libmindspore_gpu.so.11.6",
        "gpu/libcuda_ops.so.11",
        "gpu11.6/libnvidia_collective.so",
    ):
        told = subprocess.run(
            ["ldd", libraries / "plugin" / name],
            capture_output=True,
            text=True,
            env={**os.environ, "LD_LIBRARY_PATH": ":".join(folders)},
        ).stdout
        assert {line.split()[0] for line in told.splitlines() if "not found" in line} <= {
            "libcuda.so.1"
        }, told


@needs_packages
def test_every_library_loads_by_its_path():
    code = (
        "import ctypes; from src.utils.gpu import find_libraries\n"
        "for path in find_libraries(): ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)\n"
        "ctypes.CDLL('libcudnn.so.8').cudnnGetVersion.restype = ctypes.c_size_t\n"
        "print(ctypes.CDLL('libcudnn.so.8').cudnnGetVersion())"
    )
    run = execute(["python3", "-c", code])
    # cuDNN 8.9 knows Hopper (its release notes).
    assert run.status == 0 and 8900 <= int(run.out) < 9000, run


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcc"), reason="no compiler for a stand-in driver")
@needs_packages
def test_mindspore_takes_the_plug_in_with_a_stand_in_driver(tmp_path):
    """Up to the first call that wants a real driver, which fails in one line."""
    (tmp_path / "driver.c").write_text(
        "int cuInit(unsigned f){return 0;} int cuDeviceGetCount(int *c){*c = 1; return 0;}\n"
        + "".join(
            f"int {name}(void){{return 100;}}\n"
            for name in (
                "cuDeviceGetAttribute",
                "cuGetErrorName",
                "cuLaunchKernel",
                "cuModuleGetFunction",
                "cuModuleLoadDataEx",
                "cuModuleUnload",
                "cuStreamSynchronize",
            )
        )
    )
    subprocess.run(
        [
            "gcc",
            "-shared",
            "-fPIC",
            "-Wl,-soname,libcuda.so.1",
            "-o",
            tmp_path / "libcuda.so.1",
            tmp_path / "driver.c",
        ],
        check=True,
    )
    flags = ["--config_path=digits", "--device_target=GPU", f"--output_path={tmp_path}/out"]
    run = execute(["python3", "train.py", *flags], LD_LIBRARY_PATH=str(tmp_path))
    assert (
        "on 1 x GPU" in run.out
        and run.status == 1
        and "CUDA driver version is insufficient" in run.error_lines[0]
    ), run
    assert len(run.err.splitlines()) == 1
    run = execute(["python3", "train.py", *flags, "--device_id=3"], LD_LIBRARY_PATH=str(tmp_path))
    assert (
        run.status == 2 and "there is no GPU number 3; this machine has 1" in run.error_lines[0]
    ), run
