"""Inference with onnxruntime. Imports nothing of MindSpore.

The packages onnx and onnxruntime are an optional extra.
"""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from src.cli.config import Config
from src.inference.onnx_preprocessing import has_preprocessing, remove_preprocessing
from src.utils.errors import UserError
from src.utils.machine import available_cores

_INSTALL_ONNX = "ONNX needs two more packages: run 'bash scripts/setup.sh --onnx'"


class OnnxBackend:
    """Inference with onnxruntime: (B, S, S, 3) uint8 images -> (B, classes) logits."""

    def __init__(self, path: Path, config: Config) -> None:
        self._session = open_file(path)
        if self._session.get_inputs()[0].type == "tensor(uint8)":
            # This program prepares images itself: the same for every kind of file.
            self._session = open_session(_network_alone(path, config.image_size))
        taken = self._session.get_inputs()[0]
        if isinstance(taken.shape[-1], int) and taken.shape[-1] != config.image_size:
            raise UserError(
                f"'{path}' takes images of {taken.shape[-1]} pixels, so --image_size="
                f"{config.image_size} is not possible"
            )
        self.input_name = taken.name
        self._mean, self._std = (
            np.asarray(value, np.float32) for value in (config.mean, config.std)
        )

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self.logits(self.normalised(images))

    def normalised(self, images: np.ndarray) -> np.ndarray:
        """(B, S, S, 3) uint8 RGB images -> the network's input, (B, 3, S, S) float32."""
        scaled = (images.astype(np.float32) / np.float32(255) - self._mean) / self._std
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))

    def logits(self, inputs: np.ndarray) -> np.ndarray:
        """Logits of normalised (N, 3, S, S) float32 inputs."""
        return self._session.run(None, {self.input_name: inputs})[0]


def onnx_is_installed() -> bool:
    """Whether the packages onnx and onnxruntime are installed."""
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


def open_session(model: str | bytes) -> Any:
    """The onnxruntime.InferenceSession of a file or of a serialized model."""
    runtime = import_onnxruntime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = available_cores()
    # Without a second try, which prints on standard output.
    return runtime.InferenceSession(
        model, options, providers=["CPUExecutionProvider"], enable_fallback=False
    )


def open_file(path: Path) -> Any:
    """The onnxruntime.InferenceSession of a file. Raises UserError if it is none."""
    import_onnxruntime()
    try:
        return open_session(str(path))
    except Exception as failure:  # onnxruntime has an exception for each status code
        reason = str(failure).splitlines()[0]
        raise UserError(f"'{path}' is damaged or not an ONNX model: {reason}") from None


def _network_alone(path: Path, image_size: int) -> bytes:
    """The model of the file without its preprocessing.

    Raises:
        UserError: if the package onnx is missing, or another program made the file.
    """
    if not onnx_is_installed():
        raise UserError(
            f"'{path}' prepares images itself; to read it here, install the package onnx, or "
            "export it without --onnx_preprocessing=1"
        )
    model = import_onnx().load(str(path))
    if not has_preprocessing(model):
        raise UserError(f"'{path}' takes uint8 images, but this program did not export it")
    remove_preprocessing(model, image_size)
    return model.SerializeToString()
