"""Backends: (B, S, S, 3) uint8 RGB images -> (B, num_classes) float32 logits.

MindSpore is imported for the files that need it only: ONNX files do not.
"""

import json
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from src.cli.config import Config
from src.inference.checkpoint_model import CheckpointModel
from src.inference.onnx_backend import OnnxBackend, onnx_is_installed, open_file
from src.kernels.library import KernelChoice
from src.models.weight_files import METADATA
from src.utils.errors import UserError
from src.utils.files import checksum

_MINDSPORE = "src.inference.mindspore_backend"
# Where the file next to a .mindir records the checksum of the .mindir.
MINDIR_CHECKSUM = "mindir_checksum"
# How far the sum of float32 probabilities may be from 1.
_SUMS_TO_1 = 1e-3


class Backend(Protocol):
    """Images (B, S, S, 3) uint8 RGB -> logits (B, num_classes) float32."""

    def __call__(self, images: np.ndarray) -> np.ndarray: ...


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
    if path.suffix == ".onnx":
        metadata = exported_metadata(path)
        model = CheckpointModel.of({}, metadata, flags, path)
        backend: Backend = OnnxBackend(path, model.config)
        if not metadata:
            backend = refusing_probabilities(backend)
        return OpenedModel(model, naming_file(backend, path), metadata)
    return pkgutil.resolve_name(f"{_MINDSPORE}:open_file")(path, flags, kernels, reuse)


def open_backends(
    path: str | Path, flags: Mapping[str, Any], kernels: KernelChoice
) -> tuple[CheckpointModel, list[Backend]]:
    """The model, and every backend for it; which one is fastest depends on the batch size.

    With eval_engine=auto a checkpoint has both MindSpore and onnxruntime if both are available.
    They agree to rounding.
    """
    opened = open_backend(path, flags, kernels)
    backends = [opened.backend]
    if Path(path).suffix != ".onnx":
        backends += pkgutil.resolve_name(f"{_MINDSPORE}:other_backends")(opened, kernels)
    return opened.model, backends


def with_flip(backend: Backend) -> Backend:
    """Averages the logits of each image and its mirror image."""

    def flipped(images: np.ndarray) -> np.ndarray:
        mirrored = np.ascontiguousarray(images[:, :, ::-1])
        return (backend(images) + backend(mirrored)) / np.float32(2)

    return flipped


def faster_backend_hint(config: Config, kernels: KernelChoice) -> str | None:
    """A hint if evaluation could be faster, else None."""
    is_slow = config.eval_engine == "auto" and not takes_onnx(config, kernels)
    return kernels.hint if is_slow else None


def exported_metadata(path: Path) -> dict[str, Any]:
    """The metadata of an exported file: inside the .onnx, or in FILE.json next to the .mindir.

    Raises:
        UserError: if it cannot be read, or belongs to another .mindir.
    """
    if not path.is_file():
        raise UserError(f"'{path}' does not exist")
    try:
        metadata = json.loads(_metadata_text(path))
    except ValueError:  # no JSON, or no UTF-8
        raise UserError(f"the metadata of '{path}' is damaged; export it again") from None
    recorded = metadata.get(MINDIR_CHECKSUM)
    if recorded is not None and recorded != checksum(path):
        raise UserError(
            f"'{mindir_sidecar(path)}' belongs to another '{path.name}', or one of the two is "
            "damaged; export it again"
        )
    return metadata


def _metadata_text(path: Path) -> str:
    if path.suffix == ".onnx":
        return open_file(path).get_modelmeta().custom_metadata_map.get(METADATA, "{}")
    sidecar = mindir_sidecar(path)
    if not sidecar.is_file():
        raise UserError(
            f"'{sidecar}' is missing, which records the network, preprocessing and classes of "
            f"'{path.name}'; copy it too, or export again"
        )
    return sidecar.read_text(encoding="utf-8")


def mindir_sidecar(path: Path) -> Path:
    """The file next to a .mindir that records its network, preprocessing and classes."""
    return path.with_name(path.name + ".json")


def refusing_probabilities(backend: Backend) -> Backend:
    """Raises UserError for outputs that are probabilities: logits are expected."""

    def checked(images: np.ndarray) -> np.ndarray:
        outputs = backend(images)
        if (outputs >= 0).all() and (np.abs(outputs.sum(axis=1) - 1) < _SUMS_TO_1).all():
            raise UserError("its outputs are probabilities; export it without the softmax")
        return outputs

    return checked


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


def takes_onnx(config: Config, kernels: KernelChoice) -> bool:
    """Whether networks are computed by onnxruntime, as the key eval_engine says."""
    if config.eval_engine == "auto":
        without_kernels = config.device_target == "CPU" and kernels.library is None
        return without_kernels and onnx_is_installed()
    return config.eval_engine == "onnx"
