"""Finds, opens and chooses the library of kernels that ``python3 -m src.kernels.build`` makes.

Imports nothing of MindSpore.
"""

import ctypes
import hashlib
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from src.cli.config import Config
from src.utils.errors import UserError
from src.utils.log import WARNING
from src.utils.machine import KERNELS_ISA, available_cores

SOURCES = Path(__file__).resolve().parent / "source"
LIBRARY = "libacnet_kernels.so"
TESTED = "tested"
# Branches that one kernel computes together; kMaxBranches in source/batch_norm.h.
MAX_BRANCHES = 3

# Values of ONEDNN_MAX_CPU_ISA -> oneDNN's dnnl_cpu_isa_t; 0 is everything the processor has.
ISAS = {
    "": 0,
    "DEFAULT": 0,
    "ALL": 0,
    "AVX2": 0x7,
    "AVX2_VNNI": 0xF,
    "AVX2_VNNI_2": 0x1F,
    "AVX512_CORE": 0x27,
    "AVX512_CORE_VNNI": 0x67,
    "AVX512_CORE_BF16": 0xE7,
    "AVX512_CORE_FP16": 0x1EF,
    "AVX10_1_512": 0x1EF,
    "AVX512_CORE_AMX": 0xFEF,
    "AVX10_1_512_AMX": 0xFEF,
}
_READY_CAPACITY = 256


class KernelsUnavailable(Exception):
    """The reason why the kernels cannot be used here, worded for the user."""


@dataclass(frozen=True)
class KernelLibrary:
    """An opened library.

    Attributes:
        block: channels of an activation that are stored side by side: one vector register.
        isa: the processor's instructions that oneDNN uses, as its dnnl_cpu_isa_t.
    """

    path: Path
    block: int
    isa: int

    @property
    def handle(self) -> ctypes.CDLL:
        """The library's functions other than kernels."""
        return ctypes.CDLL(str(self.path))

    @property
    def has_bfloat16(self) -> bool:
        """Whether the processor multiplies bfloat16."""
        return has_isa(self.isa, "AVX512_CORE_BF16")


@dataclass(frozen=True)
class KernelChoice:
    """The kernels that a command computes convolutions with on CPU.

    Attributes:
        library: oneDNN's kernels, or None for MindSpore's own.
        reason: why oneDNN's kernels are missing, if the user has not asked for MindSpore's own.
    """

    library: KernelLibrary | None = None
    reason: str = ""

    @property
    def name(self) -> str:
        """Names the kernels. A run repeats bit for bit only with kernels of the same name."""
        return f"onednn, {_isa_name(self.library.isa)}" if self.library else "mindspore"

    @property
    def hint(self) -> str | None:
        """A hint if oneDNN's kernels would be faster, else None."""
        if not self.reason:
            return None
        return (
            f"{WARNING}computing with MindSpore's own kernels; oneDNN's kernels are about twice as "
            f"fast, but are not available: {self.reason}"
        )


def choose_kernels(config: Config) -> KernelChoice:
    """Choose kernels from the key ``kernels``. Call it once, after ``prepare_process``.

    Raises:
        UserError: if kernels=onednn is not available, for bfloat16 on a processor without it, or
            for amp_level=O3 on CPU.
    """
    if config.device_target != "CPU":
        return KernelChoice()
    if config.kernels == "mindspore":
        choice = KernelChoice()
    else:
        try:
            choice = KernelChoice(open_library(available_cores()))
        except KernelsUnavailable as failure:
            if config.kernels == "onednn":
                raise UserError(f"kernels=onednn is not available: {failure}") from None
            choice = KernelChoice(reason=str(failure))
    if config.precision == "O3":
        raise UserError(
            "amp_level=O3 needs device_target=GPU or Ascend; CPU computes in float32 (O0) or "
            "bfloat16 (O2)"
        )
    if config.precision != "O0" and not (choice.library and choice.library.has_bfloat16):
        if choice.library is None:
            needed = f"kernels=onednn: {choice.reason or 'they are switched off'}"
        else:
            found = _isa_name(choice.library.isa)
            needed = f"a processor with AVX512_BF16 or AMX; this one has {found}"
        raise UserError(f"amp_level={config.amp_level} on CPU, bfloat16, needs {needed}")
    return choice


def library_folder() -> Path:
    """The kernels' folder in the virtual environment, specific to source, MindSpore and machine."""
    return Path(sys.prefix) / "kernels" / _digest()


