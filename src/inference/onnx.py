"""ONNX: writing networks as model files, and inference with onnxruntime.

The packages onnx and onnxruntime are an optional extra.
"""

import importlib.util
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import mindspore
import numpy as np
from mindspore import Tensor, nn

from src.cli.config import Config
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
    """Write ``network`` as an ONNX model of normalised (N, 3, S, S) float32 images, any N.

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
        onnx.helper.set_model_props(model, {METADATA: json.dumps(metadata)})
        onnx.save(model, str(partial))

    write_whole(target, write)


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
    """Fix what MindSpore 2.10 exports wrongly, and leave the batch size open."""
    for node in model.graph.node:
        attributes = {attribute.name: attribute for attribute in node.attribute}
        if node.op_type == "Conv" and len(set(attributes["kernel_shape"].ints)) > 1:
            # MindSpore writes its own order, top bottom left right; ONNX's is top left bottom
            # right.
            top, bottom, left, right = attributes["pads"].ints
            attributes["pads"].ints[:] = [top, left, bottom, right]
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    del model.graph.value_info[:]
