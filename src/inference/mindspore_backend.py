"""Inference with MindSpore, and the files that need it: checkpoints and MindIR."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mindspore
import numpy as np
from mindspore import Tensor, nn, ops

from src.cli.config import Config
from src.inference.backends import Backend, OpenedModel, exported_metadata, naming_file, takes_onnx
from src.inference.checkpoint_model import CheckpointModel
from src.inference.onnx import write_onnx
from src.inference.onnx_backend import OnnxBackend, onnx_is_installed
from src.kernels.library import KernelChoice
from src.models.create import create_network
from src.models.layers import ImageClassifier, LayerFactory
from src.models.weight_files import quiet_mindspore, read_weights
from src.models.weights import assign_weights, copy_weights
from src.utils.errors import UserError


class MindSporeBackend:
    """Inference in MindSpore. Restores training mode after each call."""

    def __init__(self, network: nn.Cell, config: Config) -> None:
        self.network = network
        # The network of a MindIR file does not know its layers.
        layers = network.layers if isinstance(network, ImageClassifier) else LayerFactory()
        normalizer = layers.input_normalizer(config.mean, config.std)
        self._classifier = _NormalizedNetwork(network, normalizer)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        was_training = self.network.training
        self._classifier.set_train(False)
        logits = self._classifier(Tensor(images)).asnumpy()
        self.network.set_train(was_training)
        return logits


def open_file(
    path: Path, flags: Mapping[str, Any], kernels: KernelChoice, reuse: OpenedModel | None = None
) -> OpenedModel:
    """``backends.open_backend`` for checkpoints and MindIR."""
    if path.suffix == ".mindir":
        metadata = exported_metadata(path)
        model = CheckpointModel.of({}, metadata, flags, path)
        backend = MindSporeBackend(load_mindir(path), model.config)
        return OpenedModel(model, naming_file(backend, path), metadata)
    arrays, metadata = read_weights(path)
    model = CheckpointModel.of(arrays, metadata, flags, path)
    if reuse and reuse.model == model and isinstance(reuse.backend, MindSporeBackend):
        assign_weights(reuse.backend.network, arrays, path)
        return OpenedModel(model, reuse.backend, metadata)
    library = None if takes_onnx(model.config, kernels) else kernels.library
    network = create_network(model.config, library, fused=model.fused)
    assign_weights(network, arrays, path)
    return OpenedModel(model, create_backend(network, model.config, kernels), metadata)


def other_backends(opened: OpenedModel, kernels: KernelChoice) -> list[Backend]:
    """Other backends for an opened model, equal up to rounding: onnxruntime if it is installed."""
    config, first = opened.model.config, opened.backend
    on_cpu = config.eval_engine == "auto" and config.device_target == "CPU"
    # onnxruntime computes in float32.
    is_equal = on_cpu and config.compute_type == "float32"
    if not (is_equal and onnx_is_installed() and isinstance(first, MindSporeBackend)):
        return []
    onnx_config = config.model_copy(update={"eval_engine": "onnx"})
    return [create_backend(first.network, onnx_config, kernels)]


def create_backend(network: ImageClassifier, config: Config, kernels: KernelChoice) -> Backend:
    """The backend of ``network`` that the key eval_engine names.

    "auto" is MindSpore with oneDNN's kernels; without those it is onnxruntime on CPU, if installed.
    Both compute the same to rounding, two to three times as fast as MindSpore's own kernels
    (benchmarks/README.md).
    """
    if not takes_onnx(config, kernels):
        return MindSporeBackend(network, config)
    if network.layers.uses_blocked_layout or config.compute_type != "float32":
        float32 = config.model_copy(update={"amp_level": "O0"})
        plain = create_network(float32, None, fused=network.layers.fused)
        copy_weights(network, plain)
        network = plain
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        network.set_train(False)
        write_onnx(network, path, {}, config.image_size)
        return OnnxBackend(path, config)


def load_mindir(path: Path) -> nn.Cell:
    """A Cell: normalised (N, 3, S, S) float32 images -> logits. Raises UserError if damaged."""
    try:
        with quiet_mindspore():
            return nn.GraphCell(mindspore.load(str(path)))
    except Exception as failure:  # MindSpore raises many kinds for damaged files
        raise UserError(f"'{path}' is damaged or not a MindIR model") from failure


class _NormalizedNetwork(nn.Cell):
    def __init__(self, network: nn.Cell, normalizer: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.network, self.normalizer = network, normalizer

    def construct(self, images: Tensor) -> Tensor:
        return ops.cast(self.network(self.normalizer(images)), mindspore.float32)
