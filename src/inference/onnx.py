"""The export format ONNX. The packages onnx and onnxruntime are an optional extra."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mindspore
import numpy as np
from mindspore import Tensor, nn

from src.cli.config import Config
from src.dataset.image_set import class_names
from src.dataset.transforms import eval_transform
from src.inference.checkpoint_model import CheckpointModel
from src.inference.onnx_backend import OnnxBackend, import_onnx, open_session
from src.inference.onnx_preprocessing import add_preprocessing, preprocessing_alone
from src.models.weight_files import METADATA, quiet_mindspore
from src.utils.errors import UserError
from src.utils.files import write_atomically

# Images that exported preprocessing is checked with: (height, width), smaller and larger ones. On
# average it may differ by this many levels of 256, from rounding.
_PROBE_SIZES = ((48, 64), (331, 500))
_LEVELS = 1.0


class OnnxFormat:
    """ONNX, with the metadata as properties of the model."""

    def write(
        self, network: nn.Cell, file: Path, metadata: dict[str, Any], image_size: int
    ) -> None:
        config = Config(**metadata["config"])
        preprocessing = config if config.onnx_preprocessing else None
        write_onnx(network, file, metadata, image_size, preprocessing)

    def logits(self, file: Path, model: CheckpointModel, inputs: np.ndarray) -> np.ndarray:
        if model.config.onnx_preprocessing:
            _check_preprocessing(file, model.config)
        return OnnxBackend(file, model.config).logits(inputs)


def write_onnx(
    network: nn.Cell,
    target: Path,
    metadata: dict[str, Any],
    image_size: int,
    preprocessing: Config | None = None,
) -> None:
    """Write ``network`` as an ONNX model: ``image`` (N, 3, S, S) float32 -> ``logits`` (N, C).

    Images are normalised, N is any number. Properties of the model say how to prepare them.

    Args:
        metadata: of the checkpoint; {} for a model that is not kept.
        preprocessing: how the model prepares images itself; ``image`` is then (N, H, W, 3) uint8.

    Raises:
        UserError: if the packages are missing, the file cannot be written, or an operation has no
            counterpart in ONNX.
    """
    onnx = import_onnx()

    def write(partial: Path) -> None:
        # MindSpore removes other users' permissions from the folder that it exports to.
        with tempfile.TemporaryDirectory() as folder:
            exported = Path(folder) / "network.onnx"
            export_quietly(
                network,
                Tensor(np.zeros((1, 3, image_size, image_size), np.float32)),
                exported,
                "ONNX",
            )
            model = onnx.load(str(exported))
        _repair_onnx(model)
        if preprocessing is not None:
            model = add_preprocessing(model, preprocessing)
        onnx.helper.set_model_props(model, model_properties(metadata))
        onnx.save(model, str(partial))

    write_atomically(target, write)


def model_properties(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Properties that make an ONNX model self-describing, each as JSON (docs/using.md)."""
    properties: dict[str, Any] = {METADATA: metadata}
    if "config" in metadata:
        config = Config(**metadata["config"])
        properties |= {
            "classes": class_names(metadata["class_to_index"], config.num_classes),
            "image_size": config.image_size,
            "preprocessing": "inside" if config.onnx_preprocessing else "outside",
            "resize": config.resized_side,
            "resize_mode": config.eval_resize_mode,
            "interpolation": config.interpolation,
            "antialias": config.antialias,
            "mean": config.mean,
            "std": config.std,
        }
    return {name: json.dumps(value) for name, value in properties.items()}


def export_quietly(
    network: nn.Cell, inputs: Tensor | Sequence[Tensor], path: Path, file_format: str
) -> None:
    """mindspore.export without its log."""
    with quiet_mindspore():
        mindspore.export(network, inputs, file_name=str(path), file_format=file_format)


def _check_preprocessing(file: Path, config: Config) -> None:
    """Raise UserError if the model's preprocessing differs from this program's."""
    session = open_session(preprocessing_alone(import_onnx().load(str(file))).SerializeToString())
    for height, width in _PROBE_SIZES:
        rows, columns, channels = np.ogrid[:height, :width, :3]
        image = ((5 * rows + 3 * columns + 60 * channels) % 256).astype(np.uint8)
        (normalised,) = session.run(None, {"image": image[None]})
        pixels = 255 * (normalised[0].transpose(1, 2, 0) * config.std + config.mean)
        difference = float(np.abs(pixels - eval_transform(image, config)).mean())
        if not difference <= _LEVELS:
            raise UserError(
                f"the exported preprocessing differs by {difference:.2f} of 256 levels on average, "
                f"above {_LEVELS}; leave --onnx_preprocessing=1 out"
            )


def _repair_onnx(model: Any) -> None:
    """Fix what MindSpore 2.10 exports wrongly, name input and output, leave the batch size open."""
    for node in model.graph.node:
        attributes = {attribute.name: attribute for attribute in node.attribute}
        if node.op_type == "Conv" and len(set(attributes["kernel_shape"].ints)) > 1:
            # MindSpore writes its own order, top bottom left right; ONNX's is top left bottom
            # right.
            top, bottom, left, right = attributes["pads"].ints
            attributes["pads"].ints[:] = [top, left, bottom, right]
    names = {model.graph.input[0].name: "image", model.graph.output[0].name: "logits"}
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in (*model.graph.input, *model.graph.output):
        value.name = names.get(value.name, value.name)
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    del model.graph.value_info[:]
