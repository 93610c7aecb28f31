"""Reads weights from any supported format, recognised by content. Never runs code from a file."""

import argparse
import json
import logging
import os
import re
import zipfile
import zlib
from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy as np

from src.utils.errors import UserError

METADATA = "metadata"
# The tensors of a packed data set (src/dataset/packed.py), which is a file of this format too.
PACKED_TENSORS = ("images", "ends", "labels")
CHECKSUM = "checksum"
# Names of optimizer state in a checkpoint: OPTIMIZER_PREFIX, the state's name, the parameter's
# name.
OPTIMIZER_PREFIX = "optimizer."
# The names of averaged weights: AVERAGE_PREFIX and the parameter's name.
AVERAGE_PREFIX = "ema."
# The prefix in checkpoints before version 2, which had only momentum.
_OLD_OPTIMIZER_PREFIX = "momentum."
_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
_ZIP_MAGIC = b"PK\x03\x04"
_PICKLE_MAGIC = b"\x80"
_SAFE_TORCH = (2, 6)
# Nested dictionaries that training scripts wrap weights in.
# The averaged weights come first: scripts that keep them evaluate them.
_WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "state_dict",
    "model",
    "model_state_dict",
    "net",
    "network",
    "weights",
    "params",
)
# What wrappers around a network put before each name: torch.compile, DistributedDataParallel,
# Lightning modules.
_NAME_PREFIXES = ("_orig_mod.", "module.", "model.")
_AVERAGED_COUNT = "n_averaged"
# Types of other data that training scripts save next to weights. Reading them runs no code.
_HARMLESS_TYPES = (argparse.Namespace,)


Arrays = dict[str, np.ndarray]
Path = str | PathLike[str]


def read_weights(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """Read a file of weights into ({name: array}, metadata), names as in the file.

    Formats are MindSpore .ckpt, .safetensors, PyTorch's .pth and .pt, and the ACNet repository's
    .hdf5. Prefixes that wrappers put before every name are removed. Metadata is {} if the file has
    none.

    Raises:
        UserError: if the file is missing, truncated, of another format, or its pickle asks for
            code.
    """
    if os.path.isdir(path):
        raise UserError(f"'{path}' is a folder; name a file of weights in it")
    if not os.path.isfile(path):
        raise UserError(f"checkpoint '{path}' does not exist")
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except OSError as failure:
        raise UserError(f"cannot read '{path}': {failure.strerror}") from None
    if head.startswith(_HDF5_MAGIC):
        return _read_hdf5(path), {}
    if head.startswith(_ZIP_MAGIC):
        return _read_torch(path), {}
    # Before the pickle: a safetensors file begins with its header's length, which may look like
    # one.
    if (
        len(head) == 9
        and head[8:] == b"{"
        and int.from_bytes(head[:8], "little") < os.path.getsize(path)
    ):
        return _read_safetensors(path)
    if head.startswith(_PICKLE_MAGIC):
        return _read_torch(path), {}
    return _read_mindspore(path)


def looks_like_weights(path: Path) -> bool:
    """Whether a file has the form of one of the formats, and is whole if the format tells."""
    with open(path, "rb") as file:
        head = file.read(9)
    if head.startswith(_ZIP_MAGIC):
        return zipfile.is_zipfile(path)
    if head[8:] == b"{":
        return _is_whole_safetensors(path)
    if head.startswith((_HDF5_MAGIC, _PICKLE_MAGIC)):
        return True
    # The messages of a MindSpore checkpoint begin with the tag of their first field.
    return head.startswith(b"\n")


def _is_whole_safetensors(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="np"):
            return True
    except (SafetensorError, OSError):
        return False


class quiet_mindspore:
    """Silences MindSpore's own Python log: its errors are reported by ours, as one line."""

    def __enter__(self) -> None:
        self._logger = logging.getLogger("MindSpore")
        self._level = self._logger.level
        self._logger.setLevel(logging.CRITICAL + 1)

    def __exit__(self, *exception: object) -> None:
        self._logger.setLevel(self._level)


def without_optimizer_state(arrays: Mapping[str, np.ndarray]) -> Arrays:
    """The weights and running statistics among the arrays of a checkpoint."""
    return {
        name: array
        for name, array in arrays.items()
        if not name.startswith((OPTIMIZER_PREFIX, _OLD_OPTIMIZER_PREFIX))
    }


def weights_in_use(arrays: Mapping[str, np.ndarray]) -> Arrays:
    """The weights that evaluation uses: the averages, if the checkpoint holds any."""
    weights = without_optimizer_state(arrays)
    averages = {
        name.removeprefix(AVERAGE_PREFIX): array
        for name, array in weights.items()
        if name.startswith(AVERAGE_PREFIX)
    }
    return averages or weights


def content_checksum(arrays: Mapping[str, np.ndarray]) -> bytes:
    """CRC-32 of the names, types, shapes and contents of {name: array}, 4 bytes."""
    checksum = 0
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        checksum = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), checksum)
        checksum = zlib.crc32(array.reshape(-1).view(np.uint8).data, checksum)
    return checksum.to_bytes(4, "little")


