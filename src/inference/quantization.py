"""An exported ONNX model in 8-bit integers, by onnxruntime's static quantisation, beside the one in float32."""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from src.dataset.batches import EvalBatches, prefetch
from src.dataset.image_set import ImageSet
from src.inference.engines import exported_metadata, open_engine
from src.inference.evaluation import Accuracy, Evaluator
from src.inference.onnx_engine import OnnxEngine, import_onnx
from src.inference.recorded_model import RecordedModel
from src.models.formats import METADATA
from src.parallel.communicator import Communicator
from src.utils.config import Config
from src.utils.files import write_whole

_BATCH = 16
_OPERATIONS = 13


@dataclass(frozen=True)
class Quantized:
    """What both forms reach on the same images, and what was written."""

    path: Path
    float32: Accuracy
    int8: Accuracy


def quantize(exported: Path, flags: Mapping[str, Any], count: int, log: Callable[[str], None]) -> Quantized:
    """Write ``exported``, an ONNX file of a network in float32, beside it with weights and activations of 8 bits.

    Weights have a scale for each output channel, activations one each, by their smallest and largest values on ``count`` images spread
    over the training images (Jacob et al., arXiv:1712.05877; onnxruntime's QDQ form). Both are then evaluated on the validation images.

    Args:
        flags: the command line's {key: value}, as data_path, which win over what the file records.

    Raises:
        UserError: if packages or images are missing, or the file cannot be written.
    """
    onnx = import_onnx()
    from onnx.version_converter import convert_version
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process
    metadata = exported_metadata(exported)
    model = RecordedModel.of({}, metadata, flags, exported)
    engine, images = OnnxEngine(exported, model.config), model.open_images()
    calibration = model.open_training_images()
    target = exported.with_name(f"{exported.stem}_int8.onnx")

    def write(partial: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            prepared = Path(folder) / "prepared.onnx"
            # Scales for each channel came with version 13 of the operations; MindSpore exports 11.
            onnx.save(convert_version(onnx.load(str(exported)), _OPERATIONS), str(prepared))
            quant_pre_process(str(prepared), str(prepared), skip_symbolic_shape=True)
            quantize_static(str(prepared), str(partial), _Calibration(calibration, engine, model.config, count),
                            quant_format=QuantFormat.QDQ, per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)
        written = onnx.load(str(partial))
        onnx.helper.set_model_props(written, {METADATA: json.dumps(metadata)})
        onnx.save(written, str(partial))
    write_whole(target, write)
    evaluator = Evaluator(images, model.config, Communicator(), log)
    return Quantized(target, evaluator(engine), evaluator(open_engine(target, {})[1]))


class _Calibration:
    """Normalised images in batches, as onnxruntime asks for them: {name of the input: array} or None at the end."""

    def __init__(self, images: ImageSet, engine: OnnxEngine, config: Config, count: int) -> None:
        chosen = images.at(np.unique(np.linspace(0, len(images) - 1, min(count, len(images))).astype(int)))
        self._batches = self._inputs(EvalBatches(chosen, config, 0, 1, min(_BATCH, len(chosen))), engine)

    def get_next(self) -> dict[str, Any] | None:
        return next(self._batches, None)

    @staticmethod
    def _inputs(batches: EvalBatches, engine: OnnxEngine) -> Iterator[dict[str, Any]]:
        for batch in prefetch(batches):
            good = batch.images[batch.labels >= 0]
            if len(good):
                yield {engine.input_name: engine.normalised(good)}
