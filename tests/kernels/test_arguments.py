"""Invalid kernel calls end in an error message, and never access memory out of bounds."""

import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, execute

from src.kernels.attributes import (
    ConvSpec,
    Epilogue,
    Pooling,
    attribute_table,
    pool_attributes,
    with_layer_name,
)
from src.kernels.library import MAX_BRANCHES
from src.kernels.testing import Kernels


@pytest.fixture(scope="module")
def calls(kernels):
    return Kernels(kernels.path, isa=kernels.isa)


def conv_norm_call(kernels, branches, channels=16):
    """(inputs, outputs) of conv_norm_forward with that many 3x3 branches."""
    block = kernels.block
    paddings = [(1, 1, 1, 1)] * branches
    spec = ConvSpec(paddings, epilogue=Epilogue.RELU, eps=1e-5, decay=0.9)
    attributes = spec.attributes(block)
    x = np.ones((1, channels // block, 4, 4, block), np.float32)
    inputs = [attributes, x, np.zeros(1, np.float32)]
    for _ in range(branches):
        inputs.append(np.ones((channels, channels, 3, 3), np.float32))
        inputs += [np.ones(channels, np.float32) for _ in range(4)]
    outputs = [np.empty_like(x), np.empty((branches, 2, channels), np.float32)]
    outputs += [np.empty_like(x) for _ in range(branches)]
    outputs += [np.empty(channels, np.float32) for _ in range(2 * branches)]
    return inputs, outputs


@pytest.mark.parametrize("branches", [1, MAX_BRANCHES, 4, 8, 64])
def test_the_number_of_branches_is_checked_before_anything_is_written(calls, branches):
    inputs, outputs = conv_norm_call(calls, branches)
    if branches <= MAX_BRANCHES:
        calls.call("conv_norm_forward", inputs, outputs)
        return
    with pytest.raises(RuntimeError, match=f"{branches} branches; at most 3"):
        calls.call("conv_norm_forward", inputs, outputs)
    with pytest.raises(RuntimeError, match=f"{branches} branches; at most 3"):
        calls.call("conv_norm_inference", inputs, outputs[:1])


def conv_call(kernels, channels=16, **changes):
    block = kernels.block
    attributes = ConvSpec([(1, 1, 1, 1)]).attributes(block)
    x = np.ones((2, channels // block, 5, 5, block), np.float32)
    weight = np.ones((channels, channels, 3, 3), np.float32)
    named = {
        "attributes": attributes,
        "x": x,
        "shortcut": np.zeros(1, np.float32),
        "weight": weight,
        "bias": np.zeros(1, np.float32),
        "y": np.empty_like(x),
        **changes,
    }
    return list(named.values())[:5], [named["y"]]


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"x": np.ones((2, 2, 5, 5), np.float64)}, "tensor 1 is of type float64"),
        ({"x": np.ones((2, 16, 5), np.float32)}, "tensor 1 has rank 3, not 4 or 5"),
        ({"x": np.ones((2, 4, 5, 5, 4), np.float32)}, "tensor 1 has blocks of 4 channels"),
        ({"weight": np.ones((16, 16, 3, 3), np.float64)}, "tensor 3 is of type float64"),
        ({"weight": np.ones((16, 8, 3, 3), np.float32)}, r"tensor 3 has shape \(16, 8, 3, 3\)"),
        ({"weight": np.ones((16, 16, 3), np.float32)}, "tensor 3 has no axis 3"),
        ({"weight": np.ones((20, 16, 3, 3), np.float32)}, "20 output channels"),
        ({"weight": np.ones((16, 16, 9, 9), np.float32)}, "larger than the padded input"),
        ({"bias": np.ones(7, np.float32)}, r"tensor 4 has shape \(7\) instead of \(16\)"),
        ({"attributes": attribute_table(1, 1)}, "tensor 0"),
        ({"attributes": np.zeros(24, np.float32)}, "tensor 0"),
        ({"y": np.empty((2, 1, 9, 9, 16), np.float32)}, "tensor 5 float32 of shape"),
        ({"y": np.empty((2, 1, 5, 5, 16), np.uint16)}, "tensor 5 bfloat16 of shape"),
    ],
)
@pytest.mark.parametrize("kernel", ["conv_forward", "conv_inference"])
def test_type_rank_and_shape_of_every_argument_are_checked(calls, kernel, changes, message):
    with pytest.raises(RuntimeError, match=f"{kernel}: .*{message}"):
        calls.call(kernel, *conv_call(calls, **changes))


