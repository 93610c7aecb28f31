"""Quantises an exported ONNX model to 8-bit integers, with onnxruntime's static quantisation."""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from src.cli.config import Config
from src.dataset.batches import EvalBatches, prefetch
from src.dataset.image_set import ImageSet
from src.distributed.communicator import Communicator
from src.inference.backends import open_backend
from src.inference.evaluation import EvalData, EvalResult
from src.inference.onnx import model_properties
from src.inference.onnx_backend import OnnxBackend, import_onnx
from src.kernels.library import KernelChoice
from src.utils.files import write_atomically
from src.utils.log import Log

_BATCH = 16
_OPERATIONS = 13


@dataclass(frozen=True)
class Quantized:
    """The written file, and the results of both forms on the same images."""

    path: Path
    float32: EvalResult
    int8: EvalResult


def int8_file(exported: Path) -> Path:
    """The 8-bit file next to an exported NAME.onnx."""
    return exported.with_name(f"{exported.stem}_int8.onnx")


def quantize(
    exported: Path, flags: Mapping[str, Any], count: int, kernels: KernelChoice, log: Log
) -> Quantized:
    """Write an 8-bit form next to ``exported``, a float32 ONNX file; evaluate both.

    Weights have one scale per output channel and activations one each, from their range on
    ``count`` images spread over the training images (Jacob et al., arXiv:1712.05877; onnxruntime's
    QDQ form).

    Args:
        flags: the command line's {key: value}; they win over what the file records.

    Raises:
        UserError: if packages or images are missing, or the file cannot be written.
    """
    onnx = import_onnx()
    from onnx.version_converter import convert_version
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    opened = open_backend(exported, flags, kernels)
    model, metadata = opened.model, opened.metadata
    backend, calibration = OnnxBackend(exported, model.config), model.open_training_images()
    data = EvalData(opened, Communicator(), log)
    data.say_whether_seen(opened, "")
    log(
        f"quantizing: the range of each activation on {min(count, len(calibration))} images of "
        f"{model.config.data_path}"
    )
    target = int8_file(exported)

    def write(partial: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            prepared = Path(folder) / "prepared.onnx"
            # Scales per channel need version 13 of the operations; MindSpore exports 11.
            onnx.save(convert_version(onnx.load(str(exported)), _OPERATIONS), str(prepared))
            quant_pre_process(str(prepared), str(prepared), skip_symbolic_shape=True)
            quantize_static(
                str(prepared),
                str(partial),
                _Calibration(calibration, backend, model.config, count),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        written = onnx.load(str(partial))
        onnx.helper.set_model_props(written, model_properties(metadata))
        onnx.save(written, str(partial))

    write_atomically(target, write)
    int8 = open_backend(target, flags, kernels)
    return Quantized(target, data.evaluate(opened), data.evaluate(int8))


class _Calibration:
    """Normalised images in batches for onnxruntime: {name of the input: array}, then None."""

    def __init__(self, images: ImageSet, backend: OnnxBackend, config: Config, count: int) -> None:
        chosen = images.at(
            np.unique(np.linspace(0, len(images) - 1, min(count, len(images))).astype(int))
        )
        self._batches = self._inputs(
            EvalBatches(chosen, config, 0, 1, min(_BATCH, len(chosen))), backend
        )

    def get_next(self) -> dict[str, Any] | None:
        return next(self._batches, None)

    @staticmethod
    def _inputs(batches: EvalBatches, backend: OnnxBackend) -> Iterator[dict[str, Any]]:
        for batch in prefetch(batches):
            good = batch.images[batch.labels >= 0]
            if len(good):
                yield {backend.input_name: backend.normalised(good)}
