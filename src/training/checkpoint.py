"""Checkpoints: complete or absent on disk, strict when loaded."""

import json
import os
from pathlib import Path

import mindspore
import numpy as np
from mindspore import Tensor

from src.utils.errors import UserError

_METADATA = "metadata"
_MISMATCHES_SHOWN = 3
_MOMENTUM = "momentum."


def save_checkpoint(path, parameters, metadata):
    """Write ``path`` (.ckpt) so that it is complete or absent, whenever the process is killed.

    Args:
        parameters: mindspore Parameters; their names are the checkpoint's.
        metadata: JSON-serialisable dict, stored beside the weights.

    Raises:
        UserError: where the folder cannot be written or the disk is full.
    """
    path = Path(path)
    # save_checkpoint insists on the suffix, and removes the old file of its name before it writes.
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial.ckpt")
    encoded = np.frombuffer(json.dumps(metadata).encode(), np.uint8)
    entries = [{"name": p.name, "data": Tensor(p.asnumpy())} for p in parameters]
    entries.append({"name": _METADATA, "data": Tensor(encoded.copy())})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mindspore.save_checkpoint(entries, str(partial))
        _flush_to_disk(partial)
        os.replace(partial, path)
        _flush_to_disk(path.parent)
    except (OSError, RuntimeError, ValueError) as failure:
        reason = getattr(failure, "strerror", None) or str(failure).strip().splitlines()[0]
        raise UserError(f"cannot write the checkpoint {path}: {reason}") from None
    finally:
        if partial.exists():
            os.chmod(partial, 0o600)
            partial.unlink()


def read_checkpoint(path):
    """Read a .ckpt into ({name: array}, metadata); metadata is {} in checkpoints of other programs.

    Raises:
        UserError: where the file is missing, truncated or of another format.
    """
    if not os.path.isfile(path):
        raise UserError(f"checkpoint '{path}' does not exist")
    try:
        with quiet_mindspore():
            loaded = mindspore.load_checkpoint(str(path))
    except Exception as failure:  # MindSpore raises many kinds, down to AttributeError, for damaged files
        raise UserError(f"checkpoint '{path}' is truncated or not a MindSpore checkpoint") from failure
    arrays = {name: parameter.asnumpy() for name, parameter in loaded.items()}
    encoded = arrays.pop(_METADATA, None)
    try:
        metadata = json.loads(encoded.tobytes()) if encoded is not None else {}
    except ValueError:
        raise UserError(f"checkpoint '{path}' is damaged: its metadata cannot be read") from None
    return arrays, metadata


def load_weights(network, arrays, path, allow_head_mismatch=False):
    """Copy {name: array} into ``network``: every name and shape must match; optimizer state is passed over.

    Args:
        path: what to call the checkpoint in messages.
        allow_head_mismatch: leave out the classifier where its shape differs.

    Raises:
        UserError: that counts the mismatches and names the first.
    """
    weights = {name: array for name, array in arrays.items() if not name.startswith(_MOMENTUM)}
    parameters = {p.name: p for p in network.get_parameters()}
    mismatches, heads = _compare(parameters, weights)
    if mismatches or (heads and not allow_head_mismatch):
        found = mismatches + heads
        hint = ("; --allow_head_mismatch=1 starts from all but the classifier" if not mismatches
                else "; is it of another network or block?")
        more = f" and {len(found) - _MISMATCHES_SHOWN} more" if len(found) > _MISMATCHES_SHOWN else ""
        raise UserError(f"checkpoint '{path}' does not fit: {', '.join(found[:_MISMATCHES_SHOWN])}{more}{hint}")
    skipped = {name for name in parameters if heads and is_classifier(name)}
    for name, parameter in parameters.items():
        if name not in skipped:
            parameter.set_data(Tensor(weights[name].astype(np.float32)))
    return sorted(skipped)


def find_checkpoints(path):
    """The checkpoint files that ``path``, a file or a folder, names.

    Raises:
        UserError: where there is none.
    """
    if not path:
        raise UserError("no checkpoint given: pass --checkpoint_file_path=FILE_OR_FOLDER")
    path = Path(path)
    if path.is_dir():
        found = sorted(file for file in path.glob("*.ckpt") if not file.name.startswith("."))
        if not found:
            raise UserError(f"there is no .ckpt file in the folder '{path}'")
        return found
    if not path.exists():
        raise UserError(f"checkpoint '{path}' does not exist")
    return [path]


def is_classifier(name):
    """True for the parameters of the last dense layer."""
    return name.startswith("classifier.")


class quiet_mindspore:
    """Within it MindSpore's own Python log is silent: its errors are reported by ours, as one line."""

    def __enter__(self):
        import logging
        self._logger = logging.getLogger("MindSpore")
        self._level = self._logger.level
        self._logger.setLevel(logging.CRITICAL + 1)

    def __exit__(self, *exception):
        self._logger.setLevel(self._level)


def _compare(parameters, weights):
    mismatches, heads = [], []
    for name, parameter in parameters.items():
        if name not in weights:
            mismatches.append(f"{name} is missing")
        elif tuple(weights[name].shape) != tuple(parameter.shape):
            what = f"{name} is {tuple(weights[name].shape)} instead of {tuple(parameter.shape)}"
            (heads if is_classifier(name) else mismatches).append(what)
    mismatches += [f"{name} is not in the network" for name in weights if name not in parameters]
    return mismatches, heads


def _flush_to_disk(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
