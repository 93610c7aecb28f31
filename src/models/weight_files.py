"""Reads weights from any supported format, recognised by content. Never runs code from a file."""

import argparse
import json
import logging
import os
import re
import zipfile
import zlib
from collections.abc import Collection, Mapping
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
# What training scripts call a network, in dictionaries of weights and in the names of weights.
_NETWORK_WORDS = ("module", "model", "net", "network", "backbone", "encoder", "student", "teacher")
# Dictionaries that training scripts put weights in.
_WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model_weights",
    "best_state_dict",
    "best_model",
    "weights",
    "params",
    *_NETWORK_WORDS,
)
# What wrappers around a network put before each name: torch.compile, DistributedDataParallel,
# Lightning modules, self-supervised training.
_NAME_PREFIXES = ("_orig_mod", *_NETWORK_WORDS)
# Words in such names that mark averaged weights. These are preferred: a script that keeps averages
# evaluates with them.
_AVERAGED = {"ema", "swa", "averaged", "average", "shadow"}
_AVERAGED_COUNT = "n_averaged"
# Top-level names of a classifier, in files that wrap the backbone without it.
_CLASSIFIERS = {"classifier", "head", "fc"}
# Types of other data that training scripts save next to weights. Reading them runs no code.
_HARMLESS_TYPES = (argparse.Namespace,)


Arrays = dict[str, np.ndarray]
FilePath = str | PathLike[str]


def read_weights(path: FilePath) -> tuple[Arrays, dict[str, Any]]:
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


def looks_like_weights(path: FilePath) -> bool:
    """Whether a file looks like one of the formats and, if the format shows it, is complete."""
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


def _is_whole_safetensors(path: FilePath) -> bool:
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


def text_checksum(arrays: Mapping[str, np.ndarray], metadata: str) -> str:
    """The checksum of exported .safetensors weights and what is recorded with them."""
    recorded = np.frombuffer(metadata.encode(), np.uint8)
    return content_checksum({**arrays, METADATA: recorded}).hex()


def _read_mindspore(path: FilePath) -> tuple[Arrays, dict[str, Any]]:
    import mindspore

    try:
        with quiet_mindspore():
            loaded = mindspore.load_checkpoint(str(path))
        arrays = {name: parameter.asnumpy() for name, parameter in loaded.items()}
    # MindSpore raises many kinds, down to AttributeError, for damaged files.
    except Exception as failure:
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


def _read_safetensors(path: FilePath) -> tuple[Arrays, dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="np") as file:
            names = file.keys()
            if set(names) >= set(PACKED_TENSORS):
                raise UserError(
                    f"'{path}' is a packed data set, not weights; it is for --data_path"
                )
            arrays = {name: _native(file.get_tensor(name)) for name in names}
            metadata = file.metadata() or {}
    except AttributeError as failure:  # numpy has no such type
        raise UserError(
            f"'{path}' holds weights of a type that numpy does not have ({failure.name}); save "
            "them as float32, float16 or bfloat16"
        ) from None
    except (SafetensorError, TypeError, ValueError, OSError) as failure:
        raise UserError(
            f"'{path}' is a damaged .safetensors file: {str(failure).splitlines()[0]}"
        ) from None
    if METADATA in metadata:
        stored = metadata.get(CHECKSUM)
        if stored is not None and stored != text_checksum(arrays, metadata[METADATA]):
            raise UserError(
                f"'{path}' is damaged: its checksum does not match; export it again, or fetch it "
                "again"
            )
        return arrays, _decoded(path, metadata[METADATA].encode())
    return _without_prefixes(arrays, path), {}


def _native(array: np.ndarray) -> np.ndarray:
    """``array`` as float32 if it has a type that numpy lacks (bfloat16, float8)."""
    is_foreign = array.dtype.name.startswith(("bfloat16", "float8"))
    return array.astype(np.float32) if is_foreign else array


