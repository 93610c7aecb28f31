"""The table of export formats. Imports nothing of MindSpore: a wrong name is reported at once."""

import pkgutil
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from src.utils.errors import UserError, suggestion

# {name: "MODULE:CLASS"} of ExportFormats.
EXPORT_FORMATS = {
    "CKPT": "src.inference.export:CkptFormat",
    "SAFETENSORS": "src.inference.export:SafetensorsFormat",
    "MINDIR": "src.inference.export:MindirFormat",
    "ONNX": "src.inference.onnx:OnnxFormat",
}


class ExportFormat(Protocol):
    """Writes a network, and reads the written file back to check it."""

    def write(self, network: Any, file: Path, metadata: dict[str, Any], image_size: int) -> None:
        """Write ``network`` with its metadata. Raises UserError if it cannot be written."""

    def logits(self, file: Path, model: Any, inputs: np.ndarray) -> np.ndarray:
        """Logits of the written file for normalised (N, 3, S, S) float32 inputs.

        Args:
            model: the CheckpointModel that was written.
        """


def check_format(file_format: str) -> None:
    """Raise UserError for an unknown format."""
    if file_format not in EXPORT_FORMATS:
        near = suggestion(file_format, EXPORT_FORMATS)
        known = ", ".join(EXPORT_FORMATS)
        raise UserError(f"unknown file_format={file_format}{near}; available: {known}")


def create_format(file_format: str) -> ExportFormat:
    """The ExportFormat of that name."""
    return pkgutil.resolve_name(EXPORT_FORMATS[file_format])()
