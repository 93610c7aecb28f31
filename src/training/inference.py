"""Engines: (B, S, S, 3) uint8 RGB images -> (B, num_classes) float32 logits, from a checkpoint or an exported file."""

import json
from pathlib import Path

import mindspore
import numpy as np
from mindspore import Tensor, nn

from src.models.formats import METADATA, quiet_mindspore, read_weights
from src.models.weights import assign_weights
from src.training.recorded import RecordedModel
from src.training.step import InputNormalizer
from src.utils.device import available_cores
from src.utils.errors import UserError

_INSTALL_ONNX = "ONNX needs two more packages: run 'bash scripts/setup.sh --onnx'"


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


class OnnxEngine:
    """Inference with an exported .onnx by onnxruntime."""

    def __init__(self, path, config):
        runtime = import_onnxruntime()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = available_cores()
        try:
            self._session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as failure:  # onnxruntime's own kinds of exception, one a status code
            raise UserError(f"'{path}' is damaged or not an ONNX model: {str(failure).splitlines()[0]}") from None
        self._input = self._session.get_inputs()[0].name
        self._mean, self._std = (np.asarray(value, np.float32) for value in (config.mean, config.std))

    def __call__(self, images):
        images = images.asnumpy() if isinstance(images, Tensor) else images
        normalised = (images.astype(np.float32) / np.float32(255) - self._mean) / self._std
        return self.logits(np.ascontiguousarray(normalised.transpose(0, 3, 1, 2)))

    def logits(self, inputs):
        """Logits of normalised (N, 3, S, S) float32 inputs."""
        return self._session.run(None, {self._input: inputs})[0]


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
        engine = reuse[1]
    else:
        engine = NetworkEngine(recorded.build(), recorded.config)
    assign_weights(engine.network, arrays, path)
    return recorded, engine, metadata


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


def import_onnx():
    """The package onnx, an optional extra. Raises UserError that says what to install."""
    try:
        import onnx
        import onnxruntime  # noqa: F401 - what is written is checked with it
    except ImportError:
        raise UserError(_INSTALL_ONNX) from None
    return onnx


def import_onnxruntime():
    """The package onnxruntime, an optional extra. Raises UserError that says what to install."""
    try:
        import onnxruntime
    except ImportError:
        raise UserError(_INSTALL_ONNX) from None
    onnxruntime.set_default_logger_severity(4)
    return onnxruntime


class _Classifier(nn.Cell):
    def __init__(self, network, normalizer):
        super().__init__(auto_prefix=False)
        self.network, self.normalizer = network, normalizer

    def construct(self, images):
        return self.network(self.normalizer(images))
