"""Engines: (B, S, S, 3) uint8 RGB images -> (B, num_classes) float32 logits, from a checkpoint or an exported file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import mindspore
import numpy as np
from mindspore import Tensor, nn

from src.inference.onnx_engine import OnnxEngine, import_onnxruntime, onnx_is_installed
from src.inference.recorded_model import RecordedModel
from src.models.formats import METADATA, quiet_mindspore, read_weights
from src.models.layers import InputNormalizer
from src.models.weights import assign_weights
from src.utils.config import Config
from src.utils.errors import UserError


class Engine(Protocol):
    """Images (B, S, S, 3) uint8 RGB -> logits (B, num_classes) float32."""

    def __call__(self, images: np.ndarray) -> np.ndarray: ...


class NetworkEngine:
    """Inference with a network in MindSpore; training mode is restored after each call."""

    def __init__(self, network: nn.Cell, config: Config) -> None:
        self.network = network
        self._classifier = _Classifier(network, InputNormalizer(config.mean, config.std))

    def __call__(self, images: np.ndarray) -> np.ndarray:
        was_training = self.network.training
        self._classifier.set_train(False)
        logits = self._classifier(Tensor(images)).asnumpy()
        self.network.set_train(was_training)
        return logits


def network_engine(network: nn.Cell, config: Config) -> Engine:
    """The engine that ``config.eval_engine`` names; "auto" is onnxruntime on CPU if it is installed, else MindSpore.

    onnxruntime computes the same to rounding and is 1.7 to 2.9 times faster there (benchmarks/README.md).
    """
    choice = config.eval_engine
    if choice == "auto":
        choice = "onnx" if config.device_target == "CPU" and onnx_is_installed() else "mindspore"
    return OnnxEngine.of_network(network, config) if choice == "onnx" else NetworkEngine(network, config)


def faster_engine_hint(config: Config) -> str | None:
    """What to say to a user who could evaluate faster, or None."""
    if config.eval_engine == "auto" and config.device_target == "CPU" and not onnx_is_installed():
        return "evaluating with MindSpore; with onnxruntime (bash scripts/setup.sh --onnx) it is 1.7 to 2.9 times faster on CPU"
    return None


Opened = tuple[RecordedModel, Engine, dict[str, Any]]


def open_engine(path: str | Path, flags: Mapping[str, Any], reuse: Opened | None = None) -> Opened:
    """The model of a checkpoint (.ckpt, .safetensors, .pth, .hdf5) or an exported file (.onnx, .mindir).

    Args:
        flags: the command line's {key: value}, which win over what the file records.
        reuse: an earlier result; a checkpoint of the same network is loaded into its compiled graph.

    Returns:
        (RecordedModel, engine, metadata).

    Raises:
        UserError: if the file cannot be read or does not fit.
    """
    path = Path(path)
    if path.suffix in (".onnx", ".mindir"):
        metadata = exported_metadata(path)
        model = RecordedModel.of({}, metadata, flags, path.parent)
        if path.suffix == ".onnx":
            return model, guarded(OnnxEngine(path, model.config), path), metadata
        return model, guarded(NetworkEngine(load_mindir(path), model.config), path), metadata
    arrays, metadata = read_weights(path)
    model = RecordedModel.of(arrays, metadata, flags, path.parent)
    if reuse is not None and reuse[0] == model and isinstance(reuse[1], NetworkEngine):
        assign_weights(reuse[1].network, arrays, path)
        return model, reuse[1], metadata
    network = model.build()
    assign_weights(network, arrays, path)
    return model, network_engine(network, model.config), metadata


def guarded(engine: Engine, path: Path) -> Engine:
    """``engine``, whose errors name the exported file ``path``: some damage shows only when a graph is computed."""
    def call(images: np.ndarray) -> np.ndarray:
        try:
            return engine(images)
        except Exception as failure:  # each library has its own kinds
            reason = (str(failure).strip().splitlines() or [type(failure).__name__])[0]
            raise UserError(f"'{path}' cannot be computed; it is damaged, or made for something else: {reason}") from failure
    return call


def exported_metadata(path: Path) -> dict[str, Any]:
    """What an exported file records: in the .onnx itself, beside the .mindir in FILE.json. Raises UserError."""
    if not path.is_file():
        raise UserError(f"'{path}' does not exist")
    if path.suffix == ".onnx":
        runtime = import_onnxruntime()
        try:
            found = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).get_modelmeta().custom_metadata_map
            text = found.get(METADATA, "{}")
        except Exception as failure:  # onnxruntime has its own kinds of exception, one per status code
            raise UserError(f"'{path}' is damaged or not an ONNX model: {str(failure).splitlines()[0]}") from None
    else:
        sidecar = mindir_sidecar(path)
        text = sidecar.read_text(encoding="utf-8") if sidecar.is_file() else "{}"
    try:
        return json.loads(text)
    except ValueError:
        raise UserError(f"what '{path}' records of its network is damaged; export it again") from None


def mindir_sidecar(path: Path) -> Path:
    """The file beside a .mindir that records its network, preprocessing and classes."""
    return path.with_name(path.name + ".json")


def load_mindir(path: Path) -> nn.Cell:
    """A Cell of normalised (N, 3, S, S) float32 inputs -> logits. Raises UserError for a damaged file."""
    try:
        with quiet_mindspore():
            return nn.GraphCell(mindspore.load(str(path)))
    except Exception as failure:  # MindSpore raises many kinds for damaged files
        raise UserError(f"'{path}' is damaged or not a MindIR model") from failure


class _Classifier(nn.Cell):
    def __init__(self, network: nn.Cell, normalizer: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.network, self.normalizer = network, normalizer

    def construct(self, images: Tensor) -> Tensor:
        return self.network(self.normalizer(images))
