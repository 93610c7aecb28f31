"""The network of a checkpoint, and of files of other programs."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import make_config
from PIL import Image

from src.cli.recipes import load_config
from src.dataset.packed import pack
from src.dataset.sources import open_images
from src.inference.checkpoint_model import (
    CheckpointModel,
    first_label_message,
    infer_model_settings,
    read_class_names,
)
from src.models.published_weights import published_as
from src.utils.errors import UserError


def preprocessing(arrays, metadata, flags):
    config = CheckpointModel.of(arrays, metadata, flags).config
    return config.eval_resize_mode, config.antialias, config.resized_side, config.interpolation


def test_a_checkpoint_is_evaluated_as_it_records_whatever_its_network_brings():
    recorded = load_config(
        {
            "network": "resnet18",
            "data_path": "x",
            "eval_resize_mode": "square",
            "interpolation": "bicubic",
            "crop_pct": "0.95",
            "num_classes": "10",
        }
    ).model_dump(mode="json")
    assert preprocessing({}, {"config": recorded}, {}) == ("square", True, 235, "bicubic")
    assert preprocessing({}, {"config": recorded}, {"interpolation": "bilinear"}) == (
        "square",
        True,
        235,
        "bilinear",
    )


def test_checkpoints_of_earlier_versions_are_evaluated_as_they_were():
    """They record none of these keys, and were resized to a square without antialias."""
    recorded = load_config(
        {"network": "resnet18", "data_path": "x", "num_classes": "10"}
    ).model_dump(mode="json")
    for key in ("eval_resize_mode", "antialias", "interpolation", "crop_pct"):
        del recorded[key]
    assert preprocessing({}, {"config": recorded}, {}) == ("square", False, 256, "bilinear")
    assert (
        preprocessing({}, {"config": {**recorded, "network": "cifar_quick", "image_size": 32}}, {})[
            2
        ]
        == 37
    )


@pytest.mark.parametrize("network", ["resnet18", "resnext50_32x4d", "alexnet"])
def test_files_of_other_programs_are_evaluated_as_there(network):
    assert preprocessing({}, {}, {"network": network, "data_path": "x"}) == (
        "shorter_side",
        True,
        256,
        "bilinear",
    )
    assert (
        preprocessing({}, {}, {"network": network, "data_path": "x", "antialias": "0"})[1] is False
    )


def test_their_cifar_networks_take_whole_images():
    model = CheckpointModel.of({}, {}, {"network": "cfqkbnc", "data_path": "x"})
    assert (model.config.image_size, model.config.resized_side, model.config.mean) == (
        32,
        32,
        (0.5, 0.5, 0.5),
    )


@pytest.mark.parametrize(
    "name,network",
    [
        ("resnet50.safetensors", "resnet50"),
        ("ResNet18-f37072fd.pth", "resnet18"),
        ("resnext50_32x4d-7cdf4587.pth", "resnext50_32x4d"),
        ("sres18_acb.hdf5", "resnet18"),
        ("model.safetensors", None),
    ],
)
def test_network_is_the_one_that_the_file_is_called_after(tmp_path, name, network):
    assert infer_model_settings({}, {}, tmp_path / name).get("network") == network


def test_timms_config_says_how_images_are_prepared(tmp_path):
    # As on huggingface.co/timm/resnet50.a1_in1k.
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "architecture": "resnet50",
                "num_classes": 1000,
                "pretrained_cfg": {
                    "input_size": [3, 160, 160],
                    "interpolation": "bicubic",
                    "crop_pct": 0.95,
                    "crop_mode": "center",
                    "mean": [0.1, 0.2, 0.3],
                    "std": [0.4, 0.5, 0.6],
                },
            }
        )
    )
    found = infer_model_settings({}, {}, tmp_path / "model.safetensors")
    assert found == {
        "block": "base",
        "network": "resnet50",
        "image_size": 160,
        "interpolation": "bicubic",
        "crop_pct": 0.95,
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "eval_resize_mode": "shorter_side",
        "antialias": True,
    }


def test_timms_config_names_the_classes(tmp_path):
    # As timm's push_to_hf_hub writes it: one name per class, in their order.
    weights = {"fc.bias": np.zeros(3, np.float32)}
    config = {"architecture": "resnet18", "num_classes": 3, "label_names": ["owl", "ant", "bee"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = CheckpointModel.of(weights, {}, {}, tmp_path / "model.safetensors")
    assert model.class_to_index == {"owl": 0, "ant": 1, "bee": 2}
    for names in (["owl", "ant"], ["owl", "ant", "ant"]):
        (tmp_path / "config.json").write_text(json.dumps({**config, "label_names": names}))
        with pytest.raises(UserError, match="2 different label_names.*--class_names"):
            CheckpointModel.of(weights, {}, {}, tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "config,flags,words",
    [
        ({"interpolation": "lanczos"}, {}, "interpolation=lanczos.*--interpolation"),
        ({"interpolation": "lanczos"}, {"interpolation": "bicubic"}, None),
        ({"crop_mode": "border"}, {}, "crop_mode=border.*--eval_resize_mode"),
        ({"input_size": [1, 224, 224]}, {}, "input_size=.*--image_size"),
        ({"input_size": [3, 224, 320]}, {}, "input_size=.*--image_size"),
        ({"architecture": "resnet50"}, {"network": "sres18"}, "contradicts .*is of resnet50"),
        ({"architecture": "resnet50"}, {"network": "resnet50"}, None),
        ({"architecture": "resnet50.a1_in1k"}, {}, None),
        ({"architecture": "resnet50d"}, {}, "resnet50d, a network that does not exist here"),
        (
            {"architecture": "resnet18", "model_args": {"act_layer": "silu"}},
            {},
            "model_args=.*silu",
        ),
        ({"architecture": "resnet18", "model_args": {}, "global_pool": "avg"}, {}, None),
        ({"architecture": "resnet18", "global_pool": "max"}, {}, "global_pool=max"),
    ],
)
def test_a_config_that_cannot_be_followed_is_refused(tmp_path, config, flags, words):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if words is None:
        infer_model_settings({}, {}, tmp_path / "model.safetensors", flags)
        return
    with pytest.raises(UserError, match=words):
        infer_model_settings({}, {}, tmp_path / "model.safetensors", flags)


def test_a_config_of_another_network_than_the_file_is_refused(tmp_path):
    for architecture in ("resnet50", "vit_base_patch16_224"):
        (tmp_path / "config.json").write_text(json.dumps({"architecture": architecture}))
        with pytest.raises(UserError, match=f"is of {architecture} and '.*resnet18_mine"):
            infer_model_settings({}, {}, tmp_path / "resnet18_mine.safetensors")


@pytest.mark.parametrize("text", ["[", '{"pretrained_cfg": 3}'])
def test_a_damaged_config_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json is damaged"):
        infer_model_settings({}, {}, tmp_path / "model.safetensors")


def test_own_checkpoints_are_believed():
    found = infer_model_settings(
        {"x": np.zeros(1)}, {"config": {"network": "alexnet", "crop_pct": 0.9, "lr": 3}}, None
    )
    assert (found["network"], found["crop_pct"]) == ("alexnet", 0.9) and "lr" not in found


@pytest.mark.parametrize(
    "text,word",
    [("a\nb\n", "has 2 names"), ("a\nb\na\n", "'a' twice"), ("a\nb\nc\nd", "has 4 names")],
)
def test_names_must_be_one_for_each_class(tmp_path, text, word):
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(UserError, match=word):
        read_class_names(str(tmp_path / "names.txt"), 3)
    for mark in ("", "\ufeff"):
        (tmp_path / "names.txt").write_text(f"{mark}a\n b c\n\nd\n", encoding="utf-8")
        assert read_class_names(str(tmp_path / "names.txt"), 3) == {"a": 0, "b c": 1, "d": 2}


@pytest.mark.parametrize("text", ['{"a": 0, "b": 0, "c": 1}', '{"a": 0, "b": 1}', '{"a": 7}'])
def test_a_class_map_must_have_one_name_for_each_class(tmp_path, text):
    (tmp_path / "class_indexing.json").write_text(text)
    with pytest.raises(UserError, match="one name for each of the network's 3 classes"):
        read_class_names(str(tmp_path / "class_indexing.json"), 3)
    weights = {"fc.bias": np.zeros(3, np.float32)}
    with pytest.raises(UserError, match="one name for each of the network's 3 classes"):
        CheckpointModel.of(weights, {}, {}, tmp_path / "resnet18.safetensors")
    # The map of another network in the folder above is none of its business.
    (tmp_path / "weights").mkdir()
    model = CheckpointModel.of(weights, {}, {}, tmp_path / "weights" / "resnet18.safetensors")
    assert model.class_to_index is None


def opened(tmp_path, folders, classes):
    """The ImageSet for weights of that many classes without names."""
    for name in folders:
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "data" / name / "a.png")
    keys = {"network": "resnet18", "num_classes": str(classes), "data_path": f"{tmp_path}/data"}
    return CheckpointModel(load_config(keys), False, None).open_images()


@pytest.mark.parametrize("folders", [range(12), (3, 5, 7)])
def test_folders_that_are_numbers_are_the_labels(tmp_path, folders):
    """Sorted as text, 10 came before 2, and 3, 5, 7 were 0, 1, 2: a network that is right in every
    image had 16.67 and 0 %."""
    images = opened(tmp_path, map(str, folders), 12)
    assert [int(Path(path).parent.name) for path in images.paths] == images.labels.tolist()
    # Predictions of classes without a folder are counted too.
    assert images.num_classes == 12


def test_fewer_folders_than_classes_without_names_are_refused(tmp_path):
    with pytest.raises(UserError, match="12 classes without names.*2 class folders.*--class_names"):
        opened(tmp_path, ["cat", "dog"], 12)


def test_as_many_folders_as_classes_are_labelled_in_their_order(tmp_path):
    images = opened(tmp_path, ["cat", "dog", "ant"], 3)
    assert images.class_to_index == {"ant": 0, "cat": 1, "dog": 2}


def test_a_backbone_cannot_predict(tmp_path):
    arrays = {"conv1.weight": np.zeros((64, 3, 7, 7), np.float32)}
    with pytest.raises(UserError, match="has no classifier.*config_path=finetune"):
        CheckpointModel.of(arrays, {}, {"network": "resnet18"}, tmp_path / "x.pth")


def test_numbered_folders_that_fit_no_order_are_refused(tmp_path):
    """1 to 10 for ten classes: as text, 10 would be the second."""
    with pytest.raises(UserError, match="10 classes without names.*--class_names"):
        opened(tmp_path, map(str, range(1, 11)), 10)


def test_numbered_folders_that_count_from_1_are_refused(tmp_path):
    """Of a set that counts from 1, every label would be one too large."""
    with pytest.raises(UserError, match="1000 classes without names.*--class_names"):
        opened(tmp_path, ["1", "2", "3"], 1000)


@pytest.mark.parametrize("names,warned", [(("1", "142"), True), (("0", "142"), False)])
def test_numbers_that_may_count_from_1_are_said_to_count_from_0(tmp_path, names, warned):
    images = opened(tmp_path, names, 1000)
    model = CheckpointModel(load_config({"network": "resnet18", "data_path": "x"}), False, None)
    line = first_label_message(model, images)
    assert (line or "").startswith("warning: the class folders 1, 142") == warned


def test_folders_of_many_numbers_may_have_been_sorted_as_text(tmp_path):
    images = opened(tmp_path, map(str, range(12)), 12)
    keys = {"network": "resnet18", "data_path": "x", "num_classes": "12"}
    model = CheckpointModel(load_config(keys), False, None)
    assert images.labels.tolist() == sorted(range(12), key=str)
    assert "the folder 10 as label 10; if the network was" in first_label_message(model, images)


def test_two_folders_of_one_number_are_refused(tmp_path):
    with pytest.raises(UserError, match="two class folders of one number, as 1 and 01 are"):
        opened(tmp_path, ["1", "01", "7"], 1000)


@pytest.mark.parametrize("name", ["resnet18.a1_in1k.pth", "resnet50-11ad3fa6.pth"])
def test_published_weights_are_known_by_their_own_names(tmp_path, name):
    """Wherever the file is, its preprocessing is that of the name."""
    published = published_as(name)
    settings = infer_model_settings({}, {}, tmp_path / name)
    assert settings["network"] == published.network
    assert settings["crop_pct"] == published.crop_pct
    assert settings["interpolation"] == published.interpolation


def test_numbers_that_are_no_labels_are_not_said_to_be(tmp_path):
    """Nine folders 1 to 9 for nine classes are labelled in their order."""
    images = opened(tmp_path, map(str, range(1, 10)), 9)
    model = CheckpointModel(load_config({"network": "resnet18", "data_path": "x"}), False, None)
    assert images.labels.tolist() == list(range(9)) and first_label_message(model, images) is None


def test_a_packed_set_of_numbered_folders_has_their_labels(tmp_path):
    opened(tmp_path, ["1", "142"], 1000)
    folders = open_images(f"{tmp_path}/data", "train")
    pack(folders, f"{tmp_path}/a.safetensors", 0, 95, 1, lambda count: None)
    keys = {"network": "resnet18", "num_classes": "1000", "data_path": f"{tmp_path}/a.safetensors"}
    images = CheckpointModel(load_config(keys), False, None).open_images()
    assert images.labels.tolist() == [1, 142]


@pytest.mark.parametrize("names", ["z x y", "new x z"])
def test_class_names_in_another_order_than_in_training_are_refused(names, tmp_path):
    (tmp_path / "names.txt").write_text(names.replace(" ", "\n"))
    recorded = {
        "config": {"network": "resnet18", "image_size": 224, "crop_pct": 0.875},
        "class_to_index": {"x": 0, "y": 1, "z": 2},
    }
    with pytest.raises(UserError, match="x.ckpt' in a different order"):
        CheckpointModel.of(
            {"classifier.bias": np.zeros(3, np.float32)},
            recorded,
            {"class_names": str(tmp_path / "names.txt")},
            tmp_path / "x.ckpt",
        )


def test_a_recipe_that_changes_what_is_recorded_is_told():
    recorded = make_config(
        network="cifar_quick", image_size=32, mean=[0.1, 0.1, 0.1], num_classes=10
    )
    metadata = {"config": recorded.model_dump(mode="json")}
    flags = {"config_path": "digits", "block": "base", "data_path": "x"}
    (note,) = CheckpointModel.of({}, metadata, flags).notes
    assert note.startswith("warning: --config_path=digits changes mean from what"), note
    flags |= {"mean": "0.1,0.1,0.1", "std": "1,1,1"}
    assert CheckpointModel.of({}, metadata, flags).notes == ()
    assert CheckpointModel.of({}, metadata, {"data_path": "x"}).notes == ()


@pytest.mark.parametrize(
    "flags,words",
    [
        ({"crop_pct": "0.5", "eval_resize": "40"}, "--crop_pct changes nothing with --eval_resize"),
        ({"reduced_decoding": "all"}, "--reduced_decoding changes nothing without --antialias"),
        ({"calibration_images": "9"}, "--calibration_images changes nothing without --quantize"),
        ({"amp_level": "O2", "eval_engine": "onnx"}, "--amp_level changes nothing with onnxr"),
    ],
)
def test_flags_that_change_nothing_in_evaluation_are_told(flags, words):
    recorded = make_config(network="cifar_quick", image_size=32, num_classes=10)
    metadata = {"config": recorded.model_dump(mode="json")}
    (note,) = CheckpointModel.of({}, metadata, {"data_path": "x", **flags}).notes
    assert words in note


def test_two_choices_of_validation_images_are_refused():
    recorded = make_config(network="cifar_quick", image_size=32, num_classes=10)
    metadata = {"config": recorded.model_dump(mode="json")}
    with pytest.raises(UserError, match="give only one of them"):
        CheckpointModel.of({}, metadata, {"eval_data_path": "x", "val_split": "0.2"})
    for no_choice in ("auto", "0"):
        CheckpointModel.of({}, metadata, {"eval_data_path": "x", "val_split": no_choice})


def test_images_are_evaluated_by_the_pipeline_that_training_had():
    """Photographs that are stored turned had 98.9 % in training, and 5.9 % in evaluation."""
    recorded = make_config(network="cifar_quick", num_classes=10, input_pipeline="mindspore")
    metadata = {"config": recorded.model_dump(mode="json")}
    model = CheckpointModel.of({}, metadata, {"data_path": "x"})
    assert model.config.input_pipeline == "mindspore" and not model.notes
    (note,) = model.prediction_notes
    assert note.startswith("warning: training prepared images with input_pipeline=mindspore")
    own = CheckpointModel.of({}, metadata, {"data_path": "x", "input_pipeline": "own"})
    assert own.config.input_pipeline == "own" and not own.prediction_notes
