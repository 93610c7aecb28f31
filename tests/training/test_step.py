"""The training step: loss, gradients, update; and that ranks compute what one rank computes."""

import mindspore
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn

from conftest import ROOT, make_config, mpirun
from src.models import build_model
from src.parallel.communicator import Communicator
from src.training.optimizer import DeviceMomentum, HostMomentum, parameter_rules, scalar
from src.training.step import (DeviceTrainStep, ForwardBackward, HostTrainStep, InputNormalizer, NetworkWithLoss,
                               create_train_step, running_statistics)


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
    loss = NetworkWithLoss(nn.Identity(), nn.Identity(), smoothing)(Tensor(logits), Tensor(labels)).asnumpy()
    assert loss == pytest.approx(-(target * log_p).sum(axis=1).mean(), rel=1e-5)


@pytest.mark.parametrize("kind", [HostMomentum, DeviceMomentum])
def test_momentum_follows_its_definition(kind):
    config = make_config(momentum=0.9, weight_decay=0.1, decay_norm_and_bias=0, bias_lr_factor=2)
    random = np.random.default_rng(0)
    start = {"a.weight": random.normal(size=(40, 1000)), "a.bias": random.normal(size=40)}
    parameters = [Parameter(Tensor(value.astype(np.float32)), name=name) for name, value in start.items()]
    optimizer = kind(parameters, parameter_rules(parameters, config), config.momentum)
    weights, velocities = dict(start), {name: 0 for name in start}
    for lr in (0.1, 0.05, 0.2):
        gradients = {name: random.normal(size=value.shape) for name, value in start.items()}
        for name in weights:
            decay, factor = (0.1, 1) if name == "a.weight" else (0.0, 2)
            velocities[name] = 0.9 * velocities[name] + gradients[name] + decay * weights[name]
            weights[name] = weights[name] - lr * factor * velocities[name]
        arrays = [gradients[name].astype(np.float32) for name in start]
        optimizer(*((lr, arrays) if kind is HostMomentum else (scalar(lr), tuple(Tensor(a) for a in arrays))))
    for parameter, velocity in zip(parameters, optimizer.velocities):
        assert np.allclose(parameter.asnumpy(), weights[parameter.name], atol=1e-5)
        assert np.allclose(velocity.asnumpy(), velocities[parameter.name], atol=1e-5)


