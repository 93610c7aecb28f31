"""Make the libraries of the null GPU: `python3 generate.py FOLDER`. Needs gcc and binutils.

The GPU plug-in of MindSpore itself tells which functions it wants of which library, and with which
symbol version. Each becomes a stub that counts its calls and returns 0, unless stand_ins.c has
something better. 5,600 stubs take 3 seconds.
"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

RELEASE = "11.6"
NVCC = f"#!/bin/sh\necho 'Cuda compilation tools, release {RELEASE}, V{RELEASE}.0'\n"
# Start of a mangled name in libcuda_ops -> the function of stand_ins.c that answers in its place.
ANSWERS = {
    "_Z11CalIsFinite": "null_is_finite",
    "_Z11ArrayReduceIbE": "null_all",
    "_Z10PackKernelIbE": "null_stack",
}
# What src/utils/gpu.py calls by ctypes; the plug-in does not.
DRIVER = {
    "cuDeviceGet",
    "cuDevicePrimaryCtxRetain",
    "cuDeviceTotalMem_v2",
    "cuCtxSetCurrent",
    "cuModuleLoadFatBinary",
    "cuModuleUnload",
}
COUNTERS = "libnull_gpu.so"
HERE = Path(__file__).resolve().parent


def mindspore_folder() -> Path:
    found = importlib.util.find_spec("mindspore")
    assert found is not None and found.origin, "this Python has no MindSpore"
    return Path(found.origin).parent


def symbols(library: Path, which: str, dynamic: bool = True) -> list[tuple[str, str]]:
    """(name, version or "") of the symbols of ``library`` that are undefined or defined."""
    told = subprocess.run(
        ["nm", *(["-D"] if dynamic else []), f"--{which}-only", str(library)],
        capture_output=True,
        text=True,
        check=True,
    )
    names = (
        line.split()[-1].replace("@@", "@").partition("@")
        for line in told.stdout.splitlines()
        if line.strip()
    )
    return [(name, version) for name, _, version in names]


def wanted(mindspore: Path) -> dict[str, list[str]]:
    """{SONAME: functions} that the plug-in and its collectives want."""
    plugin = mindspore / "lib" / "plugin"
    ops = {name for name, _ in symbols(plugin / "gpu" / "libcuda_ops.so.11", "defined")}
    libraries: dict[str, set[str]] = {"libcuda.so.1": set(DRIVER), "libcuda_ops.so.11": set()}
    for name, version in symbols(plugin / f"libmindspore_gpu.so.{RELEASE}", "undefined"):
        if re.match(r"lib(cu|nv)", version):
            libraries.setdefault(version, set()).add(name)
        elif re.match(r"cu[A-Z]", name):
            libraries["libcuda.so.1"].add(name)
        elif name in ops:
            libraries["libcuda_ops.so.11"].add(name)
    collectives = symbols(plugin / f"gpu{RELEASE}" / "libnvidia_collective.so", "undefined")
    libraries["libnccl.so.2"] = {name for name, _ in collectives if name.startswith("nccl")}
    return {soname: sorted(names) for soname, names in libraries.items()}


def stubs(names: list[str]) -> str:
    """Assembler (x86-64) of functions that count in ``null_calls``, then return 0 or answer."""
    lines = [".text"]
    for number, name in enumerate(names):
        answer = next((to for start, to in ANSWERS.items() if name.startswith(start)), None)
        lines += [
            f".globl {name}",
            f".type {name},@function",
            f"{name}:",
            f" lock incq calls+{8 * number}(%rip)",
            *([f" jmp {answer}@PLT"] if answer else [" xorl %eax,%eax", " ret"]),
        ]
    lines += [
        ".data",
        ".globl null_calls",
        ".type null_calls,@object",
        "null_calls:",
        f"calls: .fill {max(len(names), 1)},8,0",
        f".size null_calls,{8 * max(len(names), 1)}",
        '.section .note.GNU-stack,"",@progbits',
    ]
    return "\n".join(lines) + "\n"


def build(soname: str, names: list[str], versioned: bool, out: Path) -> None:
    tag = re.sub(r"\W", "_", soname)
    made = out / "made" / tag
    compiler = ["gcc", "-O1", "-Wall", "-fPIC", "-pthread"]
    subprocess.run(
        [*compiler, f"-DIN_{tag}", "-c", str(HERE / "stand_ins.c"), "-o", f"{made}.o"], check=True
    )
    written = {name for name, _ in symbols(Path(f"{made}.o"), "defined", dynamic=False)}
    rest = [name for name in names if name not in written]
    Path(f"{made}.s").write_text(stubs(rest))
    (out / f"{soname}.names").write_text("\n".join(rest) + "\n")
    flags = [f"-Wl,-soname,{soname}", "-Wl,-rpath,$ORIGIN"]
    if versioned:
        Path(f"{made}.map").write_text(f"{soname} {{ global: *; }};\n")
        flags.append(f"-Wl,--version-script={made}.map")
    if soname != COUNTERS:
        flags.append(str(out / COUNTERS))
    subprocess.run(
        [*compiler, "-shared", f"{made}.o", f"{made}.s", "-o", str(out / soname), *flags],
        check=True,
    )


def main(out: Path, mindspore: Path) -> None:
    (out / "made").mkdir(parents=True, exist_ok=True)
    nvcc = out / "cuda_home" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True, exist_ok=True)
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    libraries = wanted(mindspore)
    build(COUNTERS, [], False, out)
    for soname, names in libraries.items():
        build(
            soname, names, soname not in ("libcuda.so.1", "libcuda_ops.so.11", "libnccl.so.2"), out
        )
    (out / "libraries").write_text("\n".join([COUNTERS, *libraries]) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), mindspore_folder())
