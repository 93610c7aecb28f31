"""Weights from files of other programs, by content and by name."""

import argparse
import json

import numpy as np
import pytest
from conftest import randomise
from hostile.weight_files import check_weight_file, draw_weight_file
from mindspore import Tensor

from src.inference.export import SafetensorsFormat
from src.models.create import create_model
from src.models.networks import acnet_name, torch_name
from src.models.reparam import fuse
from src.models.weight_files import read_weights
from src.models.weights import Head, assign_weights, load_weights
from src.runs.checkpoint import save_checkpoint
from src.utils.errors import UserError


@pytest.fixture
def saved(tmp_path):
    network = create_model("cifar_quick", 10, "acb")
    path = tmp_path / "cifar_quick-1_5.ckpt"
    save_checkpoint(path, network.get_parameters(), {"epoch": 1, "note": "žluťoučký"})
    return network, path


def assert_same_weights(first, second):
    for a, b in zip(first.get_parameters(), second.get_parameters()):
        assert a.name == b.name and np.array_equal(a.asnumpy(), b.asnumpy()), a.name


def test_checkpoint_round_trip_is_exact(saved):
    network, path = saved
    assert read_weights(path)[1] == {"epoch": 1, "note": "žluťoučký"}
    other = create_model("cifar_quick", 10, "acb")
    assert load_weights(other, path) == []
    assert_same_weights(network, other)


