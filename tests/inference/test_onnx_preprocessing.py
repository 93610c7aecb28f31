"""Preprocessing inside ONNX models against the preprocessing of evaluation."""

import itertools

import numpy as np
import pytest

from src.cli.config import Config
from src.dataset.transforms import eval_transform

onnx = pytest.importorskip("onnx", reason="ONNX is an optional extra")
onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX is an optional extra")


from src.inference.onnx_preprocessing import (  # noqa: E402
    add_preprocessing,
    preprocessing_alone,
    remove_preprocessing,
)

SIDE = 32
SETTINGS = list(
    itertools.product(("square", "shorter_side"), ("bilinear", "bicubic"), (True, False))
)
# Wide and tall, smaller and larger than the crop, already resized, one row.
SIZES = ((300, 410), (41, 33), (20, 31), (36, 36), (1, 9), (150, 61))


def identity_model():
    """An ONNX model whose logits are its input."""
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["image"], ["logits"])],
        "identity",
        [value("image", onnx.TensorProto.FLOAT, ["batch", 3, SIDE, SIDE])],
        [value("logits", onnx.TensorProto.FLOAT, ["batch", 3, None, None])],
    )
    opsets = [onnx.helper.make_opsetid("", 11)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=6)


def outputs(model, images):
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(None, {"image": images})[0]


def gradient_image(height, width):
    """Smooth colours that differ along each axis and in each channel."""
    rows, columns, channels = np.ogrid[:height, :width, :3]
    waves = np.sin(rows / 7 + channels) + np.cos(columns / 5 - channels)
    return np.uint8(127 + 60 * waves)


@pytest.mark.parametrize("mode,interpolation,antialias", SETTINGS)
def test_pixels_are_those_of_evaluation(mode, interpolation, antialias):
    config = Config(
        image_size=SIDE, eval_resize_mode=mode, interpolation=interpolation, antialias=antialias
    )
    model = add_preprocessing(identity_model(), config)
    for size in SIZES:
        image = gradient_image(*size)
        normalised = outputs(model, image[None])[0].transpose(1, 2, 0)
        pixels = 255 * (normalised * np.array(config.std) + np.array(config.mean))
        expected = eval_transform(image, config)
        assert pixels.shape == expected.shape == (SIDE, SIDE, 3)
        assert np.abs(pixels - expected).max() < 2.01, size


def test_several_images_of_one_size_are_one_batch():
    images = np.stack([gradient_image(60, 80), gradient_image(60, 80)[::-1]])
    model = add_preprocessing(identity_model(), Config(image_size=SIDE))
    together = outputs(model, images)
    assert np.array_equal(
        together, np.concatenate([outputs(model, image[None]) for image in images])
    )


def test_what_was_added_can_be_taken_away_or_used_alone():
    images = gradient_image(60, 80)[None]
    model = add_preprocessing(identity_model(), Config(image_size=SIDE))
    whole = outputs(model, images)
    assert np.array_equal(outputs(preprocessing_alone(model), images), whole)
    remove_preprocessing(model, SIDE)
    assert np.array_equal(outputs(model, whole), whole)
