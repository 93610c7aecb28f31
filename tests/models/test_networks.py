"""Networks by name: published parameter counts, shapes, padding."""

import mindspore
import numpy as np
import pytest
from mindspore import Tensor

from src.models.create import create_model
from src.models.layers import MaxPoolAfterReLU
from src.models.networks import NETWORKS, aliases
from src.utils.errors import UserError

# torchvision's documentation of each model's weights.
PUBLISHED = {
    "alexnet": 61_100_840,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnext50_32x4d": 25_028_904,
    "resnext101_32x4d": 44_177_704,
    "densenet121": 7_978_856,
    "mobilenet_v2": 3_504_872,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name):
    assert sum(p.size for p in create_model(name, 1000).trainable_params()) == PUBLISHED[name]


# Counted by hand from the layer shapes in the paper's code (10 classes).
def test_cifar_quick_parameter_count():
    convolutions = 3 * 32 * 25 + 32 * 32 * 25 + 32 * 64 * 25 + 2 * (32 + 32 + 64)
    dense = 64 * 9 * 64 + 64 + 64 * 10 + 10
    assert (
        sum(p.size for p in create_model("cifar_quick", 10).trainable_params())
        == convolutions + dense
    )


# Table 2 of the paper: "1.0M" parameters for depth 40 and growth rate 12.
def test_densenet40_parameter_count():
    count, channels = 3 * 16 * 9, 16
    for stage in range(3):
        for _ in range(12):
            count, channels = count + 2 * channels + channels * 12 * 9, channels + 12
        if stage < 2:
            count += 2 * channels + channels * channels
    count += 2 * channels + channels * 10 + 10
    found = sum(p.size for p in create_model("densenet40_cifar", 10).trainable_params())
    assert found == count == 1_019_722


def test_aliases_build_their_networks():
    for alias, name in aliases().items():
        if "101" not in alias:
            assert [p.name for p in create_model(alias, 10).get_parameters()] == [
                p.name for p in create_model(name, 10).get_parameters()
            ]


def test_unknown_network_suggests_the_nearest():
    with pytest.raises(UserError, match="did you mean 'resnet18'"):
        create_model("resnet81", 10)


def test_too_small_an_image_is_refused():
    with pytest.raises(UserError, match="alexnet, which needs 63"):
        create_model("alexnet", 10, image_size=32)


def test_grouped_convolution_is_one_convolution():
    network = create_model("resnext50_32x4d", 10)
    weights = {p.name: p.shape for p in network.get_parameters()}
    assert weights["layer1.0.conv2.conv.weight"] == (128, 4, 3, 3)


@pytest.mark.parametrize(
    "name,sizes", [("alexnet", (64, 96, 224)), ("cifar_quick", (32, 40)), ("resnet18", (32, 64))]
)
def test_network_adapts_to_input_sizes(name, sizes):
    for size in sizes:
        network = create_model(name, 7, image_size=size).set_train(False)
        assert network(Tensor(np.zeros((2, 3, size, size), np.float32))).shape == (2, 7)


def test_max_pool_pads_symmetrically():
    x = np.maximum(np.random.default_rng(0).normal(size=(1, 2, 8, 8)), 0).astype(np.float32)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    expected = np.stack(
        [padded[:, :, i : i + 7 : 2, j : j + 7 : 2] for i in range(3) for j in range(3)]
    ).max(axis=0)
    found = MaxPoolAfterReLU(3, 2, 1)(Tensor(x)).asnumpy()
    assert np.array_equal(found, expected)


def test_dropout_acts_in_training_only():
    network = create_model("alexnet", 5, image_size=64, dropout=0.5)
    x = Tensor(np.random.default_rng(0).normal(size=(2, 3, 64, 64)).astype(np.float32))
    network.set_train(False)
    assert np.array_equal(network(x).asnumpy(), network(x).asnumpy())
    network.set_train(True)
    assert not np.array_equal(network(x).asnumpy(), network(x).asnumpy())


def test_seed_decides_the_weights():
    def weights(seed):
        mindspore.set_seed(seed)
        return [p.asnumpy().copy() for p in create_model("cifar_quick", 10, "acb").get_parameters()]

    assert all(np.array_equal(a, b) for a, b in zip(weights(1), weights(1)))
    assert not np.array_equal(weights(1)[0], weights(2)[0])


def _parameters(name, **options):
    return {p.name: p.asnumpy() for p in create_model(name, 10, **options).get_parameters()}


def test_initial_weights_are_what_ran_in_the_model_zoo():
    """Within 1 / sqrt(fan-in) of 0, uniform.

    Kaiming uniform with a = sqrt(5) (its default_recurisive_init), also with groups.
    """
    for name, fan_in in (
        ("layer4.1.conv1.conv.weight", 2048),
        ("layer4.1.conv2.conv.weight", 32 * 9),
    ):
        weight = _parameters("resnext50_32x4d")[name]
        assert np.abs(weight).max() == pytest.approx(fan_in**-0.5, rel=0.001)
        assert weight.std() == pytest.approx((3 * fan_in) ** -0.5, rel=0.01)


def test_kaiming_normal_is_by_fan_out():
    weight = _parameters("resnet18", weight_init="kaiming_normal")["layer4.1.conv2.conv.weight"]
    assert weight.std() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)


@pytest.mark.parametrize(
    "network,block,ends",
    [
        ("resnet18", "base", "conv2.norm.gamma"),
        ("resnext50_32x4d", "base", "conv3.norm.gamma"),
        ("resnet56_cifar", "acb", "conv2."),
    ],
)
def test_zero_init_residual_makes_each_residual_block_the_identity(network, block, ends):
    zeroed = {
        name
        for name, value in _parameters(network, block=block, zero_init_residual=True).items()
        if name.endswith("gamma") and not value.any()
    }
    plain = _parameters(network, block=block)
    expected = {name for name in plain if name.endswith("gamma") and f".{ends}" in name}
    assert zeroed == expected and all(plain[name].any() for name in expected)


@pytest.mark.parametrize("network", ["alexnet", "wrn16_8_cifar"])
def test_zero_init_residual_is_refused_where_it_means_nothing(network):
    with pytest.raises(UserError, match="zero_init_residual"):
        create_model(network, 10, zero_init_residual=True)


def test_names_are_unique_and_complete():
    for name in NETWORKS:
        names = [p.name for p in create_model(name, 10).get_parameters()]
        assert len(names) == len(set(names))
