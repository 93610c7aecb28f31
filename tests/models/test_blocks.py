"""Blocks and their fusion."""

import numpy as np
import pytest
from conftest import randomise
from mindspore import Tensor

from src.models.acb import AsymmetricConvBlock
from src.models.blocks import recognise_block
from src.models.create import create_model
from src.models.dbb import DiverseBranchBlock
from src.models.networks import NETWORKS
from src.models.reparam import ReparamConv, fuse
from src.models.repvgg import RepVGGBlock
from src.utils.errors import UserError


def largest_relative_difference(found, expected):
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def convolve(x, kernel, bias, stride, padding, dilation, groups):
    """Convolution in float64 by its definition.

    The reference that shares no code with the block.
    """
    x = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (padding,) * 2, (padding,) * 2))
    out_channels, in_group, k, _ = kernel.shape
    reach = dilation * (k - 1)
    rows, columns = ((length - reach - 1) // stride + 1 for length in x.shape[2:])
    out = np.zeros((x.shape[0], out_channels, rows, columns)) + bias[:, None, None]
    per_group = out_channels // groups
    for i in range(k):
        for j in range(k):
            window = x[
                :,
                :,
                i * dilation : i * dilation + stride * (rows - 1) + 1 : stride,
                j * dilation : j * dilation + stride * (columns - 1) + 1 : stride,
            ]
            for group in range(groups):
                of_group = slice(group * per_group, (group + 1) * per_group)
                out[:, of_group] += np.einsum(
                    "nchw,oc->nohw",
                    window[:, group * in_group : (group + 1) * in_group],
                    kernel[of_group, :, i, j],
                )
    return out


KINDS = {"acb": AsymmetricConvBlock, "repvgg": RepVGGBlock, "dbb": DiverseBranchBlock}
GRID = [
    (k, padding, stride, groups)
    for k in (3, 5)
    for padding in range(k + 1)
    for stride in (1, 2)
    for groups in (1, 32)
]


def block_in_inference(kind, *arguments, **more):
    block = KINDS[kind](*arguments, **more)
    randomise(block)
    if kind == "dbb":  # which begins as the identity
        weight = block.inner_conv.weight
        weight.set_data(
            Tensor(np.random.default_rng(3).normal(0, 0.1, weight.shape).astype(np.float32))
        )
    return block.set_train(False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel_size,padding,stride,groups", GRID)
def test_block_equals_its_plain_convolution(kind, kernel_size, padding, stride, groups):
    block = block_in_inference(kind, 64, 64, kernel_size, stride, padding, groups=groups)
    x = np.random.default_rng(1).normal(size=(2, 64, 11, 9)).astype(np.float32)
    expected = convolve(x, *block.equivalent_kernel_bias(), stride, padding, 1, groups)
    found = block(Tensor(x)).asnumpy()
    assert found.shape == expected.shape
    assert largest_relative_difference(found, expected) < 1e-5
    assert largest_relative_difference(block.fused()(Tensor(x)).asnumpy(), expected) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [1, 2])
def test_block_may_change_the_number_of_channels(kind, groups):
    block = block_in_inference(kind, 4, 6, 3, 1, 1, groups=groups)
    x = np.random.default_rng(1).normal(size=(2, 4, 8, 7)).astype(np.float32)
    expected = convolve(x, *block.equivalent_kernel_bias(), 1, 1, 1, groups)
    assert largest_relative_difference(block(Tensor(x)).asnumpy(), expected) < 1e-5


@pytest.mark.parametrize("kind", ["acb", "repvgg"])
@pytest.mark.parametrize(
    "kernel_size,padding,dilation", [(3, 2, 2), (3, 1, 2), (5, 4, 2), (5, 0, 2)]
)
def test_dilated_block_equals_its_plain_convolution(kind, kernel_size, padding, dilation):
    block = block_in_inference(kind, 4, 4, kernel_size, 1, padding, dilation)
    x = np.random.default_rng(1).normal(size=(2, 4, 15, 13)).astype(np.float32)
    expected = convolve(x, *block.equivalent_kernel_bias(), 1, padding, dilation, 1)
    assert largest_relative_difference(block(Tensor(x)).asnumpy(), expected) < 1e-5


def test_branches_are_those_of_the_papers():
    """Convolutions and batch norms of a 3x3 block from 4 to 4 channels."""

    def parts(block):
        cells = [cell for _, cell in block.cells_and_names()]
        return (
            sorted(cell.kernel_size for cell in cells if type(cell).__name__ == "Conv2d"),
            sum(type(cell).__name__ == "BatchNorm2d" for cell in cells),
        )

    assert parts(AsymmetricConvBlock(4, 4, 3, padding=1)) == ([(1, 3), (3, 1), (3, 3)], 3)
    # The identity has a batch norm of its own, and is there only if the shape stays.
    assert parts(RepVGGBlock(4, 4, 3, padding=1)) == ([(1, 1), (3, 3)], 3)
    assert (
        parts(RepVGGBlock(4, 4, 3, stride=2, padding=1))
        == parts(RepVGGBlock(4, 8, 3, padding=1))
        == ([(1, 1), (3, 3)], 2)
    )
    assert parts(DiverseBranchBlock(4, 4, 3, padding=1)) == (
        [(1, 1), (1, 1), (1, 1), (3, 3), (3, 3)],
        6,
    )


def test_dbb_begins_with_an_identity_ahead_of_its_inner_convolution():
    block = DiverseBranchBlock(4, 4, 3, padding=1).set_train(False)
    x = Tensor(np.random.default_rng(0).normal(size=(1, 4, 5, 5)).astype(np.float32))
    expected = block.outer_conv(block.inner_bn.pad(x)).asnumpy() / (1 + 1e-5) ** 0.5
    assert np.allclose(
        block.outer_conv(block.inner_bn(x + block.inner_conv(x))).asnumpy(), expected, atol=1e-4
    )


FAST = {("cifar_quick", kind) for kind in KINDS} | {("resnet18", "acb")}


# Each network with the paper's block, and each block where convolutions are grouped or depthwise.
CASES = [
    *((name, "acb") for name in NETWORKS if name != "resnext101_32x4d"),
    *((name, kind) for name in ("cifar_quick", "resnext50_32x4d") for kind in ("repvgg", "dbb")),
    ("mobilenet_v2", "dbb"),
]


def marks_of(name, kind):
    if (name, kind) in FAST:
        return ()
    is_quick = name in ("resnext50_32x4d", "wrn16_8_cifar") and kind == "acb"
    return (pytest.mark.slow,) if is_quick else (pytest.mark.extended,)


@pytest.mark.parametrize(
    "name,kind", [pytest.param(name, kind, marks=marks_of(name, kind)) for name, kind in CASES]
)
def test_fused_network_equals_the_trained_one(name, kind, measured):
    size = 64 if name == "alexnet" else 32
    network = create_model(name, 10, kind, image_size=size)
    randomise(network)
    network.set_train(True)  # fusion must use running statistics whatever the mode
    fused = fuse(network)
    network.set_train(False)
    x = Tensor(np.random.default_rng(2).normal(size=(2, 3, size, size)).astype(np.float32))
    difference = largest_relative_difference(fused(x).asnumpy(), network(x).asnumpy())
    measured(f"fusion of {name} with {kind}: largest relative difference {difference:.1e}")
    assert 0 < difference < 1e-4
    expected = {
        p.name: p.shape
        for p in create_model(name, 10, kind, fused=True, image_size=size).get_parameters()
    }
    assert {p.name: p.shape for p in fused.get_parameters()} == expected


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_other_programs_are_recognised_by_their_names(kind):
    names = [p.name for p in create_model("cifar_quick", 10, kind).get_parameters()]
    assert recognise_block(names) == (kind, False)
    assert recognise_block(p.name for p in create_model("cifar_quick", 10).get_parameters()) == (
        "base",
        False,
    )
    assert recognise_block(["stage1.conv1.fused_conv.weight"]) == ("acb", True)


def test_unknown_block_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="unknown block=acbb .did you mean 'acb'"):
        create_model("cifar_quick", 10, "acbb")


