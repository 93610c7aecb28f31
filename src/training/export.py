"""Checkpoints to files for deployment, each loaded back and compared before it counts as written."""

import os
from dataclasses import dataclass
from pathlib import Path

import mindspore
import numpy as np
from mindspore import Tensor, nn

from src.models import fuse
from src.models.formats import quiet_mindspore, read_weights
from src.models.weights import assign_weights
from src.training.checkpoint import save_checkpoint
from src.training.recorded import RecordedModel
from src.utils.errors import UserError

_TOLERANCE = 1e-4
_PROBES = 4


@dataclass(frozen=True)
class Exported:
    """An exported file: where, its bytes, trainable parameters before and after fusion, and its difference.

    ``difference`` is the largest over random images of |logit - original| / largest |original|.
    """

    path: Path
    size: int
    parameters: int
    exported_parameters: int
    difference: float


def export_checkpoint(path, flags, file_format, fused=True, target=""):
    """Write the network of checkpoint ``path`` as "CKPT" or "MINDIR".

    Args:
        fused: fuse the ACBs of an ACNet.
        target: the file to write; by default beside the checkpoint, named after it.

    Raises:
        UserError: where it cannot be written, or differs from the checkpoint by more than 1e-4 (it is removed then).
    """
    arrays, metadata = read_weights(path)
    recorded = RecordedModel.of(arrays, metadata, flags, Path(path).parent)
    network = recorded.build()
    assign_weights(network, arrays, path)
    network.set_train(False)
    fuses = fused and recorded.config.block == "acb" and not recorded.fused
    plain = fuse(network) if fuses else network
    size = recorded.config.image_size
    probes = Tensor(np.random.default_rng(0).normal(size=(_PROBES, 3, size, size)).astype(np.float32))
    suffix = "_fused" if fuses else "_exported" if file_format == "CKPT" else ""
    target = Path(target or Path(path).with_name(f"{Path(path).stem}{suffix}.{file_format.lower()}"))
    if target.resolve() == Path(path).resolve():
        raise UserError(f"'{target}' is the checkpoint itself; choose another --result_path")
    if file_format == "CKPT":
        save_checkpoint(target, plain.get_parameters(), {**metadata, "fused": fuses or recorded.fused})
    else:
        _write_mindir(plain, probes, target)
    difference = _difference(network(probes).asnumpy(), _load_back(target, file_format, flags)(probes).asnumpy())
    if not difference <= _TOLERANCE:
        target.unlink()
        raise UserError(f"the exported file differs from the checkpoint by {difference:.1e}, above {_TOLERANCE:g}; "
                        f"'{target}' was removed")
    return Exported(target, target.stat().st_size, _trainable(network), _trainable(plain), difference)


def _write_mindir(network, inputs, target):
    partial = target.with_name(f".{target.stem}.{os.getpid()}.partial.mindir")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with quiet_mindspore():
            mindspore.export(network, inputs, file_name=str(partial), file_format="MINDIR")
        os.replace(partial, target)
    except (OSError, RuntimeError, ValueError) as failure:
        reason = getattr(failure, "strerror", None) or str(failure).strip().splitlines()[0]
        raise UserError(f"cannot write '{target}': {reason}") from None
    finally:
        if partial.exists():
            os.chmod(partial, 0o600)
            partial.unlink()


def _load_back(target, file_format, flags):
    if file_format == "MINDIR":
        return nn.GraphCell(mindspore.load(str(target)))
    arrays, metadata = read_weights(target)
    network = RecordedModel.of(arrays, metadata, flags, target.parent).build()
    assign_weights(network, arrays, target)
    return network.set_train(False)


def _difference(expected, found):
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def _trainable(network):
    return sum(parameter.size for parameter in network.trainable_params())
