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
from src.kernels.library import KernelChoice, choose_kernels
from src.models.build import create_network
from src.models.formats import METADATA, quiet_mindspore, read_weights
from src.models.layers import LayerFactory
from src.models.weights import assign_weights, copy_weights
from src.utils.config import Config
from src.utils.errors import UserError


class Engine(Protocol):
    """Images (B, S, S, 3) uint8 RGB -> logits (B, num_classes) float32."""

    def __call__(self, images: np.ndarray) -> np.ndarray: ...


class NetworkEngine:
    """Inference with a network in MindSpore; training mode is restored after each call."""

    def __init__(self, network: nn.Cell, config: Config) -> None:
        self.network = network
        # A MindIR file's network says nothing of its layers.
        layers = getattr(network, "layers", LayerFactory())
        self._classifier = _Classifier(network, layers.input_normalizer(config.mean, config.std))

    def __call__(self, images: np.ndarray) -> np.ndarray:
        was_training = self.network.training
        self._classifier.set_train(False)
        logits = self._classifier(Tensor(images)).asnumpy()
        self.network.set_train(was_training)
        return logits


def with_flip(engine: Engine) -> Engine:
    """``engine``, with the mean of its logits over each image and its mirror image."""
    return lambda images: (engine(images) + engine(np.ascontiguousarray(images[:, :, ::-1]))) / np.float32(2)


def network_engine(network: nn.Cell, config: Config) -> Engine:
    """The engine of ``network`` that ``config.eval_engine`` names.

    "auto" is MindSpore with oneDNN's kernels; if they are not there, onnxruntime on CPU if that is installed. Both compute the same to
    rounding, two to three times as fast as MindSpore's own kernels (benchmarks/README.md).
    """
    if not _takes_onnx(config, choose_kernels(config)):
        return NetworkEngine(network, config)
    if network.layers.has_own_layout:
        plain = create_network(config, network.layers.fused)
        copy_weights(network, plain)
        network = plain
    return OnnxEngine.of_network(network, config)


def faster_engine_hint(config: Config) -> str | None:
    """What to say to a user who could evaluate faster, or None."""
    choice = choose_kernels(config)
    return None if config.eval_engine != "auto" or _takes_onnx(config, choice) else choice.hint


def _takes_onnx(config: Config, choice: KernelChoice) -> bool:
    if config.eval_engine == "auto":
        return config.device_target == "CPU" and choice.library is None and onnx_is_installed()
    return config.eval_engine == "onnx"


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
        model = RecordedModel.of({}, metadata, flags, path)
        if path.suffix == ".onnx":
            return model, guarded(OnnxEngine(path, model.config), path), metadata
        return model, guarded(NetworkEngine(load_mindir(path), model.config), path), metadata
    arrays, metadata = read_weights(path)
    model = RecordedModel.of(arrays, metadata, flags, path)
    if reuse is not None and reuse[0] == model and isinstance(reuse[1], NetworkEngine):
        assign_weights(reuse[1].network, arrays, path)
        return model, reuse[1], metadata
    choice = choose_kernels(model.config)
    network = model.build(None if _takes_onnx(model.config, choice) else choice.library)
    assign_weights(network, arrays, path)
    return model, network_engine(network, model.config), metadata


def open_engines(path: str | Path, flags: Mapping[str, Any]) -> tuple[RecordedModel, list[Engine]]:
    """The model of ``open_engine``, and every engine there is for it: which is the fastest depends on the batch.

    With eval_engine=auto a checkpoint has the program's own kernels and onnxruntime where both are there. They agree to rounding.
    """
    model, engine, _ = open_engine(path, flags)
    engines = [engine]
    config = model.config
    if config.eval_engine == "auto" and config.device_target == "CPU" and onnx_is_installed() and isinstance(engine, NetworkEngine):
        engines.append(network_engine(engine.network, config.model_copy(update={"eval_engine": "onnx"})))
    return model, engines


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