def _read_mindspore(path: Path) -> tuple[Arrays, dict[str, Any]]:
    import mindspore

    try:
        with quiet_mindspore():
            loaded = mindspore.load_checkpoint(str(path))
        arrays = {name: parameter.asnumpy() for name, parameter in loaded.items()}
    except (
        Exception
    ) as failure:  # MindSpore raises many kinds, down to AttributeError, for damaged files
        raise UserError(
            f"checkpoint '{path}' is truncated or not a MindSpore checkpoint, .safetensors, .pth "
            "or .hdf5"
        ) from failure
    stored = arrays.pop(CHECKSUM, None)
    if stored is not None and stored.tobytes() != content_checksum(arrays):
        raise UserError(
            f"checkpoint '{path}' is damaged: its checksum differs from its contents; use another "
            "one"
        )
    encoded = arrays.pop(METADATA, None)
    return arrays, _decoded(path, encoded.tobytes()) if encoded is not None else {}


def _read_safetensors(path: Path) -> tuple[Arrays, dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="np") as file:
            names = file.keys()
            if set(names) == set(PACKED_TENSORS):
                raise UserError(
                    f"'{path}' is a packed data set, not weights; it is for --data_path"
                )
            arrays = {name: _native(file.get_tensor(name)) for name in names}
            metadata = file.metadata() or {}
    except (SafetensorError, TypeError, ValueError, OSError, AttributeError) as failure:
        raise UserError(
            f"'{path}' is a damaged .safetensors file: {str(failure).splitlines()[0]}"
        ) from None
    if METADATA in metadata:
        return arrays, _decoded(path, metadata[METADATA].encode())
    return _without_prefixes(arrays), {}


def _native(array: np.ndarray) -> np.ndarray:
    """The array in a type of numpy's own: float32 for the short ones that numpy lacks."""
    is_foreign = array.dtype.name.startswith(("bfloat16", "float8"))
    return array.astype(np.float32) if is_foreign else array


def _without_prefixes(arrays: Arrays) -> Arrays:
    """Take off the prefixes that every name has, and the count of PyTorch's averaged models."""
    arrays = {name: array for name, array in arrays.items() if name != _AVERAGED_COUNT}
    prefix = next((p for p in _NAME_PREFIXES if all(name.startswith(p) for name in arrays)), None)
    if prefix is None or not arrays:
        return arrays
    return _without_prefixes({name.removeprefix(prefix): array for name, array in arrays.items()})


def _read_torch(path: Path) -> Arrays:
    try:
        with open(path, "rb") as file:
            is_zip = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
        whole = not is_zip or zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        whole = False
    if not whole:
        raise UserError(f"'{path}' is a truncated PyTorch file or another archive")
    try:
        import torch
    except ImportError:
        raise UserError(
            f"'{path}' is a PyTorch file and PyTorch is not installed: 'pip install torch', or "
            "convert the file to .safetensors"
        ) from None
    if tuple(map(int, torch.__version__.split(".")[:2])) < _SAFE_TORCH:
        raise UserError(
            f"'{path}' is not read with PyTorch {torch.__version__}, which can be made to run code "
            "(CVE-2025-32434); install PyTorch 2.6 or later"
        )
    try:
        with torch.serialization.safe_globals(list(_HARMLESS_TYPES)):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as failure:  # UnpicklingError, RuntimeError, KeyError ... for what a file can hold
        wanted = re.search(r"GLOBAL ([\w.]+)", str(failure))
        if wanted:
            raise UserError(
                f"'{path}' is refused: its pickle asks for {wanted.group(1)}, which is code, not "
                "weights"
            ) from None
        raise UserError(f"'{path}' is truncated or no PyTorch file of weights") from None
    for wrapper in _WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if (
        not isinstance(loaded, dict)
        or not loaded
        or not all(isinstance(value, torch.Tensor) for value in loaded.values())
    ):
        raise UserError(f"'{path}' holds no dictionary of weights (a state_dict)")
    unusual = next((n for n, t in loaded.items() if t.layout is not torch.strided), None)
    if unusual is not None:
        raise UserError(f"'{path}' holds a sparse tensor ({unusual}); save it with .to_dense()")
    quantized = next((name for name, tensor in loaded.items() if tensor.is_quantized), None)
    if quantized is not None:
        raise UserError(
            f"'{path}' is of a quantized network ({quantized}); give the weights that it was "
            "quantized from"
        )
    # Integers stay integers, by which the caller recognises weights that are none.
    tensors = {
        str(name): tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in loaded.items()
    }
    return _without_prefixes({name: tensor.detach().numpy() for name, tensor in tensors.items()})


def _read_hdf5(path: Path) -> Arrays:
    try:
        import h5py
    except ImportError:
        raise UserError(
            f"'{path}' is an HDF5 file and h5py is not installed: run "
            "'bash scripts/setup.sh --hdf5'"
        ) from None
    try:
        with h5py.File(path, "r") as file:
            # ACNet's code writes '/' in a name as '+'.
            arrays = {
                name.replace("+", "/"): np.asarray(item)
                for name, item in file.items()
                if isinstance(item, h5py.Dataset)
            }
    except (OSError, RuntimeError, KeyError, ValueError) as failure:
        raise UserError(f"'{path}' is a truncated or damaged HDF5 file") from failure
    if not arrays:
        raise UserError(f"'{path}' is an HDF5 file without arrays")
    return arrays


def _decoded(path: Path, encoded: bytes) -> dict[str, Any]:
    try:
        metadata = json.loads(encoded)
    except ValueError:
        metadata = None
    if not isinstance(metadata, dict):
        raise UserError(f"checkpoint '{path}' is damaged: its metadata cannot be read")
    return metadata
