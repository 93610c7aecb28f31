"""What evaluation believes of a checkpoint: its preprocessing above all."""

import pytest

from src.inference.recorded_model import RecordedModel
from src.utils.config import load_config


def preprocessing(arrays, metadata, flags):
    config = RecordedModel.of(arrays, metadata, flags).config
    return config.eval_resize_mode, config.antialias, config.resized_side, config.interpolation


def test_a_checkpoint_is_evaluated_as_it_records_whatever_its_network_brings():
    recorded = load_config({"network": "resnet18", "data_path": "x", "eval_resize_mode": "square", "interpolation": "bicubic",
                            "crop_pct": "0.95", "num_classes": "10"}).model_dump(mode="json")
    assert preprocessing({}, {"config": recorded}, {}) == ("square", True, 236, "bicubic")
    assert preprocessing({}, {"config": recorded}, {"interpolation": "bilinear"}) == ("square", True, 236, "bilinear")


def test_checkpoints_of_earlier_versions_are_evaluated_as_they_were():
    """They record none of these keys, and were resized to a square without antialias."""
    recorded = load_config({"network": "resnet18", "data_path": "x", "num_classes": "10"}).model_dump(mode="json")
    for key in ("eval_resize_mode", "antialias", "interpolation", "crop_pct"):
        del recorded[key]
    assert preprocessing({}, {"config": recorded}, {}) == ("square", False, 256, "bilinear")
    assert preprocessing({}, {"config": {**recorded, "network": "cifar_quick", "image_size": 32}}, {})[2] == 37


@pytest.mark.parametrize("network", ["resnet18", "resnext50_32x4d", "alexnet"])
def test_files_of_other_programs_are_evaluated_as_there(network):
    assert preprocessing({}, {}, {"network": network, "data_path": "x"}) == ("shorter_side", True, 256, "bilinear")
    assert preprocessing({}, {}, {"network": network, "data_path": "x", "antialias": "0"})[1] is False


def test_their_cifar_networks_take_whole_images():
    model = RecordedModel.of({}, {}, {"network": "cfqkbnc", "data_path": "x"})
    assert (model.config.image_size, model.config.resized_side, model.config.mean) == (32, 32, (0.5, 0.5, 0.5))
