"""Random wrong calls of every kernel: each ends in a result or an error message, never in a crash.

    python3 tests/kernels/wrong_calls.py --calls=3000 [--seed=1]

Starts from right calls and changes the number, type, rank or shape of an argument, or an attribute.
Most useful under AddressSanitizer (sanitize.sh).
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from src.kernels import attributes as table  # noqa: E402
from src.kernels.library import LIBRARY, library_folder  # noqa: E402
from src.kernels.testing import Kernels  # noqa: E402


def right_calls(block):
    """{kernel: (inputs, outputs)}, each a call that succeeds."""
    channels, side = 2 * block, 5

    def ones(*shape):
        return np.ones(shape, np.float32)

    x = ones(2, channels // block, side, side, block)
    per_channel = [ones(channels) for _ in range(4)]
    weight, none = ones(channels, channels, 3, 3), ones(1)
    numbers = {"eps": 1e-5, "decay": 0.9}
    conv = table.ConvSpec([(1, 1, 1, 1)], epilogue=table.Epilogue.ADD_RELU, **numbers).attributes(
        block
    )
    norm = table.ConvSpec(epilogue=table.Epilogue.RELU, **numbers).attributes(block)
    relu = table.attribute_table(table.Epilogue.RELU.relu)
    pool, plain = table.pool_attributes(3, 2, 1, table.Pooling.MAX), table.attribute_table()
    pooled = ones(2, channels // block, 3, 3, block)
    argmax = np.zeros(pooled.shape, np.uint8)
    branch, running = [weight, *per_channel], [ones(channels), ones(channels)]
    statistics = ones(1, 2, channels)
    dense = [ones(4, 6), ones(3, 6), ones(3)]
    images = np.ones((2, side, side, 3), np.uint8)
    nchw = ones(2, channels, side, side)
    return {
        "conv_norm_forward": ([conv, x, x, *branch], [x, statistics, x, *running]),
        "conv_norm_backward": ([conv, x, x, x, statistics, *branch, x], [x, x, weight, *running]),
        "conv_norm_inference": ([conv, x, x, *branch], [x]),
        "conv_forward": ([conv, x, x, weight, none], [x]),
        "conv_inference": ([conv, x, x, weight, ones(channels)], [x]),
        "conv_backward": ([conv, x, x, x, weight, none], [x, x, weight, none]),
        "norm_forward": ([norm, x, *per_channel], [x, statistics, *running]),
        "norm_backward": ([norm, x, x, *per_channel, statistics], [x, *running]),
        "norm_inference": ([norm, x, *per_channel], [x]),
        "pool_forward": ([pool, x], [pooled, argmax]),
        "pool_inference": ([pool, x], [pooled]),
        "pool_backward": ([pool, x, pooled, argmax], [x]),
        "global_average_forward": ([plain, x], [ones(2, channels)]),
        "global_average_backward": ([plain, x, ones(2, channels)], [x]),
        "change_layout": ([plain, nchw], [x]),
        "change_layout_back": ([plain, x, nchw], [nchw]),
        "normalize_images": ([plain, images, ones(3), ones(3)], [ones(2, 3, side, side)]),
        "dense_forward": ([plain, *dense], [ones(4, 3)]),
        "dense_backward": ([plain, dense[0], ones(4, 3), dense[1]], dense),
        "add": ([x, x], [x]),
        "add_scaled": ([relu, x, x, ones(2)], [x]),
        "add_scaled_backward": ([relu, x, x, ones(2)], [x, x]),
    }


def changed(rng, tensor):
    """A tensor with another type, rank, shape or value."""
    kind = rng.integers(5)
    if kind == 0:
        return tensor.astype(
            rng.choice(["float64", "int32", "uint8", "uint16", "int64", "float32"])
        )
    if kind == 1:
        shape = [int(rng.integers(1, 20)) for _ in range(rng.integers(0, 6))]
        return np.ones(shape, tensor.dtype)
    if kind == 2 and tensor.ndim:
        shape = list(tensor.shape)
        shape[rng.integers(len(shape))] = int(rng.integers(0, 40))
        return np.ones(shape, tensor.dtype)
    if kind == 3 and tensor.dtype == np.int64:
        table = tensor.copy()
        if table.ndim and len(table) > 8:
            table[rng.integers(8, len(table))] = rng.choice([-(2**40), -1, 0, 1, 2, 3, 5, 7, 2**40])
        return table
    return (
        np.ascontiguousarray(tensor[..., : max(tensor.shape[-1] // 2, 1)])
        if tensor.ndim
        else tensor
    )


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    path = os.environ.get("ACNET_KERNELS_LIBRARY") or library_folder() / LIBRARY
    kernels = Kernels(Path(path), threads=2)
    rng = np.random.default_rng(options.seed)
    calls, refused = right_calls(kernels.block), 0
    copies = lambda tensors: [np.array(tensor) for tensor in tensors]  # noqa: E731
    for name, (inputs, outputs) in calls.items():
        kernels.call(name, copies(inputs), copies(outputs))
    for _ in range(options.calls):
        name = rng.choice(list(calls))
        inputs, outputs = map(copies, calls[name])
        for _ in range(rng.integers(1, 3)):
            tensors = inputs if rng.random() < 0.7 else outputs
            if rng.random() < 0.15 and tensors:
                del tensors[rng.integers(len(tensors))]
            elif tensors:
                index = rng.integers(len(tensors))
                tensors[index] = changed(rng, tensors[index])
        try:
            kernels.call(name, inputs, outputs)
        except RuntimeError as failure:
            refused += 1
            assert name in str(failure), failure
    print(f"wrong_calls: {options.calls} calls, {refused} refused")


if __name__ == "__main__":
    main(sys.argv[1:])