def test_truncated_checkpoint_is_refused(saved):
    content = saved[1].read_bytes()
    for length in (0, 10, len(content) // 2, len(content) - 1):
        saved[1].write_bytes(content[:length])
        with pytest.raises(UserError, match="truncated or not a MindSpore checkpoint"):
            read_weights(saved[1])


def test_text_file_is_refused(tmp_path):
    (tmp_path / "x.ckpt").write_text("hello\n" * 100)
    with pytest.raises(UserError, match="not a MindSpore checkpoint"):
        read_weights(tmp_path / "x.ckpt")


def test_other_network_is_refused_with_the_first_mismatches(saved):
    with pytest.raises(UserError, match="conv1.conv.weight is missing.* more"):
        load_weights(create_model("resnet18", 10), saved[1])


def test_other_class_count_loads_all_but_the_classifier_on_request(saved):
    network, path = saved
    other = create_model("cifar_quick", 4, "acb")
    before = other.classifier.weight.asnumpy().copy()
    with pytest.raises(UserError, match="classifier.weight is .*allow_head_mismatch=1"):
        load_weights(other, path)
    assert load_weights(other, path, Head.LOAD_IF_IT_FITS) == [
        "classifier.bias",
        "classifier.weight",
    ]
    assert np.array_equal(other.fc1.weight.asnumpy(), network.fc1.weight.asnumpy())
    assert np.array_equal(other.classifier.weight.asnumpy(), before)


# Names that torchvision documents in its model definitions.
@pytest.mark.parametrize(
    "network,ours,theirs",
    [
        ("resnet18", "conv1.conv.weight", "conv1.weight"),
        ("resnet18", "conv1.norm.moving_variance", "bn1.running_var"),
        ("resnet50", "layer3.0.downsample.norm.gamma", "layer3.0.downsample.1.weight"),
        ("resnext50", "layer1.2.conv2.conv.weight", "layer1.2.conv2.weight"),
        ("resnext50_32x4d", "layer4.0.conv3.norm.beta", "layer4.0.bn3.bias"),
        ("resnet34", "classifier.bias", "fc.bias"),
        ("alexnet", "conv3.weight", "features.6.weight"),
        ("alexnet", "classifier.weight", "classifier.6.weight"),
        ("mobilenet_v2", "features.0.norm.gamma", "features.0.1.weight"),
        ("mobilenet_v2", "features.1.branch.depthwise.conv.weight", "features.1.conv.0.0.weight"),
        ("mobilenet_v2", "features.1.branch.project.norm.beta", "features.1.conv.2.bias"),
        ("mobilenet_v2", "features.2.branch.expand.norm.gamma", "features.2.conv.0.1.weight"),
        (
            "mobilenet_v2",
            "features.17.branch.depthwise.norm.moving_mean",
            "features.17.conv.1.1.running_mean",
        ),
        ("mobilenet_v2", "features.17.branch.project.conv.weight", "features.17.conv.2.weight"),
        ("mobilenet_v2", "classifier.bias", "classifier.1.bias"),
        ("densenet121", "features.conv0.norm.gamma", "features.norm0.weight"),
        (
            "densenet121",
            "features.denseblock2.denselayer3.conv1.norm.beta",
            "features.denseblock2.denselayer3.norm2.bias",
        ),
        ("densenet121", "features.transition1.conv.weight", "features.transition1.conv.weight"),
        ("densenet121", "features.norm5.moving_variance", "features.norm5.running_var"),
    ],
)
def test_torchvision_names(network, ours, theirs):
    assert torch_name(ours, network) == theirs


def test_weights_that_torchvision_published_with_old_names_are_read():
    """Its files of DenseNet are older than its code, which renames norm.1 to norm1."""
    network, again = (create_model("densenet121", 3, image_size=32) for _ in range(2))
    randomise(network)
    file = {}
    for parameter in network.get_parameters():
        name = torch_name(parameter.name, "densenet121")
        for layer in ("norm1", "norm2", "conv1", "conv2"):
            if "denselayer" in name:
                name = name.replace(f".{layer}.", f".{layer[:-1]}.{layer[-1]}.")
        file[name] = parameter.asnumpy()
    assert "features.denseblock1.denselayer1.norm.1.weight" in file
    assign_weights(again, file, "densenet121-a639ec97.pth")
    for ours, theirs in zip(again.get_parameters(), network.get_parameters()):
        assert np.array_equal(ours.asnumpy(), theirs.asnumpy()), ours.name


# Names that the modules of the ACNet repository have by construction (acnet_builder.py,
# base_model/).
@pytest.mark.parametrize(
    "network,ours,fused,theirs",
    [
        (
            "resnet18",
            "layer2.0.conv1.square_bn.gamma",
            False,
            "stage2.0.conv1.acb.square_bn.weight",
        ),
        ("resnet18", "layer2.0.conv2.hor_conv.weight", False, "stage2.0.conv2.hor_conv.weight"),
        ("resnet18", "layer2.0.conv1.bias", True, "stage2.0.conv1.acb.fused_conv.bias"),
        (
            "resnet18",
            "layer2.0.downsample.norm.moving_mean",
            False,
            "stage2.0.shortcut.bn.running_mean",
        ),
        ("resnet50", "layer1.0.downsample.conv.weight", False, "stage1.projection.conv.weight"),
        ("resnet50", "layer1.2.conv2.ver_bn.beta", False, "stage1.block2.conv2.acb.ver_bn.bias"),
        ("cifar_quick", "conv2.norm.gamma", False, "conv2.bn.weight"),
        ("cifar_quick", "classifier.bias", False, "fc2.bias"),
        ("vgg16_cifar", "features.5.conv.weight", False, "stem.conv3.conv.weight"),
        ("vgg16_cifar", "features.28.weight", True, "stem.conv13.acb.fused_conv.weight"),
        (
            "resnet56_cifar",
            "blocks.9.downsample.conv.weight",
            False,
            "stage2.projection.conv.weight",
        ),
        ("resnet56_cifar", "blocks.26.conv2.norm.beta", False, "stage3.block8.conv2.bn.bias"),
        ("wrn16_8_cifar", "blocks.2.shortcut.2.weight", False, "stage2.block1.proj.conv.weight"),
        ("wrn16_8_cifar", "blocks.3.conv2.weight", False, "stage2.block2.conv2.conv.weight"),
        (
            "wrn16_8_cifar",
            "blocks.3.conv2.weight",
            True,
            "stage2.block2.conv2.acb.fused_conv.weight",
        ),
        ("wrn16_8_cifar", "conv1.square_conv.weight", False, "conv1.square_conv.weight"),
    ],
)
def test_acnet_names(network, ours, fused, theirs):
    assert acnet_name(ours, network, fused) == theirs


def arrays_named(network, naming):
    return {naming(p.name): p.asnumpy() for p in network.get_parameters()}


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d", "alexnet"])
def test_safetensors_with_torchvision_names(name, tmp_path):
    from safetensors.numpy import save_file

    network = create_model(name, 10)
    randomise(network)
    arrays = arrays_named(network, lambda ours: torch_name(ours, name))
    counts = {
        key.replace("running_mean", "num_batches_tracked"): np.array(7)
        for key in arrays
        if key.endswith("running_mean")
    }
    save_file({**arrays, **counts}, tmp_path / "w.safetensors")
    other = create_model(name, 10)
    load_weights(other, tmp_path / "w.safetensors")
    assert_same_weights(network, other)
    del arrays[next(iter(arrays))]
    save_file({**arrays, "surplus.weight": np.zeros(3, np.float32)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="is missing, surplus.weight is not in the network"):
        load_weights(other, tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    "name,fused",
    [
        (name, fused)
        for name in (
            "resnet18",
            "resnet50",
            "cifar_quick",
            "vgg16_cifar",
            "resnet56_cifar",
            "wrn16_8_cifar",
        )
        for fused in (False, True)
    ],
)
def test_acnet_hdf5(name, fused, tmp_path):
    h5py = pytest.importorskip("h5py", reason="h5py is an optional extra: pip install h5py")
    network = create_model(name, 10, "acb", image_size=32)
    randomise(network)
    network = fuse(network) if fused else network
    with h5py.File(tmp_path / "finish.hdf5", "w") as file:
        for key, value in arrays_named(network, lambda ours: acnet_name(ours, name, fused)).items():
            file.create_dataset(key, data=value)
    other = create_model(name, 10, "acb", fused=fused, image_size=32)
    load_weights(other, tmp_path / "finish.hdf5")
    assert_same_weights(network, other)
    with h5py.File(tmp_path / "finish.hdf5", "a") as file:
        key = next(key for key in file if key.endswith("conv.weight"))
        del file[key]
        file.create_dataset(key, data=np.zeros((1, 2, 3, 3), np.float32))
    with pytest.raises(UserError, match=r"is \(1, 2, 3, 3\) instead of"):
        load_weights(other, tmp_path / "finish.hdf5")


def test_pth_of_weights_and_of_code(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is a development-only dependency")
    network = create_model("resnet18", 10)
    state = {
        f"module.{name}": torch.from_numpy(array.copy())
        for name, array in arrays_named(network, lambda ours: torch_name(ours, "resnet18")).items()
    }
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "w.pth")
    other = create_model("resnet18", 10)
    load_weights(other, tmp_path / "w.pth")
    assert_same_weights(network, other)

    class Attack:
        def __reduce__(self):
            import os

            return os.system, (f"touch {tmp_path}/executed",)

    torch.save({"state_dict": Attack()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="refused: its pickle asks for (posix|os).system"):
        load_weights(other, tmp_path / "evil.pth")
    assert not (tmp_path / "executed").exists()
    content = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "w.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="truncated"):
        load_weights(other, tmp_path / "w.pth")


@pytest.mark.parametrize(
    "content",
    [
        b"\x89HDF\r\n\x1a\n" + b"\0" * 50,
        b"PK\x03\x04" + b"x" * 60,
        b"\x80\x02}q\x00.",
        (20).to_bytes(8, "little") + b"{not json at all....",
    ],
)
def test_damaged_files_are_one_clear_error(tmp_path, content):
    (tmp_path / "w").write_bytes(content + b" " * 20)
    with pytest.raises(UserError, match="w'"):
        read_weights(tmp_path / "w")


def test_exported_safetensors_have_a_checksum(tmp_path):
    network = create_model("cifar_quick", 10)
    file = tmp_path / "a.safetensors"
    SafetensorsFormat().write(network, file, {"config": {}}, 32)
    content = bytearray(file.read_bytes())
    assert read_weights(file)[1] == {"config": {}}
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="a.safetensors' is damaged: its checksum"):
        read_weights(file)


def test_loaded_network_computes_the_same(saved):
    network, path = saved
    other = create_model("cifar_quick", 10, "acb")
    load_weights(other, path)
    x = Tensor(np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32))
    assert np.array_equal(
        network.set_train(False)(x).asnumpy(), other.set_train(False)(x).asnumpy()
    )


@pytest.mark.parametrize(
    "name,value,message",
    [
        ("conv1.conv.weight", np.nan, "conv1.conv.weight has 1 values that are not finite"),
        ("fc1.bias", np.inf, "fc1.bias has 1 values"),
        ("conv2.norm.moving_variance", -0.5, "conv2.norm.moving_variance has negative variances"),
    ],
)
def test_weights_of_no_use_are_refused_by_name(tmp_path, name, value, message):
    network = create_model("cifar_quick", 10)
    parameter = {p.name: p for p in network.get_parameters()}[name]
    array = parameter.asnumpy().copy()
    array.reshape(-1)[0] = value
    parameter.set_data(Tensor(array))
    save_checkpoint(tmp_path / "a.ckpt", network.get_parameters(), {})
    with pytest.raises(UserError, match=message):
        load_weights(create_model("cifar_quick", 10), tmp_path / "a.ckpt")


def test_integer_weights_are_refused_by_name():
    network = create_model("cifar_quick", 10)
    arrays = {p.name: p.asnumpy() for p in network.get_parameters()}
    arrays["fc1.weight"] = arrays["fc1.weight"].astype(np.int8)
    with pytest.raises(UserError, match="fc1.weight is of type int8"):
        assign_weights(network, arrays, "a.safetensors")


def foreign_arrays(name="resnet18"):
    """{torchvision's name: array} of a network, and the network."""
    network = create_model(name, 5)
    randomise(network)
    arrays = {torch_name(p.name, name): p.asnumpy() for p in network.get_parameters()}
    return arrays, network


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "model.", "module._orig_mod.model."])
def test_prefixes_of_wrappers_are_taken_off(prefix, tmp_path):
    """Of torch.compile, DistributedDataParallel and Lightning, also one around the other."""
    from safetensors.numpy import save_file

    arrays, network = foreign_arrays()
    save_file({prefix + name: array for name, array in arrays.items()}, tmp_path / "x.safetensors")
    other = create_model("resnet18", 5)
    assert load_weights(other, str(tmp_path / "x.safetensors")) == []
    assert_same_weights(network, other)


