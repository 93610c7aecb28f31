"""Backends: (B, S, S, 3) uint8 RGB images -> (B, num_classes) float32 logits."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import mindspore
import numpy as np
from mindspore import Tensor, nn, ops

from src.cli.config import Config
from src.inference.checkpoint_model import CheckpointModel
from src.inference.onnx import OnnxBackend, import_onnxruntime, onnx_is_installed
from src.kernels.library import KernelChoice
from src.models.create import create_network
from src.models.layers import ImageClassifier, LayerFactory
from src.models.weight_files import METADATA, quiet_mindspore, read_weights
from src.models.weights import assign_weights, copy_weights
from src.utils.errors import UserError


class Backend(Protocol):
    """Images (B, S, S, 3) uint8 RGB -> logits (B, num_classes) float32."""

    def __call__(self, images: np.ndarray) -> np.ndarray: ...


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


@dataclass(frozen=True)
class OpenedModel:
    """A checkpoint or exported file that is ready for inference.

    Attributes:
        metadata: what the file records.
    """

    model: CheckpointModel
    backend: Backend
    metadata: dict[str, Any] = field(compare=False)

    @property
    def classify(self) -> Backend:
        """The backend; with test_flip it averages over each image and its mirror image."""
        return with_flip(self.backend) if self.model.config.test_flip else self.backend


def open_backend(
    path: str | Path,
    flags: Mapping[str, Any],
    kernels: KernelChoice,
    reuse: OpenedModel | None = None,
) -> OpenedModel:
    """Open a checkpoint (.ckpt, .safetensors, .pth, .hdf5) or an exported file (.onnx, .mindir).

    Args:
        flags: the command line's {key: value}; they win over what the file records.
        reuse: an earlier result; a checkpoint of the same network is loaded into its compiled
            graph.

    Raises:
        UserError: if the file cannot be read or does not fit.
    """
    path = Path(path)
    if path.suffix in (".onnx", ".mindir"):
        return _open_exported(path, flags)
    arrays, metadata = read_weights(path)
    model = CheckpointModel.of(arrays, metadata, flags, path)
    if reuse and reuse.model == model and isinstance(reuse.backend, MindSporeBackend):
        assign_weights(reuse.backend.network, arrays, path)
        return OpenedModel(model, reuse.backend, metadata)
    library = None if _takes_onnx(model.config, kernels) else kernels.library
    network = model.create_network(library)
    assign_weights(network, arrays, path)
    return OpenedModel(model, create_backend(network, model.config, kernels), metadata)


def create_backend(network: ImageClassifier, config: Config, kernels: KernelChoice) -> Backend:
    """The backend of ``network`` that the key eval_engine names.

    "auto" is MindSpore with oneDNN's kernels; without those it is onnxruntime on CPU, if installed.
    Both compute the same to rounding, two to three times as fast as MindSpore's own kernels
    (benchmarks/README.md).
    """
    if not _takes_onnx(config, kernels):
        return MindSporeBackend(network, config)
    if network.layers.uses_blocked_layout or config.compute_type != "float32":
        float32 = config.model_copy(update={"amp_level": "O0"})
        plain = create_network(float32, None, fused=network.layers.fused)
        copy_weights(network, plain)
        network = plain
    return OnnxBackend.of_network(network, config)


def open_backends(
    path: str | Path, flags: Mapping[str, Any], kernels: KernelChoice
) -> tuple[CheckpointModel, list[Backend]]:
    """The model, and every backend for it; which one is fastest depends on the batch size.

    With eval_engine=auto a checkpoint has both MindSpore and onnxruntime if both are available.
    They agree to rounding.
    """
    opened = open_backend(path, flags, kernels)
    config, backends = opened.model.config, [opened.backend]
    on_cpu = config.eval_engine == "auto" and config.device_target == "CPU"
    first = opened.backend
    if on_cpu and onnx_is_installed() and isinstance(first, MindSporeBackend):
        onnx_config = config.model_copy(update={"eval_engine": "onnx"})
        backends.append(create_backend(first.network, onnx_config, kernels))
    return opened.model, backends


def with_flip(backend: Backend) -> Backend:
    """Averages the logits of each image and its mirror image."""

    def flipped(images: np.ndarray) -> np.ndarray:
        mirrored = np.ascontiguousarray(images[:, :, ::-1])
        return (backend(images) + backend(mirrored)) / np.float32(2)

    return flipped


def faster_backend_hint(config: Config, kernels: KernelChoice) -> str | None:
    """A hint if evaluation could be faster, else None."""
    is_slow = config.eval_engine == "auto" and not _takes_onnx(config, kernels)
    return kernels.hint if is_slow else None


def exported_metadata(path: Path) -> dict[str, Any]:
    """The metadata of an exported file: inside the .onnx, or in FILE.json next to the .mindir.

    Raises:
        UserError: if it cannot be read.
    """
    if not path.is_file():
        raise UserError(f"'{path}' does not exist")
    if path.suffix == ".onnx":
        runtime = import_onnxruntime()
        try:
            session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            text = session.get_modelmeta().custom_metadata_map.get(METADATA, "{}")
        except Exception as failure:  # onnxruntime has an exception for each status code
            reason = str(failure).splitlines()[0]
            raise UserError(f"'{path}' is damaged or not an ONNX model: {reason}") from None
    else:
        sidecar = mindir_sidecar(path)
        text = sidecar.read_text(encoding="utf-8") if sidecar.is_file() else "{}"
    try:
        return json.loads(text)
    except ValueError:
        raise UserError(f"the metadata of '{path}' is damaged; export it again") from None


def mindir_sidecar(path: Path) -> Path:
    """The file next to a .mindir that records its network, preprocessing and classes."""
    return path.with_name(path.name + ".json")


def load_mindir(path: Path) -> nn.Cell:
    """A Cell: normalised (N, 3, S, S) float32 images -> logits. Raises UserError if damaged."""
    try:
        with quiet_mindspore():
            return nn.GraphCell(mindspore.load(str(path)))
    except Exception as failure:  # MindSpore raises many kinds for damaged files
        raise UserError(f"'{path}' is damaged or not a MindIR model") from failure


def _open_exported(path: Path, flags: Mapping[str, Any]) -> OpenedModel:
    metadata = exported_metadata(path)
    model = CheckpointModel.of({}, metadata, flags, path)
    backend: Backend
    if path.suffix == ".onnx":
        backend = OnnxBackend(path, model.config)
    else:
        backend = MindSporeBackend(load_mindir(path), model.config)
    return OpenedModel(model, naming_file(backend, path), metadata)


def naming_file(backend: Backend, path: Path) -> Backend:
    """Makes errors name the exported file: some damage shows only when its graph is computed."""

    def checked(images: np.ndarray) -> np.ndarray:
        try:
            return backend(images)
        except Exception as failure:  # each library has its own kinds
            lines = str(failure).strip().splitlines() or [type(failure).__name__]
            raise UserError(
                f"'{path}' cannot be computed; it is damaged, or made for something else: "
                f"{lines[0]}"
            ) from failure

    return checked


def _takes_onnx(config: Config, kernels: KernelChoice) -> bool:
    if config.eval_engine == "auto":
        without_kernels = config.device_target == "CPU" and kernels.library is None
        return without_kernels and onnx_is_installed()
    return config.eval_engine == "onnx"


class _NormalizedNetwork(nn.Cell):
    def __init__(self, network: nn.Cell, normalizer: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.network, self.normalizer = network, normalizer

    def construct(self, images: Tensor) -> Tensor:
        return ops.cast(self.network(self.normalizer(images)), mindspore.float32)
