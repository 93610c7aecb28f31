"""Checkpoints to files for deployment, each loaded back and compared before it counts as written."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mindspore
import numpy as np
from mindspore import Tensor, nn

from src.dataset.sources import open_images
from src.dataset.transforms import eval_transform
from src.inference.engines import load_mindir, mindir_sidecar
from src.inference.onnx_engine import OnnxEngine, export_quietly, write_onnx
from src.inference.recorded_model import RecordedModel
from src.models.formats import METADATA, read_weights
from src.models.fusion import fuse
from src.models.layers import InputNormalizer
from src.models.networks import NetworkSize, torch_name
from src.models.weights import assign_weights
from src.runs.checkpoint import save_checkpoint
from src.utils.config import Config
from src.utils.errors import UserError
from src.utils.files import write_whole

_TOLERANCE = 1e-4
_PROBES = 4


@dataclass(frozen=True)
class Exported:
    """An exported file, its network before and after fusion, and what comparing the file's logits found.

    ``difference`` is the largest over random inputs and real images of |logit - original| / largest |original|.
    """

    path: Path
    original: NetworkSize
    exported: NetworkSize
    difference: float


def export_checkpoint(path: Path, flags: Mapping[str, Any], file_format: str, fused: bool = True, target: str = "") -> Exported:
    """Write the network of checkpoint ``path`` as "CKPT", "MINDIR", "ONNX" or "SAFETENSORS".

    MINDIR and ONNX take (N, 3, S, S) float32 normalised images, any N.

    Args:
        fused: fuse the blocks, if the network has any.
        target: the file to write; by default beside the checkpoint, named after it.

    Raises:
        UserError: if it cannot be written, or differs from the checkpoint by more than 1e-4 (it is removed then).
    """
    arrays, metadata = read_weights(path)
    model = RecordedModel.of(arrays, metadata, flags, path)
    network = model.build()
    assign_weights(network, arrays, path)
    network.set_train(False)
    fuses = fused and model.has_branches
    plain = fuse(network) if fuses else network
    metadata = {**metadata, "config": model.config.model_dump(mode="json"), "class_to_index": model.class_to_index,
                "fused": fuses or model.fused}
    written = Path(target) if target else _default_target(path, file_format, fuses)
    if written.resolve() == path.resolve():
        raise UserError(f"'{written}' is the checkpoint itself; choose another --result_path")
    # MindSpore adds it where it is missing, and writes another file than was asked for.
    if file_format != "SAFETENSORS" and written.suffix.lower() != f".{file_format.lower()}":
        raise UserError(f"--result_path={target} must end in .{file_format.lower()}, by which the file is known later")
    size = model.config.image_size
    _WRITERS[file_format](plain, written, metadata, size)
    try:
        inputs = _probes(model.config)
        difference = _difference(network(Tensor(inputs)).asnumpy(), _logits_of_file(written, file_format, model, inputs))
        if not difference <= _TOLERANCE:
            raise UserError(f"the exported file differs from the checkpoint by {difference:.1e}, above {_TOLERANCE:g}")
    except UserError:
        for file in (written, mindir_sidecar(written)):
            file.unlink(missing_ok=True)
        raise
    return Exported(written, network_size(network, size), network_size(plain, size), difference)


def network_size(network: nn.Cell, image_size: int) -> NetworkSize:
    """NetworkSize for one (3, image_size, image_size) image."""
    multiply_adds = activations = 0

    def count(cell: nn.Cell, _: Any, output: Tensor) -> None:
        nonlocal multiply_adds, activations
        outputs = output.size // output.shape[0]
        activations += outputs
        if not isinstance(cell, nn.BatchNorm2d):
            multiply_adds += outputs * int(np.prod(cell.weight.shape[1:]))

    # Hooks are called in PyNative mode only.
    mindspore.set_context(mode=mindspore.PYNATIVE_MODE)
    hooks = [cell.register_forward_hook(count) for _, cell in network.cells_and_names()
             if isinstance(cell, (nn.Conv2d, nn.Dense, nn.BatchNorm2d))]
    try:
        network(Tensor(np.zeros((1, 3, image_size, image_size), np.float32)))
    finally:
        for hook in hooks:
            hook.remove()
        mindspore.set_context(mode=mindspore.GRAPH_MODE)
    return NetworkSize(sum(parameter.size for parameter in network.trainable_params()), multiply_adds, activations)


def _default_target(path: Path, file_format: str, fuses: bool) -> Path:
    suffix = "_fused" if fuses else "_exported" if file_format == "CKPT" else ""
    return path.with_name(f"{path.stem}{suffix}.{file_format.lower()}")


def _write_ckpt(network: nn.Cell, target: Path, metadata: dict[str, Any], image_size: int) -> None:
    save_checkpoint(target, network.get_parameters(), metadata)


def _write_safetensors(network: nn.Cell, target: Path, metadata: dict[str, Any], image_size: int) -> None:
    from safetensors.numpy import save_file
    arrays = {torch_name(p.name, network.network_name): np.ascontiguousarray(p.asnumpy()) for p in network.get_parameters()}
    write_whole(target, lambda partial: save_file(arrays, partial, {METADATA: json.dumps(metadata)}))


def _write_mindir(network: nn.Cell, target: Path, metadata: dict[str, Any], image_size: int) -> None:
    inputs = Tensor(shape=[None, 3, image_size, image_size], dtype=mindspore.float32)
    write_whole(target, lambda partial: export_quietly(network, inputs, partial, "MINDIR"))
    write_whole(mindir_sidecar(target), lambda partial: partial.write_text(json.dumps(metadata), encoding="utf-8"))


_WRITERS: dict[str, Callable[[nn.Cell, Path, dict[str, Any], int], None]] = {
    "CKPT": _write_ckpt, "SAFETENSORS": _write_safetensors, "MINDIR": _write_mindir, "ONNX": write_onnx}


def _probes(config: Config) -> np.ndarray:
    """Random inputs and real images, (N, 3, S, S) float32, normalised."""
    size = config.image_size
    random = np.random.default_rng(0).normal(size=(_PROBES, 3, size, size)).astype(np.float32)
    digits = open_images("digits", "val")
    images = np.stack([eval_transform(digits.load(index), config) for index in range(0, len(digits), len(digits) // _PROBES)])
    return np.concatenate([random, InputNormalizer(config.mean, config.std)(Tensor(images)).asnumpy()])


def _logits_of_file(target: Path, file_format: str, model: RecordedModel, inputs: np.ndarray) -> np.ndarray:
    if file_format == "ONNX":
        return OnnxEngine(target, model.config).logits(inputs)
    if file_format == "MINDIR":
        return load_mindir(target)(Tensor(inputs)).asnumpy()
    arrays, metadata = read_weights(target)
    network = RecordedModel.of(arrays, metadata, {}, target).build().set_train(False)
    assign_weights(network, arrays, target)
    return network(Tensor(inputs)).asnumpy()


def _difference(expected: np.ndarray, found: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())
