"""What the kernels say of gradients that are complete while the graph still computes others."""

import ctypes
from typing import NamedTuple

from src.kernels.library import KernelLibrary

_MOST = 256


class Announcement(NamedTuple):
    """A tensor that is complete.

    Attributes:
        layer: name of the layer whose kernel computed it.
        output: which of the kernel's tensors it is.
        address: of its memory.
    """

    layer: str
    output: int
    address: int


class _Record(ctypes.Structure):
    _fields_ = [("layer", ctypes.c_char * 64), ("output", ctypes.c_int64), ("address", ctypes.c_void_p)]


class Announcements:
    """The announcements of a library's kernels, in the order in which they were made."""

    def __init__(self, library: KernelLibrary) -> None:
        self._library = ctypes.CDLL(str(library.path))
        self._library.acnet_announced.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_double, ctypes.POINTER(_Record)]
        self._records = (_Record * _MOST)()

    def begin(self) -> None:
        """Forget what was announced; from now on kernels announce."""
        self._library.acnet_announce(1)

    def end(self) -> None:
        """Kernels announce no longer."""
        self._library.acnet_announce(0)

    def since(self, seen: int, seconds: float) -> list[Announcement]:
        """Those after the first ``seen``, some at least if they come within ``seconds``. Other threads of Python run meanwhile."""
        count = self._library.acnet_announced(seen, _MOST, seconds, self._records)
        return [Announcement(record.layer.decode(errors="replace"), record.output, record.address or 0) for record in self._records[:count]]