def _without_prefixes(arrays: Arrays, path: FilePath) -> Arrays:
    """The arrays of the network, averaged ones if there are any, without a wrapper's prefix.

    Other parts of a Lightning module, such as its loss, are left out, but not a classifier.

    Raises:
        UserError: if there are several kinds of averaged weights.
    """
    prefixes = {name.partition(".")[0] for name in arrays if "." in name}
    averaged = [prefix for prefix in prefixes if _is_averaged(prefix)]
    _check_one(averaged, path, "averaged ")
    wrappers = averaged or [*prefixes & {*_NAME_PREFIXES}]
    if len(wrappers) != 1 or prefixes & _CLASSIFIERS:
        return {name: array for name, array in arrays.items() if name != _AVERAGED_COUNT}
    prefix = f"{wrappers[0]}."
    inner = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
    return _without_prefixes(inner, path)


def _is_averaged(name: str) -> bool:
    """Whether a name in another program's file stands for averaged weights."""
    return not _AVERAGED.isdisjoint(re.split(r"[^a-z]+", name.lower()))


def _find_state_dict(loaded: Any, path: FilePath, depth: int = 4) -> dict[str, Any] | None:
    """The dictionary of tensors in what a script has saved, averaged ones if there are any.

    Args:
        depth: how many dictionaries deep to look.

    Raises:
        UserError: if there are several of them.
    """
    import torch

    if not isinstance(loaded, dict) or not loaded or not depth:
        return None
    if all(isinstance(value, torch.Tensor) for value in loaded.values()):
        return loaded
    # Lightning keeps the averages of a callback.
    names = [n for n in loaded if isinstance(n, str) and (_is_averaged(n) or n == "callbacks")]
    for kind, wrappers in (("averaged ", names), ("", _WRAPPERS)):
        inner = {name: _find_state_dict(loaded.get(name), path, depth - 1) for name in wrappers}
        # Scalars are not weights: the average of a loss, or a learning rate.
        inner = {
            name: found
            for name, found in inner.items()
            if found and any(tensor.ndim for tensor in found.values())
        }
        _check_one(inner, path, kind)
        if inner:
            return next(iter(inner.values()))
    return None


def _check_one(names: Collection[str], path: FilePath, kind: str = "") -> None:
    if len(names) > 1:
        raise UserError(
            f"'{path}' holds several {kind}weights ({', '.join(sorted(names))}); save the set that "
            "you mean to a separate file"
        )


def _read_torch(path: FilePath) -> Arrays:
    try:
        with open(path, "rb") as file:
            is_zip = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
        whole = not is_zip or zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        whole = False
    if not whole:
        raise UserError(f"'{path}' is a truncated PyTorch file, or another kind of archive")
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
    # UnpicklingError, RuntimeError, KeyError and others, depending on the content.
    except Exception as failure:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(failure))
        if wanted:
            raise UserError(
                f"'{path}' is refused: its pickle asks for {wanted.group(1)}, which is code, not "
                "weights"
            ) from None
        raise UserError(f"'{path}' is truncated or not a PyTorch file of weights") from None
    found = _find_state_dict(loaded, path)
    if found is None:
        names = (
            f"; it holds {', '.join(map(str, loaded))[:100]}" if isinstance(loaded, dict) else ""
        )
        raise UserError(f"'{path}' holds no dictionary of weights (a state_dict){names}")
    loaded = found
    unusual = next((n for n, t in loaded.items() if t.layout is not torch.strided), None)
    if unusual is not None:
        raise UserError(f"'{path}' holds a sparse tensor ({unusual}); save it with .to_dense()")
    quantized = next((name for name, tensor in loaded.items() if tensor.is_quantized), None)
    if quantized is not None:
        raise UserError(
            f"'{path}' holds a quantized network ({quantized}); pass the weights that it was "
            "quantized from"
        )
    # Integer tensors stay integers, so that the caller can refuse them.
    tensors = {
        str(name): tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in loaded.items()
    }
    arrays = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
    return _without_prefixes(arrays, path)


def _read_hdf5(path: FilePath) -> Arrays:
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


def _decoded(path: FilePath, encoded: bytes) -> dict[str, Any]:
    try:
        metadata = json.loads(encoded)
    except ValueError:
        metadata = None
    if not isinstance(metadata, dict):
        raise UserError(f"checkpoint '{path}' is damaged: its metadata cannot be read")
    return metadata