def open_library(threads: int) -> KernelLibrary:
    """Open the kernels, to compute with ``threads`` threads.

    Raises:
        KernelsUnavailable: if they were not built, or do not run here.
    """
    if platform.machine() != "x86_64":
        raise KernelsUnavailable(f"they are for x86-64, this is {platform.machine()}")
    folder = library_folder()
    if not (folder / TESTED).is_file():
        raise KernelsUnavailable("bash scripts/setup.sh --kernels builds them")
    try:
        library = ctypes.CDLL(str(folder / LIBRARY))
    except OSError as failure:
        raise KernelsUnavailable(f"they cannot be loaded: {failure}") from None
    if library.acnet_configure(threads, allowed_isa()):
        raise KernelsUnavailable(error_text(library))
    isa = library.acnet_isa()
    if not has_isa(isa, "AVX2"):
        raise KernelsUnavailable("they need a processor with AVX2")
    return KernelLibrary(folder / LIBRARY, block_size(isa), isa)


def last_error() -> str:
    """LAYER: KERNEL: REASON of the kernel that failed last."""
    return error_text(ctypes.CDLL(str(library_folder() / LIBRARY)))


def error_text(library: ctypes.CDLL) -> str:
    """The last error of an opened library."""
    library.acnet_last_error.restype = ctypes.c_char_p
    return library.acnet_last_error().decode(errors="replace")


def allowed_isa() -> int:
    """The processor's instructions that the user allows. Raises UserError for an unknown name."""
    name = os.environ.get(KERNELS_ISA, "").upper()
    if name not in ISAS:
        known = ", ".join(filter(None, ISAS))
        raise UserError(f"unknown ONEDNN_MAX_CPU_ISA={name}; available: {known}")
    return ISAS[name]


def has_isa(isa: int, name: str) -> bool:
    """Whether ``isa`` includes the instructions of that name."""
    return isa & ISAS[name] == ISAS[name]


def block_size(isa: int) -> int:
    """Channels in a block: the floats of one vector register."""
    return 16 if has_isa(isa, "AVX512_CORE") else 8


class ReadyGradient(NamedTuple):
    """A gradient that is complete.

    Attributes:
        layer: name of the layer whose kernel computed it.
        output: index of the tensor in the kernel's call.
        address: address of its memory.
    """

    layer: str
    output: int
    address: int


class _Record(ctypes.Structure):
    _fields_ = [
        ("layer", ctypes.c_char * 64),
        ("output", ctypes.c_int64),
        ("address", ctypes.c_void_p),
    ]


class ReadyGradients:
    """Notifications that a gradient is ready while the backward pass is still running."""

    def __init__(self, library: KernelLibrary) -> None:
        self._library = library.handle
        self._library.acnet_ready_gradients.argtypes = [
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_double,
            ctypes.POINTER(_Record),
        ]
        self._records = (_Record * _READY_CAPACITY)()

    def begin(self) -> None:
        """Clear the list and start notifications."""
        self._library.acnet_enable_ready_gradients(1)

    def end(self) -> None:
        """Stop notifications."""
        self._library.acnet_enable_ready_gradients(0)

    def since(self, seen: int, seconds: float) -> list[ReadyGradient]:
        """Gradients after the first ``seen``, in order; waits up to ``seconds`` for one.

        Other Python threads run meanwhile.
        """
        count = self._library.acnet_ready_gradients(seen, _READY_CAPACITY, seconds, self._records)
        if count < 0:
            raise RuntimeError(error_text(self._library))
        return [
            ReadyGradient(record.layer.decode(errors="replace"), record.output, record.address or 0)
            for record in self._records[:count]
        ]


def _isa_name(isa: int) -> str:
    names = (name for name, flags in ISAS.items() if flags and has_isa(isa, name))
    return max(names, key=lambda name: (ISAS[name], name))


def _digest() -> str:
    """Digest of everything that the library is made from."""
    digest = hashlib.sha256()
    for part in _parts():
        digest.update(part)
    return digest.hexdigest()[:16]


def _parts() -> Iterator[bytes]:
    try:
        yield version("mindspore").encode()
    except PackageNotFoundError:
        yield b"none"
    yield platform.machine().encode()
    for file in sorted(SOURCES.iterdir()):
        yield file.name.encode()
        yield file.read_bytes()
