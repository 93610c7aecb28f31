"""Our kernels agree with MindSpore's own and with float64, for every network.

oneDNN never uses its slow reference code for them.
"""

import re
import sys

import mindspore
import numpy as np
import pytest
from conftest import ROOT, execute, make_config
from mindspore import Tensor

from src.dataset.batches import Batch
from src.distributed.communicator import Communicator
from src.inference.mindspore_backend import MindSporeBackend
from src.kernels import library as kernels_library
from src.kernels.attributes import attribute_table
from src.kernels.layers import ConvNormLayer, NchwFallback
from src.kernels.library import KernelChoice, choose_kernels, last_error
from src.kernels.testing import Kernels
from src.models.create import create_model
from src.models.kernel_layers import KernelLayers
from src.models.layers import ImageClassifier
from src.models.networks import NETWORKS, Network
from src.training.create_step import create_train_step
from src.utils.errors import UserError

SIZES = {
    "alexnet": 64,
    "resnet18": 64,
    "resnet34": 64,
    "resnet50": 64,
    "resnext50_32x4d": 64,
    "resnext101_32x4d": 64,
    "densenet121": 64,
    "mobilenet_v2": 64,
}


def one_step(kernels, network, block="base", size=32, images=6, steps=1, **options):
    """Train on random images from seeded weights: (losses, {name: parameter} after, logits)."""
    mindspore.set_seed(3)
    config = make_config(
        network=network, block=block, image_size=size, num_classes=7, dropout=0.0, **options
    )
    stochastic_depth = config.stochastic_depth
    built = create_model(
        network,
        7,
        block,
        image_size=size,
        dropout=0.0,
        stochastic_depth=stochastic_depth,
        kernels=kernels,
        compute_type=config.compute_type,
    )
    soften(built)
    step = create_train_step(built, config, Communicator())
    random = np.random.default_rng(1)
    batch = Batch(
        random.integers(0, 256, (images, size, size, 3), np.uint8),
        np.arange(images, dtype=np.int32) % 7,
    )
    losses = [step([batch], 0.01, number).loss for number in range(steps)]
    return (
        losses,
        {p.name: p.asnumpy().copy() for p in built.get_parameters()},
        MindSporeBackend(built, config)(batch.images),
    )


def soften(network):
    """Scale residual branches down, so that rounding does not grow from block to block."""
    for _, cell in network.cells_and_names():
        for parameter in cell.branch_end.get_parameters() if hasattr(cell, "branch_end") else ():
            if parameter.name.endswith("gamma"):
                parameter.set_data(Tensor(parameter.asnumpy() * np.float32(0.1)))


@pytest.mark.parametrize(
    "network,block",
    [
        ("cifar_quick", "base"),
        ("cifar_quick", "acb"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("resnet18", "acb"), ("cifar_quick", "repvgg"))
        ),
        *(
            pytest.param(*case, marks=pytest.mark.extended)
            for case in (
                ("alexnet", "base"),
                ("alexnet", "acb"),
                ("resnext50_32x4d", "base"),
                ("resnet18", "base"),
                ("resnet34", "base"),
                ("resnet50", "base"),
                ("resnet56_cifar", "base"),
                ("resnet56_cifar", "acb"),
                ("wrn16_8_cifar", "acb"),
                ("resnet18", "repvgg"),
                ("wrn16_8_cifar", "base"),
                ("vgg16_cifar", "base"),
                ("cifar_quick", "dbb"),
            )
        ),
    ],
)
def test_a_step_is_mindspores(kernels, network, block, measured):
    size = SIZES.get(network, 32)
    losses, parameters, logits = one_step(kernels, network, block, size)
    expected_losses, expected, expected_logits = one_step(None, network, block, size)
    assert losses == pytest.approx(expected_losses, rel=2e-5)
    assert list(parameters) == list(expected)
    # By norm, because rounding decides a ReLU here and there, which moves single gradients.
    differences = {
        name: float(
            np.linalg.norm(value - expected[name]) / max(np.linalg.norm(expected[name]), 1e-3)
        )
        for name, value in parameters.items()
    }
    worst = max(differences, key=differences.get)
    measured(
        f"{network} with {block}: largest relative difference between the two kernels' steps "
        f"{differences[worst]:.1e}"
    )
    assert differences[worst] < 1e-2, (worst, differences[worst])
    assert np.allclose(
        logits, expected_logits, rtol=2e-2, atol=2e-2 * np.abs(expected_logits).max()
    )


