"""The asymmetric convolution block and its fusion."""

import numpy as np
import pytest
from mindspore import Tensor

from conftest import randomise
from src.models import AsymmetricConvBlock, build_model, fuse
from src.models.names import NETWORKS


def largest_relative_difference(found, expected):
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def convolve(x, kernel, bias, stride, padding, dilation, groups):
    """Convolution in float64 by its definition: the reference that shares no code with the block."""
    x = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (padding,) * 2, (padding,) * 2))
    out_channels, in_group, k, _ = kernel.shape
    reach = dilation * (k - 1)
    rows, columns = ((length - reach - 1) // stride + 1 for length in x.shape[2:])
    out = np.zeros((x.shape[0], out_channels, rows, columns)) + bias[:, None, None]
    per_group = out_channels // groups
    for i in range(k):
        for j in range(k):
            window = x[:, :, i * dilation:i * dilation + stride * (rows - 1) + 1:stride,
                       j * dilation:j * dilation + stride * (columns - 1) + 1:stride]
            for group in range(groups):
                of_group = slice(group * per_group, (group + 1) * per_group)
                out[:, of_group] += np.einsum("nchw,oc->nohw", window[:, group * in_group:(group + 1) * in_group],
                                              kernel[of_group, :, i, j])
    return out


GRID = [(k, padding, stride, groups) for k in (3, 5) for padding in range(k + 1) for stride in (1, 2)
        for groups in (1, 32, 64)]


@pytest.mark.parametrize("kernel_size,padding,stride,groups", GRID)
def test_block_equals_its_plain_convolution(kernel_size, padding, stride, groups):
    block = AsymmetricConvBlock(64, 64, kernel_size, stride, padding, groups=groups)
    randomise(block)
    block.set_train(False)
    x = np.random.default_rng(1).normal(size=(2, 64, 11, 9)).astype(np.float32)
    expected = convolve(x, *block.equivalent_kernel_bias(), stride, padding, 1, groups)
    found = block(Tensor(x)).asnumpy()
    assert found.shape == expected.shape
    assert largest_relative_difference(found, expected) < 1e-5
    assert largest_relative_difference(block.fused()(Tensor(x)).asnumpy(), expected) < 1e-5


@pytest.mark.parametrize("kernel_size,padding,dilation", [(3, 2, 2), (3, 1, 2), (5, 4, 2), (5, 0, 2)])
def test_dilated_block_equals_its_plain_convolution(kernel_size, padding, dilation):
    block = AsymmetricConvBlock(4, 6, kernel_size, 1, padding, dilation)
    randomise(block)
    block.set_train(False)
    x = np.random.default_rng(1).normal(size=(2, 4, 15, 13)).astype(np.float32)
    expected = convolve(x, *block.equivalent_kernel_bias(), 1, padding, dilation, 1)
    assert largest_relative_difference(block(Tensor(x)).asnumpy(), expected) < 1e-5


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in ("cifar_quick", "resnet18") else pytest.mark.slow)
                                  for name in NETWORKS if name != "resnext101_32x4d"])
def test_fused_network_equals_the_trained_one(name, measured):
    size = 64 if name == "alexnet" else 32
    network = build_model(name, 10, "acb", image_size=size)
    randomise(network)
    network.set_train(True)  # fusion must use running statistics whatever the mode
    fused = fuse(network)
    network.set_train(False)
    x = Tensor(np.random.default_rng(2).normal(size=(2, 3, size, size)).astype(np.float32))
    difference = largest_relative_difference(fused(x).asnumpy(), network(x).asnumpy())
    measured(f"fusion of {name}: largest relative difference {difference:.1e}")
    assert 0 < difference < 1e-4
    assert not any("hor_conv" in p.name for p in fused.get_parameters())
    expected = {p.name: p.shape for p in build_model(name, 10, "acb", fused=True, image_size=size).get_parameters()}
    assert {p.name: p.shape for p in fused.get_parameters()} == expected


def test_fusion_leaves_the_trained_network_alone():
    network = build_model("cifar_quick", 10, "acb")
    before = [(p.name, p.asnumpy().copy()) for p in network.get_parameters()]
    fuse(network)
    after = [(p.name, p.asnumpy()) for p in network.get_parameters()]
    assert [name for name, _ in before] == [name for name, _ in after]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(before, after))


def test_gamma_init_scales_all_three_branches():
    block = AsymmetricConvBlock(3, 4, 3, padding=1, gamma_init=1 / 3)
    for batch_norm in (block.square_bn, block.hor_bn, block.ver_bn):
        assert np.allclose(batch_norm.gamma.asnumpy(), 1 / 3)


@pytest.mark.parametrize("arguments,word", [
    ({"kernel_size": 4}, "odd"), ({"kernel_size": 1}, "kernel_size"), ({"groups": 3}, "groups=3"),
    ({"stride": 0}, "stride"), ({"padding": -1}, "padding"), ({"dilation": 0}, "dilation"), ({"kernel_size": (3, 3)}, "integer")])
def test_impossible_geometry_is_refused(arguments, word):
    with pytest.raises(ValueError, match=word):
        AsymmetricConvBlock(**{"in_channels": 4, "out_channels": 4, "kernel_size": 3, **arguments})


def test_every_network_takes_blocks_at_3x3_and_5x5_only():
    for name in NETWORKS:
        network = build_model(name, 10, "acb")
        squares = {cell.kernel_size for _, cell in network.cells_and_names() if hasattr(cell, "kernel_size")
                   and isinstance(cell.kernel_size, tuple)}
        blocks = [cell for _, cell in network.cells_and_names() if isinstance(cell, AsymmetricConvBlock)]
        assert blocks and all(block.geometry["kernel_size"] in (3, 5) for block in blocks)
        plain = [cell for path, cell in network.cells_and_names() if type(cell).__name__ == "Conv2d"
                 and not path.endswith(("square_conv", "hor_conv", "ver_conv"))]
        assert not any(cell.kernel_size in ((3, 3), (5, 5)) for cell in plain), (name, squares)
