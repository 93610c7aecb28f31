"""Random convolutions through the kernels and in float64 by numpy:

    python3 tests/kernels/fuzz.py --cases=100 [--seed=1] [--isa=AVX2] [--threads=2]

Prints the largest difference of each output, relative to its largest value, and the case that it
was in; status 1 if one is too large.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from src.kernels.attributes import ConvSpec, Epilogue  # noqa: E402
from src.kernels.library import ISAS, LIBRARY, has_isa, library_folder  # noqa: E402
from src.kernels.testing import Kernels, from_bfloat16, from_blocks, to_bfloat16  # noqa: E402

TOLERANCES = {"float32": 2e-5, "bfloat16": 5e-2}


class Case:
    """A convolution of random geometry with what surrounds it."""

    def __init__(self, random, block, bfloat16):
        pick = lambda *values: values[random.integers(len(values))]  # noqa: E731
        self.bfloat16, self.block = bfloat16, block
        channels = block * pick(1, 2, 3, 4)
        widths = [
            width
            for width in (1, 1, 2, 4, 8, 16, 32)
            if channels % width == 0
            and width < channels
            and (block % width == 0 or width % block == 0)
        ]
        self.groups = channels // pick(*widths) if widths and random.random() < 0.4 else 1
        self.is_nchw = self.groups == 1 and random.random() < 0.2
        self.inputs = 3 if self.is_nchw else channels
        self.outputs = channels if self.groups > 1 else block * pick(1, 2, 4)
        self.branches = pick(1, 1, 2, 3)
        self.size = pick(3, 5) if self.branches > 1 else pick(1, 3, 5, 7)
        self.dilation = pick(1, 1, 1, 2) if not self.is_nchw else 1
        self.stride = pick(1, 1, 2, 3)
        self.padding = (
            self.dilation * (self.size // 2)
            if self.branches > 1
            else random.integers(0, self.size + 1).item()
        )
        least = max(self.dilation * (self.size - 1) + 1 - 2 * self.padding, 1)
        self.rows, self.columns = (int(random.integers(least, least + 12)) for _ in range(2))
        self.relu, self.shortcut = bool(random.integers(2)), bool(random.integers(2))
        # Where a ReLU ends: ReLU6 has no form with a shortcut.
        self.limit = 6.0 if self.relu and not self.shortcut and random.random() < 0.4 else np.inf
        kernels = [(self.size, self.size), (1, self.size), (self.size, 1)][: self.branches]
        self.kernels = kernels if self.branches != 2 else [kernels[0], (1, 1)]
        out = [
            (length + 2 * self.padding - self.dilation * (self.size - 1) - 1) // self.stride + 1
            for length in (self.rows, self.columns)
        ]
        # Batch norm of a handful of numbers amplifies rounding without bound.
        self.images = int(random.integers(1, 5)) if out[0] * out[1] >= 16 else 16
        self.out = (self.images, self.outputs, *out)

        def draw(*shape):
            values = random.normal(size=shape)
            return (
                from_bfloat16(to_bfloat16(values)).astype(np.float64)
                if bfloat16
                else values.astype(np.float32).astype(np.float64)
            )

        self.x = draw(self.images, self.inputs, self.rows, self.columns)
        self.weights = [
            random.normal(size=(self.outputs, self.inputs // self.groups, *kernel))
            for kernel in self.kernels
        ]
        self.added, self.dy = draw(*self.out), draw(*self.out)
        self.gammas, self.betas = (
            [random.normal(size=self.outputs) for _ in kernels] for _ in range(2)
        )
        self.bias = random.normal(size=self.outputs)
        if self.limit < np.inf:
            self.gammas, self.bias = [5 * gamma for gamma in self.gammas], 5 * self.bias

    def activated(self, total):
        """What the ReLU makes of ``total``."""
        return np.clip(total, 0, self.limit) if self.relu else total

    def relu_gradient(self, total):
        """The gradient of ``total`` from that of the output, ``dy``.

        Where rounding decides the ReLU there is no one answer: there ``dy`` becomes 0.
        """
        if not self.relu:
            return self.dy
        margin = 1e-2 * np.abs(total).max()
        self.dy = self.dy * (np.abs(total) > margin) * (np.abs(total - self.limit) > margin)
        return self.dy * (total > 0) * (total < self.limit)

    def __str__(self):
        return " ".join(
            f"{name}={value}"
            for name, value in vars(self).items()
            if isinstance(value, (int, bool, tuple)) or name == "limit"
        )

    def padding_of(self, kernel):
        return tuple(
            self.padding - self.dilation * ((self.size - length) // 2) for length in kernel
        )

    def attributes(self, branches):
        paddings = [
            (rows, rows, columns, columns)
            for rows, columns in map(self.padding_of, self.kernels[:branches])
        ]
        epilogues = {
            (False, False): Epilogue.NONE,
            (True, False): Epilogue.RELU,
            (False, True): Epilogue.ADD,
            (True, True): Epilogue.ADD_RELU,
        }
        spec = ConvSpec(
            paddings,
            stride=(self.stride,) * 2,
            dilation=(self.dilation,) * 2,
            groups=self.groups,
            epilogue=Epilogue.RELU6 if self.limit < np.inf else epilogues[self.relu, self.shortcut],
            input_gradient=not self.is_nchw,
            eps=1e-5,
            decay=0.9,
        )
        return spec.attributes(self.block)


def windows(case, kernel):
    """((N, G, I / G, H', W', kh, kw) view of the padded input, the padded input)."""
    rows, columns = case.padding_of(kernel)
    padded = np.pad(case.x, ((0, 0), (0, 0), (rows, rows), (columns, columns)))
    reach = [case.dilation * (length - 1) + 1 for length in kernel]
    view = np.lib.stride_tricks.sliding_window_view(padded, reach, (2, 3))[
        :, :, :: case.stride, :: case.stride
    ]
    view = view[:, :, : case.out[2], : case.out[3], :: case.dilation, :: case.dilation]
    return view.reshape(case.images, case.groups, -1, *view.shape[2:]), padded


def convolve(case, weight):
    view, _ = windows(case, weight.shape[2:])
    kernel = weight.reshape(case.groups, -1, *weight.shape[1:])
    return np.einsum("ngihwkl,goikl->ngohw", view, kernel, optimize=True).reshape(case.out)


def gradients(case, weight, dy):
    """(gradient of x, of the weight)."""
    view, padded = windows(case, weight.shape[2:])
    grouped = dy.reshape(case.images, case.groups, -1, *dy.shape[2:])
    kernel = weight.reshape(case.groups, -1, *weight.shape[1:])
    dweight = np.einsum("ngihwkl,ngohw->goikl", view, grouped, optimize=True).reshape(weight.shape)
    dx = np.zeros_like(padded)
    for row in range(weight.shape[2]):
        for column in range(weight.shape[3]):
            part = np.einsum("ngohw,goi->ngihw", grouped, kernel[..., row, column], optimize=True)
            top, left = row * case.dilation, column * case.dilation
            dx[
                :,
                :,
                top : top + case.stride * dy.shape[2] : case.stride,
                left : left + case.stride * dy.shape[3] : case.stride,
            ] += part.reshape(case.images, case.inputs, *dy.shape[2:])
    rows, columns = case.padding_of(weight.shape[2:])
    return dx[:, :, rows : rows + case.rows, columns : columns + case.columns], dweight


def per_channel(values):
    return values[:, None, None]


def activation(kernels, case, values):
    values = np.ascontiguousarray(values, np.float32)
    blocked = values if values.shape[1] == 3 else kernels.to_blocks(values)
    return to_bfloat16(blocked) if case.bfloat16 else blocked


def back(case, array):
    values = from_bfloat16(array) if case.bfloat16 else array
    return (values if values.ndim == 4 else from_blocks(values)).astype(np.float64)


def single(values):
    return np.ascontiguousarray(values, np.float32)


def with_norms(kernels, case):
    """{what: (ours, float64's)} of a training step and of inference.

    A third array is what the difference is relative to: ReLU6 hides how large the sums are that are
    rounded.
    """
    count = case.images * case.out[2] * case.out[3]
    # What the kernels keep of the convolutions is of the activations' type.
    convolved = [
        back(case, activation(kernels, case, convolve(case, weight))) for weight in case.weights
    ]
    moments = [(values.mean((0, 2, 3)), values.var((0, 2, 3))) for values in convolved]
    normal = [
        (values - per_channel(mean)) / np.sqrt(per_channel(variance) + 1e-5)
        for values, (mean, variance) in zip(convolved, moments)
    ]
    total = sum(
        values * per_channel(gamma) + per_channel(beta)
        for values, gamma, beta in zip(normal, case.gammas, case.betas)
    )
    total = total + case.added if case.shortcut else total
    y, dy = case.activated(total), case.relu_gradient(total)
    expected, dx = {"y": y}, 0
    for index, (weight, values, gamma, (_, variance)) in enumerate(
        zip(case.weights, normal, case.gammas, moments)
    ):
        dgamma, dbeta = (dy * values).sum((0, 2, 3)), dy.sum((0, 2, 3))
        centred = dy - per_channel(dbeta) / count - values * per_channel(dgamma) / count
        of_convolved = per_channel(gamma / np.sqrt(variance + 1e-5)) * centred
        of_x, dweight = gradients(case, weight, of_convolved)
        dx = dx + of_x
        expected |= {f"dweight{index}": dweight, f"dgamma{index}": dgamma, f"dbeta{index}": dbeta}
        if case.groups == case.inputs:
            # Batch norm takes away the scale of a channel's weights. If there are only a few, what
            # is left of their gradient is rounding. with_bias compares it.
            del expected[f"dweight{index}"]
    if not case.is_nchw:
        expected["dx"] = dx
    if case.shortcut:
        expected["dshortcut"] = dy
    x, added = (
        activation(kernels, case, case.x),
        activation(kernels, case, case.added if case.shortcut else np.zeros(case.out)),
    )
    means, variances = np.full(case.outputs, 0.5, np.float32), np.full(case.outputs, 2, np.float32)
    parameters = [
        single(values)
        for branch in zip(case.weights, case.gammas, case.betas)
        for values in (*branch, means, variances)
    ]
    mine, statistics = (
        np.empty_like(activation(kernels, case, case.dy)),
        np.empty((case.branches, 2, case.outputs), np.float32),
    )
    of_branches = [np.empty_like(mine) for _ in case.kernels]
    running = [np.empty(case.outputs, np.float32) for _ in range(2 * case.branches)]
    kernels.call(
        "conv_norm_forward",
        [case.attributes(case.branches), x, added, *parameters],
        [mine, statistics, *of_branches, *running],
    )
    found = [np.empty_like(x), np.empty_like(mine)]
    for index in range(case.branches):
        found += [np.empty_like(values) for values in parameters[5 * index : 5 * index + 3]]
    inputs = [
        case.attributes(case.branches),
        x,
        activation(kernels, case, case.dy),
        mine,
        statistics,
        *parameters,
        *of_branches,
    ]
    kernels.call("conv_norm_backward", inputs, found)
    ours = {"y": back(case, mine), "dx": back(case, found[0]), "dshortcut": back(case, found[1])}
    for index in range(case.branches):
        ours |= {
            f"{name}{index}": found[2 + 3 * index + part]
            for part, name in enumerate(("dweight", "dgamma", "dbeta"))
        }
    for index, (mean, variance) in enumerate(moments):
        expected |= {
            f"mean{index}": 0.45 + 0.1 * mean,
            f"variance{index}": 1.8 + 0.1 * variance * count / max(count - 1, 1),
        }
        ours |= {f"mean{index}": running[2 * index], f"variance{index}": running[2 * index + 1]}
    total = sum(
        (convolve(case, weight) - 0.5) / np.sqrt(2 + 1e-5) * per_channel(gamma) + per_channel(beta)
        for weight, gamma, beta in zip(case.weights, case.gammas, case.betas)
    )
    total = total + case.added if case.shortcut else total
    inferred = np.empty_like(mine)
    kernels.call(
        "conv_norm_inference", [case.attributes(case.branches), x, added, *parameters], [inferred]
    )
    return {name: (ours[name], value) for name, value in expected.items()} | {
        "inference": (back(case, inferred), case.activated(total), total)
    }


def with_bias(kernels, case):
    """The same of a convolution with bias."""
    weight = case.weights[0]
    total = convolve(case, weight) + per_channel(case.bias) + (case.added if case.shortcut else 0)
    dy = case.relu_gradient(total)
    dx, dweight = gradients(case, weight, dy)
    expected = {"y": case.activated(total), "dweight": dweight, "dbias": dy.sum((0, 2, 3))}
    expected |= {} if case.is_nchw else {"dx": dx}
    expected |= {"dshortcut": dy} if case.shortcut else {}
    x, added = activation(kernels, case, case.x), activation(kernels, case, case.added)
    inputs = [case.attributes(1), x, added, single(weight), single(case.bias)]
    y, inferred = np.empty_like(added), np.empty_like(added)
    kernels.call("conv_forward", inputs, [y])
    kernels.call("conv_inference", inputs, [inferred])
    found = [np.empty_like(x), np.empty_like(y), np.empty_like(inputs[3]), np.empty_like(inputs[4])]
    kernels.call(
        "conv_backward",
        [case.attributes(1), x, activation(kernels, case, case.dy), y, *inputs[3:]],
        found,
    )
    ours = {
        "y": back(case, y),
        "dx": back(case, found[0]),
        "dshortcut": back(case, found[1]),
        "dweight": found[2],
        "dbias": found[3],
    }
    return {name: (ours[name], value) for name, value in expected.items()} | {
        "inference": (back(case, inferred), expected["y"], total)
    }


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("cases", 100), ("seed", 1), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--isa", default="", choices=[*ISAS])
    options = parser.parse_args(arguments)
    path = os.environ.get("ACNET_KERNELS_LIBRARY") or library_folder() / LIBRARY
    kernels = Kernels(Path(path), options.threads, ISAS[options.isa])
    np.seterr(invalid="ignore")  # of what a kernel leaves unwritten, which nobody reads
    random, worst = np.random.default_rng(options.seed), {}
    for number in range(options.cases):
        bfloat16 = has_isa(kernels.isa, "AVX512_CORE_BF16") and number % 4 == 3
        case = Case(random, kernels.block, bfloat16)
        what = "bfloat16" if bfloat16 else "float32"
        pairs = {f"norm {name}": pair for name, pair in with_norms(kernels, case).items()}
        pairs |= {f"bias {name}": pair for name, pair in with_bias(kernels, case).items()}
        for name, (ours, theirs, *sums) in pairs.items():
            largest = max(np.abs(values).max() for values in (theirs, *sums))
            difference = float(np.abs(ours - theirs).max() / max(largest, 1e-3))
            if not difference <= worst.get((what, name), (-1.0,))[0]:
                worst[what, name] = (difference, str(case))
    wrong = 0
    for (what, name), (difference, case) in sorted(worst.items()):
        bad = not difference <= TOLERANCES[what]
        wrong += bad
        print(f"{what} {name}: {difference:.1e}" + (f"  TOO LARGE: {case}" if bad else ""))
    print(
        f"fuzz: block={kernels.block} threads={options.threads} cases={options.cases} wrong={wrong}"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