@pytest.mark.extended
@pytest.mark.parametrize("network", ["resnet56_cifar", "wrn16_8_cifar"])
def test_a_step_with_stochastic_depth_is_mindspores(kernels, network):
    options = {"images": 4, "steps": 2, "stochastic_depth": 0.6, "global_batch_size": 4}
    (losses, found, _), (expected_losses, expected, _), (others, _, _) = (
        one_step(kernels, network, **options),
        one_step(None, network, **options),
        one_step(kernels, network, **{**options, "stochastic_depth": 0.0}),
    )
    assert losses == pytest.approx(expected_losses, rel=1e-3) and losses[0] != others[0]
    for name, value in found.items():
        difference = np.linalg.norm(value - expected[name])
        assert difference < 2e-2 * max(np.linalg.norm(expected[name]), 1e-3), name


def test_a_branch_of_odd_channels_is_dropped_too(kernels):
    """They make no whole blocks."""
    layers = KernelLayers(library=kernels, stochastic_depth=0.5)
    random = np.random.default_rng(0)
    branch, shortcut = (
        Tensor(random.normal(size=(2, 5, 3, 3)).astype(np.float32)) for _ in range(2)
    )
    factors = np.array([0, 2], np.float32)
    found = layers.stochastic_add(5)(branch, shortcut, Tensor(factors)).asnumpy()
    expected = branch.asnumpy() * factors.reshape(2, 1, 1, 1) + shortcut.asnumpy()
    assert np.array_equal(found, expected)


@pytest.mark.slow
def test_inference_is_mindspores(kernels):
    for block, fused in (("base", False), ("acb", False), ("acb", True)):
        mindspore.set_seed(5)
        networks = [
            create_model("resnet18", 7, block, image_size=64, fused=fused, kernels=chosen)
            for chosen in (kernels, None)
        ]
        random = np.random.default_rng(0)
        for ours, theirs in zip(*(network.get_parameters() for network in networks)):
            positive = ours.name.endswith(("variance", "gamma"))
            value = (
                random.uniform(0.5, 1.5, ours.shape)
                if positive
                else random.normal(0, 0.05, ours.shape)
            )
            for parameter in (ours, theirs):
                parameter.set_data(Tensor(value.astype(np.float32)))
        images = random.integers(0, 256, (3, 64, 64, 3), np.uint8)
        config = make_config(image_size=64)
        ours, theirs = (MindSporeBackend(network, config)(images) for network in networks)
        assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()
        # A weight that changes, the last of its convolution, is seen by the kernels that keep them
        # packed.
        for network in networks:
            parameter = next(
                p
                for p in network.get_parameters()
                if p.name.startswith("layer3.0.conv2") and p.name.endswith("weight")
            )
            weights = parameter.asnumpy().copy()
            weights.flat[-1] += 3
            parameter.set_data(Tensor(weights))
        changed, expected = (MindSporeBackend(network, config)(images) for network in networks)
        assert (
            np.abs(changed - expected).max()
            < 1e-5 * np.abs(expected).max()
            < np.abs(expected - theirs).max()
        )


class Odd(ImageClassifier):
    """Channels that are no multiples of a block, between some that are."""

    def __init__(self, num_classes, layers, image_size, dropout):
        super().__init__(layers)
        self.conv1 = layers.conv_norm_relu(3, 16, 3, padding=1)
        self.conv2 = layers.conv_norm_relu(16, 20, 3, padding=1)
        self.pool, self.average, self.fork = (
            layers.max_pool(3, 2, padding=1),
            layers.global_average(),
            layers.split_residual(),
        )
        self.conv3, self.conv4 = (
            layers.conv_norm_relu(20, 32, 1),
            layers.conv_norm_add_relu(32, 32, 3, padding=1, groups=2),
        )
        self.norm, self.conv5 = layers.norm_relu(32), layers.conv(32, 12, 3, bias=True)
        self.classifier = layers.dense(12, num_classes)

    def construct(self, x):
        x, shortcut = self.fork(self.conv3(self.pool(self.conv2(self.conv1(x)))))
        return self.classify(self.average(self.conv5(self.norm(self.conv4(x, shortcut)))))