def test_gradients_agree_with_finite_differences():
    mindspore.set_seed(0)
    network = build_model("cifar_quick", 5).set_train(False)
    parameters = network.trainable_params()
    with_loss = NetworkWithLoss(network, InputNormalizer((0.5,) * 3, (0.5,) * 3), 0.1)
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
        assert (ends[0] - ends[1]) / (2 * change) == pytest.approx(np.linalg.norm(gradients[name]), rel=1e-2)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_accumulation_equals_the_large_batch(dropout):
    """With dropout too: a sample's mask does not depend on the batch that it is in."""
    def weights_after(parts):
        mindspore.set_seed(3)
        network = build_model("alexnet", 5, image_size=64, dropout=dropout)
        config = make_config(dropout=dropout, per_batch_size=8 // parts, accumulation_steps=parts)
        step = create_train_step(network, config, Communicator())
        random = np.random.default_rng(0)
        images, labels = random.integers(0, 256, (8, 64, 64, 3), np.uint8), np.arange(8, dtype=np.int32) % 5
        loss = step([(Tensor(x), Tensor(y)) for x, y in zip(np.split(images, parts), np.split(labels, parts))], 0.1, 0)
        return loss, {p.name: p.asnumpy() for p in network.get_parameters()}
    (loss, whole), (loss_in_parts, in_parts) = weights_after(1), weights_after(4)
    assert loss_in_parts == pytest.approx(loss, rel=1e-5)
    for name, value in whole.items():
        assert np.allclose(in_parts[name], value, rtol=1e-4, atol=1e-6), name


@pytest.fixture
def steps_of_both_kinds():
    """(host step, device step, batches) of the same network, the device's graph run on CPU."""
    def make(kind, **keys):
        mindspore.set_seed(4)
        network = build_model("cifar_quick", 5)
        with_loss = NetworkWithLoss(network, InputNormalizer((0.5,) * 3, (0.5,) * 3), 0.1)
        step = kind(with_loss, network.trainable_params(), running_statistics(network), lambda step, part: (),
                    make_config(**keys), Communicator())
        return network, step
    random = np.random.default_rng(0)
    batches = [(Tensor(random.integers(0, 256, (8, 32, 32, 3), np.uint8)), Tensor(np.arange(8, dtype=np.int32) % 5))
               for _ in range(3)]
    return make, batches


@pytest.mark.parametrize("keys", [{}, {"amp_level": "O2", "loss_scale": 1024}])
def test_device_step_trains_like_the_host_step(steps_of_both_kinds, keys):
    make, batches = steps_of_both_kinds
    (host_network, host), (network, device) = make(HostTrainStep), make(DeviceTrainStep, **keys)
    for batch in batches:
        assert device([batch], 0.05, 0) == pytest.approx(host([batch], 0.05, 0), rel=1e-4)
    for ours, theirs in zip(network.get_parameters(), host_network.get_parameters()):
        assert np.allclose(ours.asnumpy(), theirs.asnumpy(), rtol=1e-3, atol=1e-5), ours.name


def test_overflow_skips_the_step_and_halves_a_dynamic_scale(steps_of_both_kinds):
    make, batches = steps_of_both_kinds
    network, step = make(DeviceTrainStep, amp_level="O2", is_dynamic_loss_scale=1)
    step.loss_scale = 1e39  # beyond float32
    before = [p.asnumpy().copy() for p in network.trainable_params()]
    step([batches[0]], 0.05, 0)
    assert step.skipped and step.loss_scale == 5e38
    assert all(np.array_equal(a, p.asnumpy()) for a, p in zip(before, network.trainable_params()))
    step.loss_scale = 1024.0
    step([batches[0]], 0.05, 0)
    assert not step.skipped and not np.array_equal(before[0], network.trainable_params()[0].asnumpy())


SAME_STEP = """
import sys, zlib; sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from src.parallel.communicator import connect
c = connect(None)
from src.utils.device import prepare_process
prepare_process(c.local_rank, c.local_size)
import mindspore, numpy as np
from mindspore import Tensor
mindspore.set_context(mode=mindspore.GRAPH_MODE)
from src.models import build_model
from src.training.step import HostTrainStep, InputNormalizer, NetworkWithLoss, running_statistics
from src.utils.config import load_config
mindspore.set_seed(5)
network = build_model({network!r}, 5, image_size=64, dropout=0.0)
gradients = {{}}
step = HostTrainStep(NetworkWithLoss(network, InputNormalizer((.5,) * 3, (.5,) * 3), 0.1), network.trainable_params(),
                     running_statistics(network), lambda step, part: (), load_config({{"data_path": "none"}}), c)
step._optimizer = lambda lr, arrays: gradients.update({{p.name: a.copy() for p, a in zip(network.trainable_params(), arrays)}})
random = np.random.default_rng(0)
images, labels = random.integers(0, 256, (12, 64, 64, 3), np.uint8), np.arange(12, dtype=np.int32) % 5
step([(Tensor(images[c.rank::c.size].copy()), Tensor(labels[c.rank::c.size].copy()))], 0.1, 0)
statistics = {{p.name: p.asnumpy() for p in running_statistics(network)}}
checksums = [zlib.crc32(array) for array in [*gradients.values(), *statistics.values()]]
assert all(others == checksums for others in c.gather(checksums)), "the ranks differ"
if c.rank in {ranks!r}:
    np.savez({out!r} + f"/{{c.size}}_{{c.rank}}.npz", **gradients, **statistics)
"""


def gradients_on(size, network, folder, ranks):
    """What each of ``ranks`` holds after a step on ``size`` ranks: {parameter: mean gradient or running statistic}."""
    script = folder / "same_step.py"
    script.write_text(SAME_STEP.format(root=str(ROOT), network=network, out=str(folder), ranks=ranks))
    run = mpirun(size, script)
    assert run.status == 0, run
    return [dict(np.load(folder / f"{size}_{rank}.npz")) for rank in ranks]


@pytest.mark.slow
def test_averaged_gradients_are_those_of_the_global_batch_on_one_rank(tmp_path, measured):
    (alone,) = gradients_on(1, "alexnet", tmp_path, [0])
    for ranks in (2, 3):
        (on_last,) = gradients_on(ranks, "alexnet", tmp_path, [ranks - 1])
        largest = max(np.linalg.norm(on_last[name] - expected) / np.linalg.norm(expected) for name, expected in alone.items())
        measured(f"gradients on {ranks} ranks: largest relative difference by norm {largest:.1e}")
        assert largest < 1e-5


@pytest.mark.slow
def test_ranks_hold_the_same_running_statistics(tmp_path):
    first, second = gradients_on(2, "resnet18", tmp_path, [0, 1])
    moving = [name for name in first if "moving" in name]
    assert len(moving) == 40
    assert all(np.abs(first[name] - (1 if name.endswith("variance") else 0)).max() > 1e-4 for name in moving)
    for name in first:
        assert np.array_equal(first[name], second[name]), name