def test_fusion_leaves_the_trained_network_alone():
    network = create_model("cifar_quick", 10, "acb")
    before = [(p.name, p.asnumpy().copy()) for p in network.get_parameters()]
    fuse(network)
    after = [(p.name, p.asnumpy()) for p in network.get_parameters()]
    assert [name for name, _ in before] == [name for name, _ in after]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(before, after))


def test_gamma_init_scales_all_three_branches():
    block = AsymmetricConvBlock(3, 4, 3, padding=1, gamma_init=1 / 3)
    for batch_norm in (block.square_bn, block.hor_bn, block.ver_bn):
        assert np.allclose(batch_norm.gamma.asnumpy(), 1 / 3)


@pytest.mark.parametrize(
    "arguments,word",
    [
        ({"kernel_size": 4}, "odd"),
        ({"kernel_size": 1}, "kernel_size"),
        ({"groups": 3}, "groups=3"),
        ({"stride": 0}, "stride"),
        ({"padding": -1}, "padding"),
        ({"dilation": 0}, "dilation"),
        ({"kernel_size": (3, 3)}, "integer"),
    ],
)
def test_impossible_geometry_is_refused(arguments, word):
    with pytest.raises(ValueError, match=word):
        AsymmetricConvBlock(**{"in_channels": 4, "out_channels": 4, "kernel_size": 3, **arguments})


@pytest.mark.parametrize("kind", KINDS)
def test_every_network_takes_blocks_at_3x3_and_5x5_only(kind):
    for name in NETWORKS:
        network = create_model(name, 10, kind)
        blocks = {
            path: cell for path, cell in network.cells_and_names() if isinstance(cell, ReparamConv)
        }
        assert blocks and all(block.geometry["kernel_size"] in (3, 5) for block in blocks.values())
        plain = [
            cell
            for path, cell in network.cells_and_names()
            if type(cell).__name__ == "Conv2d" and path.rpartition(".")[0] not in blocks
        ]
        assert not any(cell.kernel_size in ((3, 3), (5, 5)) for cell in plain), name
