"""The training step: loss, gradients, update; and that ranks compute what one rank computes."""

import itertools

import mindspore
import numpy as np
import pytest
from conftest import ROOT, make_config, mpirun
from mindspore import Tensor, nn

from src.dataset.batches import Batch
from src.distributed.communicator import Communicator
from src.distributed.device_reducers import CollectiveReducer, HostStagedReducer
from src.distributed.host_reducer import HostReducer
from src.models.create import create_model
from src.models.layers import InputNormalizer
from src.training.create_step import create_train_step
from src.training.cross_entropy import CrossEntropy
from src.training.device_optimizer import DeviceOptimizer
from src.training.device_step import DeviceTrainStep
from src.training.optimizers import HostOptimizer
from src.training.step import (
    ForwardBackward,
    GradScaler,
    NetworkWithLoss,
    TrainStep,
    running_statistics,
)
from src.training.update_rules import create_update_rule


def test_normaliser_is_that_of_the_seeds():
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), np.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = ((images / 255 - mean) / std).transpose(0, 3, 1, 2)
    assert np.allclose(InputNormalizer(mean, std)(Tensor(images)).asnumpy(), expected, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_label_smoothing_spreads_its_mass_over_all_classes(smoothing):
    logits = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32)
    labels = np.array([0, 6, 3, 3], np.int32)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    target = np.full((4, 7), smoothing / 7)
    target[np.arange(4), labels] += 1 - smoothing
    loss = NetworkWithLoss(nn.Identity(), nn.Identity(), CrossEntropy(smoothing))(
        Tensor(logits), Tensor(labels)
    ).asnumpy()
    assert loss == pytest.approx(-(target * log_p).sum(axis=1).mean(), rel=1e-5)


@pytest.mark.parametrize("classes,share", [(7, 0.1), (1000, 0.1), (2, 0.3)])
def test_label_smoothing_over_the_other_classes_is_the_model_zoos(classes, share):
    """The target is 1 - factor for the true class and factor / (classes - 1) for each other.

    As in the seed's src/crossentropy.py.
    """
    logits = np.random.default_rng(0).normal(size=(4, classes)).astype(np.float32)
    labels = np.array([0, 1, 1, classes - 1], np.int32)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    target = np.full((4, classes), share / (classes - 1))
    target[np.arange(4), labels] = 1 - share
    smoothing = make_config(label_smooth_factor=share, num_classes=classes).smoothing
    loss = NetworkWithLoss(nn.Identity(), nn.Identity(), CrossEntropy(smoothing))(
        Tensor(logits), Tensor(labels)
    ).asnumpy()
    assert loss == pytest.approx(-(target * log_p).sum(axis=1).mean(), rel=1e-5)
    mixed = Tensor(np.eye(classes, dtype=np.float32)[labels])
    assert NetworkWithLoss(nn.Identity(), nn.Identity(), CrossEntropy(smoothing))(
        Tensor(logits), mixed
    ).asnumpy() == pytest.approx(loss, rel=1e-5)
    assert make_config(label_smooth=0, num_classes=classes).smoothing == 0
    assert (
        make_config(
            label_smooth_factor=share, label_smooth_over="all", num_classes=classes
        ).smoothing
        == share
    )


def test_the_loss_is_the_same_bits_wherever_its_inputs_lie():
    with_loss = NetworkWithLoss(nn.ReLU(), nn.Identity(), CrossEntropy(0.0))
    logits, labels = (
        np.random.default_rng(0).random((4, 2), np.float32),
        np.array([0, 1, 1, 0], np.int32),
    )
    found = set()
    for at, of_labels in itertools.product(range(0, 64, 4), repeat=2):
        inputs = Tensor(_lying_at(logits, at)), Tensor(_lying_at(labels, of_labels))
        found.add(with_loss(*inputs).asnumpy().tobytes())
    assert len(found) == 1