@pytest.mark.parametrize(
    "stride,dilation,groups",
    [
        ((0, 1), (1, 1), 1),
        ((1, 1), (0, 1), 1),
        ((1, 1), (1, 1), 3),
        ((1, 1), (1, 1), 0),
        ((1, 1), (1, 1), -1),
    ],
)
def test_convolutions_that_do_not_exist_are_refused(calls, stride, dilation, groups):
    attributes = ConvSpec(
        [(1, 1, 1, 1)], stride=stride, dilation=dilation, groups=groups
    ).attributes(calls.block)
    with pytest.raises(RuntimeError, match="no such convolution"):
        calls.call("conv_forward", *conv_call(calls, attributes=attributes))


def every_kernel():
    sources = "".join(file.read_text() for file in (ROOT / "src/kernels/source").glob("*.cpp"))
    return sorted(re.findall(r"ACNET_KERNEL\((\w+)\)", sources))


@pytest.mark.parametrize("kernel", every_kernel())
@pytest.mark.parametrize("count", [0, 1, 2, 30])
def test_every_kernel_checks_the_number_of_its_arguments(calls, kernel, count):
    attributes = with_layer_name(ConvSpec([(0, 0, 0, 0)]).attributes(8), "layer")
    tensors = [attributes, *[np.zeros((1, 1, 1, 1, 8), np.float32) for _ in range(29)]][:count]
    with pytest.raises(RuntimeError, match=kernel):
        calls.call(kernel, tensors, [])


def test_a_pooling_window_larger_than_its_input_is_refused(calls):
    x = np.zeros((1, 1, 2, 2, calls.block), np.float32)
    attributes = pool_attributes(3, 2, 0, Pooling.AVERAGE)
    with pytest.raises(RuntimeError, match="pool_inference: the window does not fit"):
        calls.call("pool_inference", [attributes, x], [np.empty_like(x)])


MEMORY = """
import sys; sys.path.insert(0, {root!r})
from pathlib import Path
import numpy as np
from src.kernels.attributes import ConvSpec
from src.kernels.testing import Kernels

kernels = Kernels(Path({library!r}))
weights = [np.random.rand(512, 512, 3, 3).astype(np.float32) for _ in range(4)]
nothing = np.zeros(1, np.float32)
attributes = ConvSpec([(1, 1, 1, 1)]).attributes(kernels.block)

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

for count in (1, 2, 4, 8, 16):
    for weight in weights:
        x = np.random.rand(count, 512 // kernels.block, 2, 2, kernels.block).astype(np.float32)
        inputs = [attributes, x, nothing, weight, nothing]
        kernels.call("conv_inference", inputs, [np.empty_like(x)])
    print(resident())
"""


def test_packed_weights_are_shared_by_all_batch_sizes(kernels):
    """36 MiB of weights: one packed copy is 36 MiB, and other batch sizes add no other copy."""
    code = MEMORY.format(root=str(ROOT), library=str(kernels.path))
    run = execute([sys.executable, "-c", code])
    first, *others = map(float, run.out.split())
    assert len(others) == 4 and max(others) - first < 18, run


def test_changed_weights_are_packed_again(calls):
    inputs, outputs = conv_call(calls)
    calls.call("conv_inference", inputs, outputs)
    before = outputs[0].copy()
    inputs[3][...] *= 2
    calls.call("conv_inference", inputs, outputs)
    assert np.allclose(outputs[0], 2 * before) and before.any()


def test_an_exception_on_any_thread_reaches_the_caller_and_leaves_the_pool_usable(tmp_path):
    source = ROOT / "src" / "kernels" / "source"
    compiler = ["g++", "-std=c++17", "-O1", "-pthread", f"-I{source}"]
    files = [str(ROOT / "tests/kernels/pool.cpp"), str(source / "thread_pool.cpp")]
    try:
        subprocess.run([*compiler, *files, "-o", str(tmp_path / "pool")], check=True)
    except FileNotFoundError:
        pytest.skip("no g++")
    for _ in range(3):
        finished = subprocess.run(
            [str(tmp_path / "pool")], capture_output=True, text=True, timeout=60
        )
        assert finished.stdout == "ok\n" and finished.returncode == 0, finished


def test_random_wrong_calls_end_in_errors_or_results(kernels):
    run = execute([sys.executable, "tests/kernels/wrong_calls.py", "--calls=3000"])
    assert run.status == 0 and "wrong_calls: 3000 calls" in run.out, run