def test_a_layer_that_the_kernels_cannot_take_falls_back_alone(kernels, monkeypatch):
    monkeypatch.setitem(sys.modules, "odd_network", type(sys)("odd_network"))
    sys.modules["odd_network"].Odd = Odd
    monkeypatch.setitem(NETWORKS, "odd", Network("odd_network:Odd", 8, 32))
    network = create_model("odd", 7, kernels=kernels)
    assert isinstance(network.conv1, ConvNormLayer) and isinstance(network.conv4, ConvNormLayer)
    assert all(
        isinstance(layer, NchwFallback) for layer in (network.conv2, network.conv3, network.conv5)
    )
    (losses, ours, _), (expected, theirs, _) = (
        one_step(kernels, "odd", steps=3),
        one_step(None, "odd", steps=3),
    )
    assert losses == pytest.approx(expected, rel=1e-5)
    for name, value in ours.items():
        assert np.allclose(
            value, theirs[name], rtol=1e-4, atol=1e-4 * np.abs(theirs[name]).max()
        ), name


@pytest.mark.parametrize(
    "block",
    ["acb", *(pytest.param(name, marks=pytest.mark.extended) for name in ("repvgg", "dbb"))],
)
def test_bfloat16_learns_like_float32(kernels, block):
    if not kernels.has_bfloat16:
        pytest.skip("the processor has no bfloat16")
    (halves, parameters, _), (singles, expected, _) = (
        one_step(kernels, "cifar_quick", block, steps=12, amp_level="O2"),
        one_step(kernels, "cifar_quick", block, steps=12),
    )
    assert (
        halves == pytest.approx(singles, rel=0.03)
        and singles[-1] < 0.8 * singles[0]
        and halves != singles
    )
    assert all(value.dtype == np.float32 for value in parameters.values()) and list(
        parameters
    ) == list(expected)


def test_the_same_bits_on_every_run(kernels):
    first, second = (one_step(kernels, "cifar_quick", "acb", 32, steps=3) for _ in range(2))
    assert first[0] == second[0] and all(
        np.array_equal(value, second[1][name]) for name, value in first[1].items()
    )


@pytest.mark.extended
def test_threads_repeat_themselves(kernels, tmp_path):
    lines = []
    for _ in range(2):
        run = execute(
            [
                sys.executable,
                "train.py",
                "--max_steps=6",
                "--threads=2",
                "--compile_cache=0",
                "--log_interval=1",
                f"--output_path={tmp_path}",
            ]
        )
        assert run.status == 0, run
        lines.append(re.findall(r"loss ([\d.]+)", run.out))
    assert lines[0] == lines[1] and len(lines[0]) > 1


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 5), (32, 300, 17), (9, 64, 1000)])
def test_dense_layers_agree_with_float64(kernels, shape):
    images, inputs, outputs = shape
    random = np.random.default_rng(0)
    x, weight, bias, dy = (
        random.normal(size=size)
        for size in ((images, inputs), (outputs, inputs), (outputs,), (images, outputs))
    )
    single = [np.ascontiguousarray(array, np.float32) for array in (x, weight, bias, dy)]
    found = [np.empty_like(single[index]) for index in (3, 0, 1, 2)]
    calls = Kernels(kernels.path)
    calls.call("dense_forward", [attribute_table(), *single[:3]], found[:1])
    calls.call("dense_backward", [attribute_table(), single[0], single[3], single[1]], found[1:])
    for ours, exact in zip(found, (x @ weight.T + bias, dy @ weight, dy.T @ x, dy.sum(0))):
        assert np.abs(ours - exact).max() < 1e-5 * max(np.abs(exact).max(), 1)


@pytest.mark.parametrize(
    "isa,threads",
    [
        ("", 1),
        ("AVX2", 2),
        pytest.param("AVX2", 1, marks=pytest.mark.slow),
        pytest.param("", 2, marks=pytest.mark.slow),
    ],
)
def test_random_shapes_agree_with_float64(kernels, isa, threads):
    run = execute(
        [
            sys.executable,
            "tests/kernels/fuzz.py",
            "--cases=60",
            f"--isa={isa}",
            f"--threads={threads}",
            f"--seed={threads}",
        ]
    )
    assert run.status == 0 and "wrong=0" in run.out, run


