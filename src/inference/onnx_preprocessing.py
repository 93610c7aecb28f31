"""Preprocessing as the first nodes of an ONNX model, which then takes images of any size.

They compute what ``transforms.eval_transform`` and the normalisation do, to a level of 256 or two.
Needs the package onnx, an optional extra.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from src.cli.config import Config

# Resize has antialiasing since version 18 of the operations; MindSpore exports 11.
_OPERATIONS = 18
_PREFIX = "preprocessing/"
_NORMALISED = f"{_PREFIX}normalised"
# TensorProto.FLOAT and TensorProto.INT64.
_FLOAT, _INT64 = 1, 7
# Axes of (N, 3, H, W).
_HEIGHT, _WIDTH = 2, 3


def add_preprocessing(model: Any, config: Config) -> Any:
    """A copy of the model that takes (N, H, W, 3) uint8 RGB images, all of one size.

    Args:
        model: an onnx.ModelProto whose input, ``image``, is (N, 3, S, S) normalised images.
    """
    from onnx import TensorProto, helper
    from onnx.version_converter import convert_version

    model = convert_version(model, _OPERATIONS)
    graph, nodes = model.graph, _Nodes()
    network_input = graph.input[0].name
    _preprocess(nodes, network_input, config)
    for node in graph.node:
        node.input[:] = [_NORMALISED if name == network_input else name for name in node.input]
    network = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes.made, *network])
    graph.initializer.extend(nodes.constants)
    shape = ("batch", "height", "width", 3)
    graph.input[0].CopyFrom(helper.make_tensor_value_info(network_input, TensorProto.UINT8, shape))
    return model


def has_preprocessing(model: Any) -> bool:
    """Whether ``add_preprocessing`` has made the onnx.ModelProto."""
    return any(node.name.startswith(_PREFIX) for node in model.graph.node)


def preprocessing_alone(model: Any) -> Any:
    """The part that ``add_preprocessing`` has added: (N, H, W, 3) uint8 -> (N, 3, S, S) float32."""
    from onnx import TensorProto, helper

    graph = model.graph
    output = helper.make_tensor_value_info(_NORMALISED, TensorProto.FLOAT, ("batch", 3, None, None))
    nodes = [node for node in graph.node if node.name.startswith(_PREFIX)]
    constants = [one for one in graph.initializer if one.name.startswith(_PREFIX)]
    alone = helper.make_graph(nodes, "preprocessing", list(graph.input), [output], constants)
    return helper.make_model(alone, opset_imports=model.opset_import, ir_version=model.ir_version)


def remove_preprocessing(model: Any, image_size: int) -> None:
    """Undo ``add_preprocessing``, apart from the version of the operations."""
    from onnx import TensorProto, helper

    graph = model.graph
    network_input = graph.input[0].name
    network = [node for node in graph.node if not node.name.startswith(_PREFIX)]
    for node in network:
        node.input[:] = [network_input if name == _NORMALISED else name for name in node.input]
    others = [one for one in graph.initializer if not one.name.startswith(_PREFIX)]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(network)
    graph.initializer.extend(others)
    shape = ("batch", 3, image_size, image_size)
    graph.input[0].CopyFrom(helper.make_tensor_value_info(network_input, TensorProto.FLOAT, shape))


def _preprocess(nodes: "_Nodes", image: str, config: Config) -> None:
    """Add the nodes from (N, H, W, 3) uint8 to (N, 3, S, S) normalised float32."""
    planes = nodes.add("Transpose", nodes.add("Cast", image, to=_FLOAT), perm=[0, 3, 1, 2])
    size = _resized_size(nodes, image, config)
    resized = planes
    # Pillow resizes one axis after the other, and rounds after each.
    for axis, index in ((_WIDTH, 1), (_HEIGHT, 0)):
        length = nodes.add("Gather", size, nodes.integers([index]), axis=0)
        resized = _resize(nodes, resized, axis, length, config)
    cropped = _crop_centre(nodes, resized, size, config.image_size)
    # As in (pixel / 255 - mean) / std.
    scaled = nodes.add("Div", cropped, nodes.reals([255]))
    centred = nodes.add("Sub", scaled, nodes.reals(config.mean, (1, 3, 1, 1)))
    nodes.add("Div", centred, nodes.reals(config.std, (1, 3, 1, 1)), output=_NORMALISED)


def _resized_size(nodes: "_Nodes", image: str, config: Config) -> str:
    """The integers (height, width) to which ``transforms.eval_size`` resizes the image."""
    side = config.resized_side
    if config.eval_resize_mode == "square":
        return nodes.integers([side, side])
    size = nodes.add("Shape", image, start=1, end=3)
    shorter = nodes.add("ReduceMin", size, keepdims=1)
    return nodes.add("Div", nodes.add("Mul", size, nodes.integers([side])), shorter)


def _resize(nodes: "_Nodes", image: str, axis: int, length: str, config: Config) -> str:
    """The image with ``length`` rows or columns, its values rounded to integers."""
    attributes: dict[str, Any] = {
        "mode": {"bilinear": "linear", "bicubic": "cubic"}[config.interpolation],
        "antialias": int(config.antialias),
        "coordinate_transformation_mode": "half_pixel",
        "axes": [axis],
    }
    if config.interpolation == "bicubic":
        # Pillow's cubic with antialiasing, OpenCV's without.
        attributes["cubic_coeff_a"] = -0.5 if config.antialias else -0.75
        attributes["exclude_outside"] = int(config.antialias)
    resized = nodes.add("Resize", image, "", "", length, **attributes)
    if not config.antialias and axis == _WIDTH:
        # OpenCV rounds once, at the end.
        return resized
    return nodes.add("Clip", nodes.add("Round", resized), nodes.reals(0), nodes.reals(255))


def _crop_centre(nodes: "_Nodes", image: str, size: str, side: int) -> str:
    """The square of that side in the middle, which begins where Python's round() says."""
    space = nodes.add("Cast", nodes.add("Sub", size, nodes.integers([side])), to=_FLOAT)
    half = nodes.add("Round", nodes.add("Mul", space, nodes.reals([0.5])))
    start = nodes.add("Cast", half, to=_INT64)
    end = nodes.add("Add", start, nodes.integers([side]))
    return nodes.add("Slice", image, start, end, nodes.integers([_HEIGHT, _WIDTH]))


class _Nodes:
    """Nodes and constants with names of their own."""

    def __init__(self) -> None:
        self.made: list[Any] = []
        self.constants: list[Any] = []

    def add(self, operation: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Add a node. Returns the name of its output."""
        from onnx import helper

        name = f"{_PREFIX}{len(self.made)}"
        output = output or name
        self.made.append(helper.make_node(operation, inputs, [output], name, **attributes))
        return output

    def integers(self, values: Sequence[int]) -> str:
        return self._constant(np.array(values, np.int64))

    def reals(self, values: float | Sequence[float], shape: tuple[int, ...] | None = None) -> str:
        array = np.array(values, np.float32)
        return self._constant(array if shape is None else array.reshape(shape))

    def _constant(self, array: np.ndarray) -> str:
        from onnx import numpy_helper

        name = f"{_PREFIX}constant{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name
