"""ONNX: writing networks as model files, and inference with onnxruntime.

The packages onnx and onnxruntime are an optional extra.
"""

import importlib.util
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import mindspore
import numpy as np
from mindspore import Tensor, nn

from src.cli.config import Config
from src.dataset.image_set import class_names
from src.inference.checkpoint_model import CheckpointModel
from src.models.weight_files import METADATA, quiet_mindspore
from src.utils.errors import UserError
from src.utils.files import write_whole
from src.utils.machine import available_cores

_INSTALL_ONNX = "ONNX needs two more packages: run 'bash scripts/setup.sh --onnx'"


class OnnxBackend:
    """Inference with onnxruntime: (B, S, S, 3) uint8 images -> (B, classes) logits."""

    def __init__(self, path: Path, config: Config) -> None:
        runtime = import_onnxruntime()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = available_cores()
        try:
            self._session = runtime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as failure:  # onnxruntime has an exception for each status code
            raise UserError(
                f"'{path}' is damaged or not an ONNX model: {str(failure).splitlines()[0]}"
            ) from None
        self.input_name = self._session.get_inputs()[0].name
        self._mean, self._std = (
            np.asarray(value, np.float32) for value in (config.mean, config.std)
        )

    @classmethod
    def of_network(cls, network: nn.Cell, config: Config) -> "OnnxBackend":
        """The backend of ``network`` with its present weights.

        MindSpore 2.10 exports a network only once.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "network.onnx"
            network.set_train(False)
            write_onnx(network, path, {}, config.image_size)
            return cls(path, config)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self.logits(self.normalised(images))

    def normalised(self, images: np.ndarray) -> np.ndarray:
        """(B, S, S, 3) uint8 RGB images -> the network's input, (B, 3, S, S) float32."""
        scaled = (images.astype(np.float32) / np.float32(255) - self._mean) / self._std
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))

    def logits(self, inputs: np.ndarray) -> np.ndarray:
        """Logits of normalised (N, 3, S, S) float32 inputs."""
        return self._session.run(None, {self.input_name: inputs})[0]


class OnnxFormat:
    """The export format ONNX."""

    def write(
        self, network: nn.Cell, file: Path, metadata: dict[str, Any], image_size: int
    ) -> None:
        write_onnx(network, file, metadata, image_size)

    def logits(self, file: Path, model: CheckpointModel, inputs: np.ndarray) -> np.ndarray:
        return OnnxBackend(file, model.config).logits(inputs)


def write_onnx(network: nn.Cell, target: Path, metadata: dict[str, Any], image_size: int) -> None:
    """Write ``network`` as an ONNX model: ``image`` (N, 3, S, S) float32 -> ``logits`` (N, C).

    Images are normalised, N is any number. Properties of the model say how to prepare them.

    Args:
        metadata: of the checkpoint; {} for a model that is not kept.

    Raises:
        UserError: if the packages are missing, the file cannot be written, or an operation has no
            counterpart in ONNX.
    """
    onnx = import_onnx()

    def write(partial: Path) -> None:
        # MindSpore removes other users' permissions from the folder that it exports to.
        with tempfile.TemporaryDirectory() as folder:
            exported = Path(folder) / "network.onnx"
            export_quietly(
                network,
                Tensor(np.zeros((1, 3, image_size, image_size), np.float32)),
                exported,
                "ONNX",
            )
            model = onnx.load(str(exported))
        _repair_onnx(model)
        onnx.helper.set_model_props(model, model_properties(metadata))
        onnx.save(model, str(partial))

    write_whole(target, write)


def model_properties(metadata: Mapping[str, Any]) -> dict[str, str]:
    """What an ONNX model says of itself, each value as JSON: see docs/using.md."""
    properties: dict[str, Any] = {METADATA: metadata}
    if "config" in metadata:
        config = Config(**metadata["config"])
        properties |= {
            "classes": class_names(metadata["class_to_index"], config.num_classes),
            "image_size": config.image_size,
            "resize": config.resized_side,
            "resize_mode": config.eval_resize_mode,
            "interpolation": config.interpolation,
            "antialias": config.antialias,
            "mean": config.mean,
            "std": config.std,
        }
    return {name: json.dumps(value) for name, value in properties.items()}


def export_quietly(
    network: nn.Cell, inputs: Tensor | Sequence[Tensor], path: Path, file_format: str
) -> None:
    """mindspore.export without its log."""
    with quiet_mindspore():
        mindspore.export(network, inputs, file_name=str(path), file_format=file_format)


def onnx_is_installed() -> bool:
    """True if both packages are."""
    return all(importlib.util.find_spec(name) is not None for name in ("onnx", "onnxruntime"))


def import_onnx() -> ModuleType:
    """The package onnx, an optional extra. Raises UserError that says what to install."""
    try:
        import onnx
        import onnxruntime  # noqa: F401 - what is written is checked with it
    except ImportError:
        raise UserError(_INSTALL_ONNX) from None
    return onnx


def import_onnxruntime() -> ModuleType:
    """The package onnxruntime, an optional extra. Raises UserError that says what to install."""
    try:
        import onnxruntime
    except ImportError:
        raise UserError(_INSTALL_ONNX) from None
    onnxruntime.set_default_logger_severity(4)
    return onnxruntime


def _repair_onnx(model: Any) -> None:
    """Fix what MindSpore 2.10 exports wrongly, name input and output, leave the batch size open."""
    for node in model.graph.node:
        attributes = {attribute.name: attribute for attribute in node.attribute}
        if node.op_type == "Conv" and len(set(attributes["kernel_shape"].ints)) > 1:
            # MindSpore writes its own order, top bottom left right; ONNX's is top left bottom
            # right.
            top, bottom, left, right = attributes["pads"].ints
            attributes["pads"].ints[:] = [top, left, bottom, right]
    names = {model.graph.input[0].name: "image", model.graph.output[0].name: "logits"}
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in (*model.graph.input, *model.graph.output):
        value.name = names.get(value.name, value.name)
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    del model.graph.value_info[:]
