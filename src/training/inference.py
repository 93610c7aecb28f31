"""Engines: (B, S, S, 3) uint8 RGB images -> (B, num_classes) float32 logits, from a checkpoint or an exported file."""

import json
from pathlib import Path

import mindspore
from mindspore import Tensor, nn

from src.models.formats import METADATA, quiet_mindspore, read_weights
from src.models.weights import assign_weights
from src.training.onnx_engine import OnnxEngine, import_onnxruntime, onnx_is_installed
from src.training.recorded import RecordedModel
from src.training.step import InputNormalizer
from src.utils.errors import UserError


class NetworkEngine:
    """Inference with a network in MindSpore; training mode is restored after each call."""

    def __init__(self, network, config):
        self.network = network
        self._classifier = _Classifier(network, InputNormalizer(config.mean, config.std))

    def __call__(self, images):
        was_training = self.network.training
        self._classifier.set_train(False)
        logits = self._classifier(images if isinstance(images, Tensor) else Tensor(images)).asnumpy()
        self.network.set_train(was_training)
        return logits


def network_engine(network, config):
    """The engine that ``config.eval_engine`` names; "auto" is onnxruntime on CPU where it is installed, else MindSpore.

    onnxruntime computes the same to rounding and is 1.7 to 2.9 times faster there (benchmarks/README.md).
    """
    choice = config.eval_engine
    if choice == "auto":
        choice = "onnx" if config.device_target == "CPU" and onnx_is_installed() else "mindspore"
    return OnnxEngine.of_network(network, config) if choice == "onnx" else NetworkEngine(network, config)


def faster_engine_hint(config):
    """What to tell a user who could evaluate faster, or None."""
    if config.eval_engine == "auto" and config.device_target == "CPU" and not onnx_is_installed():
        return "evaluating with MindSpore; with onnxruntime (bash scripts/setup.sh --onnx) it is 1.7 to 2.9 times faster on CPU"
    return None


def open_engine(path, flags, reuse=None):
    """The model of a checkpoint (.ckpt, .safetensors, .pth, .hdf5) or an exported file (.onnx, .mindir).

    Args:
        flags: the command line's {key: value}, which win over what the file records.
        reuse: an earlier result; a checkpoint of the same network is loaded into its compiled graph.

    Returns:
        (RecordedModel, engine, metadata).

    Raises:
        UserError: where the file cannot be read or does not fit.
    """
    path = Path(path)
    if path.suffix in (".onnx", ".mindir"):
        metadata = exported_metadata(path)
        recorded = RecordedModel.of({}, metadata, flags, path.parent)
        if path.suffix == ".onnx":
            return recorded, OnnxEngine(path, recorded.config), metadata
        return recorded, NetworkEngine(load_mindir(path), recorded.config), metadata
    arrays, metadata = read_weights(path)
    recorded = RecordedModel.of(arrays, metadata, flags, path.parent)
    if reuse is not None and reuse[0] == recorded and isinstance(reuse[1], NetworkEngine):
        assign_weights(reuse[1].network, arrays, path)
        return recorded, reuse[1], metadata
    network = recorded.build()
    assign_weights(network, arrays, path)
    return recorded, network_engine(network, recorded.config), metadata


def exported_metadata(path):
    """What an exported file records: in the .onnx itself, beside the .mindir in FILE.json. Raises UserError."""
    if not path.is_file():
        raise UserError(f"'{path}' does not exist")
    if path.suffix == ".onnx":
        runtime = import_onnxruntime()
        try:
            found = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).get_modelmeta().custom_metadata_map
            text = found.get(METADATA, "{}")
        except Exception as failure:  # onnxruntime's own kinds of exception, one a status code
            raise UserError(f"'{path}' is damaged or not an ONNX model: {str(failure).splitlines()[0]}") from None
    else:
        sidecar = mindir_sidecar(path)
        text = sidecar.read_text(encoding="utf-8") if sidecar.is_file() else "{}"
    try:
        return json.loads(text)
    except ValueError:
        raise UserError(f"what '{path}' records of its network is damaged; export it again") from None


def mindir_sidecar(path):
    """The file beside a .mindir that records its network, preprocessing and classes."""
    return path.with_name(path.name + ".json")


def load_mindir(path):
    """A Cell of normalised (N, 3, S, S) float32 inputs -> logits. Raises UserError for a damaged file."""
    try:
        with quiet_mindspore():
            return nn.GraphCell(mindspore.load(str(path)))
    except Exception as failure:  # MindSpore raises many kinds for damaged files
        raise UserError(f"'{path}' is damaged or not a MindIR model") from failure


class _Classifier(nn.Cell):
    def __init__(self, network, normalizer):
        super().__init__(auto_prefix=False)
        self.network, self.normalizer = network, normalizer

    def construct(self, images):
        return self.network(self.normalizer(images))