def test_bfloat16_safetensors(tmp_path):
    """A header and 2-byte values, as the format is defined; numpy has no such type."""
    values = np.array([1.0, -2.5, 3.140625], np.float32)
    content = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    header = json.dumps({"x": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]}}).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + content)
    arrays, _ = read_weights(file)
    assert arrays["x"].dtype == np.float32 and arrays["x"].tolist() == values.tolist()


def test_checkpoints_as_training_scripts_write_them(tmp_path):
    """With options, averaged weights, and in the format before PyTorch 1.6."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    weight, averaged = torch.ones(2), torch.full((2,), 3.0)
    options = argparse.Namespace(lr=0.1, model="resnet18")
    cases = {
        "options": ({"model": {"w": weight}, "args": options}, {}, 1),
        "ema": ({"state_dict": {"w": weight}, "state_dict_ema": {"w": averaged}}, {}, 3),
        "old": ({"w": weight}, {"_use_new_zipfile_serialization": False}, 1),
        "net": ({"net": {"w": weight}, "acc": 91.2}, {}, 1),
        **{
            name: ({"model": {"w": weight}, name: {"w": averaged}}, {}, 3)
            for name in ("ema", "ema_state_dict", "ema_model", "params_ema", "swa-weights")
        },
        "nested": (
            {"model": {"w": weight}, "ema": {"decay": 0.9, "shadow": {"w": averaged}}},
            {},
            3,
        ),
        "callback": (
            {
                "state_dict": {"w": weight},
                "callbacks": {"EMA": {"ema_state_dict": {"w": averaged}}},
            },
            {},
            3,
        ),
        "other callback": ({"state_dict": {"w": weight}, "callbacks": {"Timer": {"s": 1}}}, {}, 1),
        "no average": ({"model": {"w": weight}, "ema": {"decay": 0.9, "updates": 7}}, {}, 1),
        "loss": ({"state_dict": {"net.w": weight, "criterion.weight": averaged}}, {}, 1),
        "two": ({"state_dict": {"model.w": weight, "ema_model.module.w": averaged}}, {}, 3),
        "count": ({"module.w": weight, "n_averaged": torch.tensor(5)}, {}, 1),
        "parameters": ({"w": torch.nn.Parameter(weight)}, {}, 1),
        "numbers": ({"model": {"w": weight}, "params": {"lr": torch.tensor(0.1)}}, {}, 1),
        **{
            name: ({name: {"w": weight}, "epoch": 3}, {}, 1)
            for name in ("model_state", "best_state_dict", "student", "backbone")
        },
        **{
            f"{name}.": ({f"{name}.w": weight}, {}, 1)
            for name in ("backbone", "encoder", "student")
        },
    }
    for name, (content, how, expected) in cases.items():
        torch.save(content, tmp_path / f"{name}.pth", **how)
        arrays, _ = read_weights(tmp_path / f"{name}.pth")
        assert {key: value.tolist() for key, value in arrays.items()} == {"w": [expected] * 2}, name


def test_several_averages_are_refused(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    weights = {"w": torch.ones(2)}
    torch.save({"model": weights, "ema": weights, "swa": weights}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"several averaged weights \(ema, swa\)"):
        read_weights(tmp_path / "x.pth")
    torch.save({"student": weights, "teacher": weights}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"several weights \(student, teacher\)"):
        read_weights(tmp_path / "x.pth")
    torch.save({"generator": weights, "epoch": 3}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="no dictionary of weights .*; it holds generator, epoch"):
        read_weights(tmp_path / "x.pth")


def test_averages_in_names_and_classifiers_outside(tmp_path):
    from safetensors.numpy import save_file

    one = np.ones(2, np.float32)
    file = tmp_path / "x.safetensors"
    save_file({"model.w": one, "ema.w": one, "swa_model.w": one}, file)
    with pytest.raises(UserError, match=r"several averaged weights \(ema, swa_model\)"):
        read_weights(file)
    # Half a network is not taken for one.
    save_file({"model.w": one, "head.w": one}, file)
    assert set(read_weights(file)[0]) == {"model.w", "head.w"}


def test_dictionaries_in_dictionaries_end_soon(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    nested = {"w": torch.ones(1)}
    for _ in range(40):
        nested = {"model": nested, "ema": nested, "net": nested, "other": nested}
    itself = {"epoch": 1}
    itself["model"] = itself
    for content in (nested, itself):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(UserError, match="holds no dictionary of weights"):
            read_weights(tmp_path / "x.pth")


def test_a_sparse_tensor_is_named(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    torch.save({"layer.w": torch.eye(3).to_sparse()}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="sparse tensor .layer.w.*to_dense"):
        read_weights(tmp_path / "x.pth")


def test_a_backbone_starts_a_training_with_a_new_classifier(tmp_path):
    arrays, _ = foreign_arrays()
    backbone = {name: array for name, array in arrays.items() if not name.startswith("fc.")}
    network = create_model("resnet18", 3)
    with pytest.raises(UserError, match="fc.weight is missing.*allow_head_mismatch"):
        assign_weights(network, backbone, "x.pth")
    left_out = assign_weights(network, backbone, "x.pth", Head.LOAD_IF_IT_FITS)
    assert left_out == ["classifier.bias", "classifier.weight"]


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.extended)])
def test_drawn_weight_files_come_back_or_are_refused(count, tmp_path):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    random, outcomes = np.random.default_rng(0), {True: 0, False: 0}
    network, target = create_model("cifar_quick", 5), create_model("cifar_quick", 5)
    randomise(network)
    state = {acnet_name(p.name, "cifar_quick"): p.asnumpy() for p in network.get_parameters()}
    for _ in range(count):
        drawn = draw_weight_file(random, state, tmp_path)
        outcomes[check_weight_file(*drawn, network, target)] += 1
    assert min(outcomes.values()) > count / 5