@pytest.mark.extended
@pytest.mark.parametrize("isa", ["AVX512_CORE", "AVX2"])
@pytest.mark.parametrize(
    "network",
    # resnext101_32x4d has the layers of resnext50_32x4d, and densenet40_cifar hardly any of ours.
    [name for name in NETWORKS if name not in ("resnext101_32x4d", "densenet40_cifar")],
)
def test_onednn_never_takes_its_reference_code(kernels, network, isa):
    run = execute(
        [
            sys.executable,
            "benchmarks/kernels.py",
            f"--network={network}",
            "--block=acb",
            "--per_batch_size=2",
            "--steps=1",
        ],
        ONEDNN_MAX_CPU_ISA=isa,
        ACNET_KERNELS_ISA=isa,
    )
    assert run.status == 0, run
    kinds = set(re.findall(r"implementation=(\S+)", run.out))
    assert kinds and not [kind for kind in kinds if "ref" in kind or "simple" in kind], kinds


def test_an_error_names_the_layer(kernels):
    network = create_model("resnet18", 7, image_size=32, kernels=kernels)
    op = network.layer2[0].conv1.op
    table = op.attributes.asnumpy().copy()
    table[9] = -3  # groups
    op.attributes = Tensor(table)
    with pytest.raises(RuntimeError, match="CPU AOT kernel"):
        network.set_train(False)(Tensor(np.zeros((1, 3, 32, 32), np.float32)))
    assert last_error().startswith("layer2.0.conv1: conv_norm_inference: ")


def test_what_is_not_there_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels_library, "library_folder", lambda: tmp_path)
    choice = choose_kernels(make_config())
    assert (
        choice.library is None
        and "scripts/setup.sh --kernels" in choice.hint
        and choice.name == "mindspore"
    )
    with pytest.raises(UserError, match="kernels=onednn is not available: bash scripts/setup.sh"):
        choose_kernels(make_config(kernels="onednn"))
    with pytest.raises(UserError, match="bfloat16, needs kernels=onednn"):
        choose_kernels(make_config(amp_level="O2"))
    monkeypatch.setattr(kernels_library.platform, "machine", lambda: "aarch64")
    assert "aarch64" in choose_kernels(make_config()).reason
    assert (
        choose_kernels(make_config(kernels="mindspore")) == KernelChoice()
        and KernelChoice().hint is None
    )


def test_processors_without_bfloat16_are_one_line(kernels):
    run = execute(
        [sys.executable, "train.py", "--amp_level=O2", "--max_steps=1"],
        ONEDNN_MAX_CPU_ISA="AVX2",
        ACNET_KERNELS_ISA="AVX2",
    )
    assert run.status == 2 and len(run.error_lines) == 1, run
    assert "AVX512_BF16 or AMX" in run.error_lines[0] and "AVX2" in run.error_lines[0], run


@pytest.mark.extended
def test_a_thousand_steps_leak_nothing(kernels, tmp_path):
    code = """
import sys; sys.path[:0] = [{root!r}, {root!r} + "/tests/kernels", {root!r} + "/tests"]
from src.cli.start import prepare_rank
from src.distributed.communicator import Communicator
prepare_rank(Communicator())
import mindspore, numpy as np
from conftest import make_config
from src.dataset.batches import Batch
from src.kernels.library import open_library
from src.kernels.attributes import attribute_table
from src.models.create import create_model
from src.training.create_step import create_train_step
from src.utils.device import select_device
select_device("CPU")
config = make_config(network="cifar_quick", block="acb", image_size=32, num_classes=7)
model = create_model("cifar_quick", 7, "acb", kernels=open_library(2))
step = create_train_step(model, config, Communicator())
batch = Batch(np.zeros((8, 32, 32, 3), np.uint8), np.arange(8, dtype=np.int32) % 7)
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096 / 2 ** 20
for number in range(1100):
    step([batch], 0.001, number)
    if number == 99:
        before = resident()
print(f"resident {{before:.1f}} {{resident():.1f}}", flush=True)
import os; os._exit(0)
""".format(root=str(ROOT))
    run = execute([sys.executable, "-c", code])
    before, after = map(float, re.search(r"resident ([\d.]+) ([\d.]+)", run.out).groups())
    assert after - before < 8, run