def _lying_at(array, offset):
    """A copy of ``array`` whose address is ``offset`` above a multiple of 64."""
    room = np.zeros(array.nbytes + 128, np.uint8)
    begin = -room.ctypes.data % 64 + offset
    copy = room[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def test_gradients_agree_with_finite_differences():
    mindspore.set_seed(0)
    network = create_model("cifar_quick", 5).set_train(False)
    parameters = network.trainable_params()
    with_loss = NetworkWithLoss(network, InputNormalizer((0.5,) * 3, (0.5,) * 3), CrossEntropy(0.1))
    random = np.random.default_rng(0)
    images = Tensor(random.integers(0, 256, (4, 32, 32, 3), np.uint8))
    labels = Tensor(np.array([0, 1, 2, 3], np.int32))
    loss, gradients = ForwardBackward(with_loss, parameters)(images, labels)
    assert loss.asnumpy() == pytest.approx(with_loss(images, labels).asnumpy(), rel=1e-6)
    gradients = {p.name: g.asnumpy() for p, g in zip(parameters, gradients)}
    for name in ("classifier.weight", "fc1.weight"):
        parameter = next(p for p in parameters if p.name == name)
        # The steepest direction makes the difference large against rounding.
        direction = gradients[name] / np.linalg.norm(gradients[name])
        memory, change = parameter.asnumpy(), 1e-3
        original = memory.copy()
        ends = []
        for sign in (1, -1):
            memory[...] = original + sign * change * direction
            ends.append(float(with_loss(images, labels).asnumpy()))
        memory[...] = original
        assert (ends[0] - ends[1]) / (2 * change) == pytest.approx(
            np.linalg.norm(gradients[name]), rel=1e-2
        )


@pytest.mark.parametrize("dropout", [0.0, pytest.param(0.5, marks=pytest.mark.extended)])
def test_accumulation_equals_the_large_batch(dropout):
    """With dropout too: a sample's mask does not depend on the batch that it is in."""

    def weights_after(parts):
        mindspore.set_seed(3)
        network = create_model("alexnet", 5, image_size=64, dropout=dropout)
        config = make_config(dropout=dropout, per_batch_size=8 // parts, accumulation_steps=parts)
        step = create_train_step(network, config, Communicator())
        random = np.random.default_rng(0)
        images, labels = (
            random.integers(0, 256, (8, 64, 64, 3), np.uint8),
            np.arange(8, dtype=np.int32) % 5,
        )
        result = step(
            [Batch(x, y) for x, y in zip(np.split(images, parts), np.split(labels, parts))], 0.1, 0
        )
        return result.loss, {p.name: p.asnumpy() for p in network.get_parameters()}

    (loss, whole), (loss_in_parts, in_parts) = weights_after(1), weights_after(4)
    assert loss_in_parts == pytest.approx(loss, rel=1e-5)
    for name, value in whole.items():
        assert np.allclose(in_parts[name], value, rtol=1e-4, atol=1e-6), name


def test_soft_labels_give_the_cross_entropy_of_a_distribution():
    random = np.random.default_rng(0)
    logits, targets = (
        random.normal(size=(4, 7)).astype(np.float32),
        random.dirichlet(np.ones(7), 4).astype(np.float32),
    )
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    with_loss = NetworkWithLoss(nn.Identity(), nn.Identity(), CrossEntropy(0.1))
    expected = -((0.9 * targets + 0.1 / 7) * log_p).sum(axis=1).mean()
    assert with_loss(Tensor(logits), Tensor(targets)).asnumpy() == pytest.approx(expected, rel=1e-5)
    labels = np.array([0, 6, 3, 3], np.int32)
    assert with_loss(
        Tensor(logits), Tensor(np.eye(7, dtype=np.float32)[labels])
    ).asnumpy() == pytest.approx(with_loss(Tensor(logits), Tensor(labels)).asnumpy(), rel=1e-6)


def network_and_loss():
    mindspore.set_seed(4)
    network = create_model("cifar_quick", 5)
    return network, NetworkWithLoss(
        network, InputNormalizer((0.5,) * 3, (0.5,) * 3), CrossEntropy(0.1)
    )


def host_step(**keys):
    """(network, its TrainStep)."""
    network, with_loss = network_and_loss()
    parameters, config = network.trainable_params(), make_config(**keys)
    return network, TrainStep(
        with_loss,
        HostOptimizer(parameters, create_update_rule(config), config),
        HostReducer(Communicator(), None),
        running_statistics(network),
        lambda step, part: (),
    )


def device_step(reducer=CollectiveReducer, **keys):
    """(network, its DeviceTrainStep, which runs on CPU here)."""
    network, with_loss = network_and_loss()
    config = make_config(device_target="GPU", **{"amp_level": "O0", **keys})
    return network, DeviceTrainStep(
        with_loss,
        DeviceOptimizer(network.trainable_params(), create_update_rule(config), config),
        reducer(config, Communicator()),
        Communicator(),
        running_statistics(network),
        lambda step, part: (),
        GradScaler.of(config),
    )


@pytest.fixture
def batches():
    random = np.random.default_rng(0)
    return [
        Batch(random.integers(0, 256, (8, 32, 32, 3), np.uint8), np.arange(8, dtype=np.int32) % 5)
        for _ in range(4)
    ]


@pytest.mark.parametrize(
    "reducer,micro_batches,keys",
    [
        (CollectiveReducer, 1, {}),
        (CollectiveReducer, 2, {}),
        pytest.param(HostStagedReducer, 1, {}, marks=pytest.mark.slow),
        pytest.param(
            CollectiveReducer, 1, {"amp_level": "O2", "loss_scale": 1024}, marks=pytest.mark.slow
        ),
        pytest.param(CollectiveReducer, 1, {"optimizer": "adamw"}, marks=pytest.mark.slow),
        pytest.param(CollectiveReducer, 1, {"optimizer": "lars"}, marks=pytest.mark.slow),
        pytest.param(
            CollectiveReducer,
            1,
            {"optimizer": "nesterov", "bias_lr_factor": 2, "backbone_lr_factor": 0.5},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_device_step_trains_like_the_host_step(batches, reducer, micro_batches, keys):
    host_keys = {key: value for key, value in keys.items() if "amp" not in key and "sc" not in key}
    (host_network, host), (network, device) = host_step(**host_keys), device_step(reducer, **keys)
    for number in range(0, 4, micro_batches):
        part = batches[number : number + micro_batches]
        assert device(part, 0.01, 0).loss == pytest.approx(host(part, 0.01, 0).loss, rel=1e-4)
    for ours, theirs in zip(network.get_parameters(), host_network.get_parameters()):
        assert np.allclose(ours.asnumpy(), theirs.asnumpy(), rtol=1e-3, atol=2e-5), ours.name
    device.synchronize()
    states = zip(device.optimizer.state_parameters, host.optimizer.state_parameters)
    for ours, theirs in states:
        assert ours.name == theirs.name
        assert np.allclose(ours.asnumpy(), theirs.asnumpy(), rtol=2e-3, atol=2e-5), ours.name


def test_a_devices_step_is_compiled_once(batches):
    """Compiled at each step, the update once made GPU steps 5 s long."""
    _, step = device_step()
    for number, batch in enumerate(batches):
        step([batch], 0.1 / (1 + number), number)
    assert len(step._whole.step.compile_cache) == 1


def test_a_devices_optimizer_state_is_saved_and_restored(batches):
    """Two steps in a row, or with the state carried over to another process, are the same."""
    _, whole = device_step()
    whole([batches[0]], 0.1, 0)
    whole.synchronize()
    network, second = device_step()
    for ours, theirs in zip(network.get_parameters(), whole_parameters(whole)):
        ours.set_data(Tensor(theirs.asnumpy().copy()))
    for ours, theirs in zip(second.optimizer.state_parameters, whole.optimizer.state_parameters):
        ours.set_data(Tensor(theirs.asnumpy().copy()))
    second.broadcast(list(network.get_parameters()))
    losses = [step([batches[1]], 0.1, 1).loss for step in (whole, second)]
    assert losses[0] == losses[1]
    for ours, theirs in zip(network.trainable_params(), whole.optimizer.parameters):
        assert np.array_equal(ours.asnumpy(), theirs.asnumpy()), ours.name


def whole_parameters(step):
    """Parameters and running statistics of a DeviceTrainStep's network."""
    return step._network.get_parameters()


def test_overflow_skips_the_step_and_halves_a_dynamic_scale(batches):
    network, step = device_step(amp_level="O2", is_dynamic_loss_scale=1)
    step.grad_scaler.value = 1e39  # beyond float32
    before = [p.asnumpy().copy() for p in network.trainable_params()]
    result = step(batches[:1], 0.05, 0)
    assert result.skipped and step.grad_scaler.value == 5e38
    assert all(np.array_equal(a, p.asnumpy()) for a, p in zip(before, network.trainable_params()))
    step.synchronize()
    assert all((p.asnumpy() == 0).all() for p in step.optimizer.state_parameters)
    assert step.optimizer.counters() == {"updates": 0, "frozen_updates": 0}
    step.grad_scaler.value = 1024.0
    result = step(batches[:1], 0.05, 0)
    assert not result.skipped and not np.array_equal(
        before[0], network.trainable_params()[0].asnumpy()
    )


@pytest.mark.parametrize("create", [host_step, device_step])
def test_frozen_steps_train_the_classifier_on_what_evaluation_computes(create, batches):
    """In between, the whole network learns as if nothing had been frozen."""
    keys = {"freeze_epochs": 1, "momentum": 0}
    (network, step), (plain_network, plain) = create(**keys), create(**keys)
    for parameter in running_statistics(network):
        shift = np.linspace(0.1, 0.9, parameter.size, dtype=np.float32)
        parameter.set_data(Tensor(parameter.asnumpy() + shift))
        dict(plain_network.parameters_dict())[parameter.name].set_data(parameter)
    before = {p.name: p.asnumpy().copy() for p in network.get_parameters()}
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    images = InputNormalizer((0.5,) * 3, (0.5,) * 3)(Tensor(batches[0].images))
    network.set_train(False)
    expected = float(loss(network(images), Tensor(batches[0].labels)).asnumpy())
    network.set_train(True)
    step.optimizer.backbone_frozen = True
    assert step([batches[0]], 0.1, 0).loss == pytest.approx(expected, rel=1e-4)
    step.synchronize()
    moved = {p.name for p in network.get_parameters() if (p.asnumpy() != before[p.name]).any()}
    assert moved == {"classifier.weight", "classifier.bias"}
    for parameter in plain_network.get_parameters():
        parameter.set_data(Tensor(dict(network.parameters_dict())[parameter.name].asnumpy()))
    plain.broadcast([])
    step.optimizer.backbone_frozen = False
    for each in (step, plain):
        each([batches[1]], 0.1, 1)
        each.synchronize()
    for ours, theirs in zip(network.get_parameters(), plain_network.get_parameters()):
        assert np.array_equal(ours.asnumpy(), theirs.asnumpy()), ours.name


@pytest.mark.parametrize("create", [host_step, device_step])
def test_the_first_parameter_without_a_finite_gradient_is_named(batches, create):
    network, step = create()
    classifier = network.classifier.weight
    classifier.set_data(Tensor(np.full(classifier.shape, np.inf, np.float32)))
    result = step(batches[:1], 0.05, 0)
    assert not result.skipped and result.nonfinite_parameter == network.trainable_params()[0].name


SAME_STEP = """
import sys, zlib; sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from src.cli.start import prepare_rank
from src.distributed.communicator import connect
c = connect(None)
prepare_rank(c)
import mindspore, numpy as np
mindspore.set_context(mode=mindspore.GRAPH_MODE)
from src.dataset.batches import Batch
from src.models.create import create_model
from src.models.layers import InputNormalizer
from src.distributed.host_reducer import HostReducer
from src.training.cross_entropy import CrossEntropy
from src.training.step import NetworkWithLoss, TrainStep, running_statistics
mindspore.set_seed(5)
network = create_model({network!r}, 5, image_size=64, dropout=0.0)
gradients = {{}}
with_loss = NetworkWithLoss(network, InputNormalizer((.5,) * 3, (.5,) * 3), CrossEntropy(0.1))
class Keep:
    backbone_frozen, parameters = False, network.trainable_params()
    def __call__(self, lr, arrays, arrivals):
        gradients.update({{p.name: a.copy() for p, a in zip(network.trainable_params(), arrays)}})
step = TrainStep(
    with_loss, Keep(), HostReducer(c, None), running_statistics(network), lambda step, part: (),
)
random = np.random.default_rng(0)
images = random.integers(0, 256, (12, 64, 64, 3), np.uint8)
labels = np.arange(12, dtype=np.int32) % 5
step([Batch(images[c.rank::c.size].copy(), labels[c.rank::c.size].copy())], 0.1, 0)
statistics = {{p.name: p.asnumpy() for p in running_statistics(network)}}
checksums = [zlib.crc32(array) for array in [*gradients.values(), *statistics.values()]]
assert all(others == checksums for others in c.all_gather(checksums)), "the ranks differ"
if c.rank in {ranks!r}:
    np.savez({out!r} + f"/{{c.size}}_{{c.rank}}.npz", **gradients, **statistics)
"""


def gradients_on(size, network, folder, ranks):
    """What each of ``ranks`` holds after a step on ``size`` ranks.

    A list of {parameter: mean gradient or running statistic}.
    """
    script = folder / "same_step.py"
    script.write_text(
        SAME_STEP.format(root=str(ROOT), network=network, out=str(folder), ranks=ranks)
    )
    run = mpirun(size, script)
    assert run.status == 0, run
    return [dict(np.load(folder / f"{size}_{rank}.npz")) for rank in ranks]


@pytest.mark.slow
def test_averaged_gradients_are_those_of_the_global_batch_on_one_rank(tmp_path, measured):
    (alone,) = gradients_on(1, "alexnet", tmp_path, [0])
    for ranks in (2, 3):
        (on_last,) = gradients_on(ranks, "alexnet", tmp_path, [ranks - 1])
        largest = max(
            np.linalg.norm(on_last[name] - expected) / np.linalg.norm(expected)
            for name, expected in alone.items()
        )
        measured(f"gradients on {ranks} ranks: largest relative difference by norm {largest:.1e}")
        assert largest < 1e-5


@pytest.mark.slow
def test_ranks_hold_the_same_running_statistics(tmp_path):
    first, second = gradients_on(2, "resnet18", tmp_path, [0, 1])
    moving = [name for name in first if "moving" in name]
    assert len(moving) == 40
    assert all(
        np.abs(first[name] - (1 if name.endswith("variance") else 0)).max() > 1e-4
        for name in moving
    )
    for name in first:
        assert np.array_equal(first[name], second[name]), name
