"""Choosing, finding and opening the library of kernels that ``python3 -m src.kernels.build`` makes. Imports nothing of MindSpore."""

import ctypes
import hashlib
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from src.utils.config import Config
from src.utils.device import KERNELS_ISA, available_cores
from src.utils.errors import UserError

SOURCES = Path(__file__).resolve().parent / "source"
LIBRARY = "libacnet_kernels.so"
TESTED = "tested"

# Names that ONEDNN_MAX_CPU_ISA takes -> oneDNN's dnnl_cpu_isa_t; 0 is all that the processor has.
_ISAS = {"": 0, "DEFAULT": 0, "ALL": 0, "AVX2": 0x7, "AVX2_VNNI": 0xf, "AVX2_VNNI_2": 0x1f, "AVX512_CORE": 0x27, "AVX512_CORE_VNNI": 0x67,
         "AVX512_CORE_BF16": 0xe7, "AVX512_CORE_FP16": 0x1ef, "AVX10_1_512": 0x1ef, "AVX512_CORE_AMX": 0xfef, "AVX10_1_512_AMX": 0xfef}
_AVX2, _AVX512, _BFLOAT16 = _ISAS["AVX2"], _ISAS["AVX512_CORE"], _ISAS["AVX512_CORE_BF16"]


class KernelsUnavailable(Exception):
    """Why the kernels cannot be used here, in words for the user."""


@dataclass(frozen=True)
class KernelLibrary:
    """An opened library.

    Attributes:
        block: channels of an activation that lie side by side: what one vector register holds.
        isa: the part of the processor's instructions that oneDNN uses, as its dnnl_cpu_isa_t.
    """

    path: Path
    block: int
    isa: int

    @property
    def has_bfloat16(self) -> bool:
        """Whether the processor multiplies bfloat16."""
        return self.isa & _BFLOAT16 == _BFLOAT16


@dataclass(frozen=True)
class KernelChoice:
    """What a command computes convolutions with on CPU.

    Attributes:
        library: oneDNN's kernels, or None for MindSpore's own.
        reason: why they could not be had, if the user has not asked for MindSpore's own.
    """

    library: KernelLibrary | None = None
    reason: str = ""

    @property
    def name(self) -> str:
        """What must be the same on every rank, and for a run to repeat itself to the bit."""
        return f"onednn, {_isa_name(self.library.isa)}" if self.library else "mindspore"

    @property
    def hint(self) -> str | None:
        """What to say to a user who could compute faster, or None."""
        if not self.reason:
            return None
        return f"computing with MindSpore's own kernels; oneDNN's, about twice as fast, are not there: {self.reason}"


def choose_kernels(config: Config) -> KernelChoice:
    """By the key ``kernels``, after ``prepare_process``.

    Raises:
        UserError: if they are asked for and cannot be had, or for bfloat16 on a processor that does not multiply it.
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
                raise UserError(f"kernels=onednn cannot be had: {failure}") from None
            choice = KernelChoice(reason=str(failure))
    if config.precision != "O0" and not (choice.library and choice.library.has_bfloat16):
        needed = ("kernels=onednn: " + (choice.reason or "they are switched off") if choice.library is None
                  else f"a processor with AVX512_BF16 or AMX; this one has {_isa_name(choice.library.isa)}")
        raise UserError(f"amp_level={config.amp_level} on CPU, bfloat16, needs {needed}")
    return choice


def library_folder() -> Path:
    """Where the kernels for this project, MindSpore and machine are, or would be, in the virtual environment."""
    return Path(sys.prefix) / "kernels" / _digest()


def open_library(threads: int) -> KernelLibrary:
    """The kernels, computing with so many ``threads``.

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
    if library.acnet_configure(threads, wanted_isa()):
        raise KernelsUnavailable("ONEDNN_MAX_CPU_ISA has changed since they were opened")
    isa = library.acnet_isa()
    if isa & _AVX2 != _AVX2:
        raise KernelsUnavailable("they need a processor with AVX2")
    return KernelLibrary(folder / LIBRARY, 16 if isa & _AVX512 == _AVX512 else 8, isa)


def last_error() -> str:
    """What the kernel that failed last said of it: layer, kernel and reason."""
    function = ctypes.CDLL(str(library_folder() / LIBRARY)).acnet_last_error
    function.restype = ctypes.c_char_p
    return function().decode(errors="replace")


def wanted_isa() -> int:
    """What the user allows of the processor's instructions. Raises UserError for an unknown name."""
    name = os.environ.get(KERNELS_ISA, "").upper()
    if name not in _ISAS:
        raise UserError(f"ONEDNN_MAX_CPU_ISA={name} is not known; there are {', '.join(filter(None, _ISAS))}")
    return _ISAS[name]


def _isa_name(isa: int) -> str:
    return max((name for name, flags in _ISAS.items() if flags and flags & isa == flags), key=lambda name: (_ISAS[name], name))


def _digest() -> str:
    """Of everything that the library is made of."""
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
