"""Optimizers against PyTorch's, and against the paper's formula where PyTorch has none."""

import numpy as np
import pytest
from conftest import make_config
from mindspore import Parameter, Tensor

from src.models.create import create_model
from src.training.device_optimizer import DeviceOptimizer
from src.training.optimizers import HostOptimizer, layer_factors
from src.training.update_rules import create_update_rule
from src.utils.errors import UserError

RATES = (0.1, 0.05, 0.2, 0.1)
KEYS = {"momentum": 0.9, "weight_decay": 0.1, "decay_norm_and_bias": 0, "bias_lr_factor": 2}


@pytest.fixture
def problem():
    """(first values, gradients of each step) of a matrix larger than a chunk and a bias."""
    random = np.random.default_rng(0)
    shapes = {"a.weight": (70, 1000), "a.bias": (40,)}
    return (
        {name: random.normal(size=shape) for name, shape in shapes.items()},
        [{name: random.normal(size=shape) for name, shape in shapes.items()} for _ in RATES],
    )


def updater(optimizer, config):
    """A function that updates the optimizer's parameters: (lr, array per parameter, loss scale)."""
    if isinstance(optimizer, HostOptimizer):
        return lambda lr, arrays, scale: optimizer(
            lr, [arrays[index] for index in optimizer.trained_indices]
        )
    update = optimizer.create_update()
    places = {id(parameter): number for number, parameter in enumerate(optimizer.parameters)}

    def apply(lr, arrays, scale):
        flats = [
            Tensor(np.concatenate([arrays[places[id(p)]].ravel() for p in members]))
            for members in optimizer.members
        ]
        if not bool(update(optimizer.settings(lr, scale), *flats).asnumpy()):
            return optimizer.first_nonfinite([flat.asnumpy() for flat in flats])
        optimizer.count_update()
        return None

    return apply


def trained(kind, optimizer, problem, loss_scale=1.0, **keys):
    """(weights after the steps, the optimizer) here."""
    start, gradients = problem
    config = make_config(optimizer=optimizer, **KEYS, **keys)
    parameters = [
        Parameter(Tensor(value.astype(np.float32)), name=name) for name, value in start.items()
    ]
    instance = kind(parameters, create_update_rule(config), config)
    update = updater(instance, config)
    for lr, of_step in zip(RATES, gradients):
        arrays = [(loss_scale * of_step[name]).astype(np.float32) for name in start]
        assert update(lr, arrays, loss_scale) is None
    return {p.name: p.asnumpy() for p in parameters}, instance


def by_formula(problem, formula):
    """Weights after the steps by ``formula``(w, g, state, lr, decay) -> w, in float64.

    State is a dictionary.
    """
    start, gradients = problem
    weights, states = (
        {name: value.copy() for name, value in start.items()},
        {name: {} for name in start},
    )
    for lr, of_step in zip(RATES, gradients):
        for name in weights:
            decay, factor = (0.1, 1) if name == "a.weight" else (0.0, 2)
            weights[name] = formula(weights[name], of_step[name], states[name], lr * factor, decay)
    return weights


def momentum(w, g, state, lr, decay):
    state["v"] = 0.9 * state.get("v", 0) + g + decay * w
    return w - lr * state["v"]


def lars(w, g, state, lr, decay):
    """You et al., arXiv:1708.03888, algorithm 1."""
    trust = (
        0.001 * np.linalg.norm(w) / (np.linalg.norm(g) + decay * np.linalg.norm(w))
        if w.ndim > 1
        else 1
    )
    state["v"] = 0.9 * state.get("v", 0) + lr * trust * (g + decay * w)
    return w - state["v"]


@pytest.mark.parametrize("kind", [HostOptimizer, DeviceOptimizer])
@pytest.mark.parametrize("name,formula", [("momentum", momentum), ("lars", lars)])
def test_follows_its_definition(kind, name, formula, problem):
    found, _ = trained(kind, name, problem)
    for parameter, expected in by_formula(problem, formula).items():
        assert np.abs(found[parameter] - problem[0][parameter]).max() > 1e-4
        assert np.allclose(found[parameter], expected, atol=1e-5), parameter


@pytest.mark.parametrize("kind", [HostOptimizer, DeviceOptimizer])
@pytest.mark.parametrize(
    "optimizer", ["momentum", "nesterov", "adamw", "adamw(beta1=0.8, beta2=0.95, epsilon=1e-3)"]
)
def test_agrees_with_pytorch(kind, optimizer, problem, measured):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    parameters = {
        name: torch.tensor(value, dtype=torch.float64, requires_grad=True)
        for name, value in problem[0].items()
    }
    groups = [
        {"params": [parameters["a.weight"]], "weight_decay": 0.1, "factor": 1},
        {"params": [parameters["a.bias"]], "weight_decay": 0.0, "factor": 2},
    ]
    if optimizer.startswith("adamw"):
        betas, epsilon = ((0.8, 0.95), 1e-3) if "(" in optimizer else ((0.9, 0.999), 1e-8)
        theirs = torch.optim.AdamW(groups, betas=betas, eps=epsilon)
    else:
        theirs = torch.optim.SGD(groups, momentum=0.9, nesterov=optimizer == "nesterov", lr=1.0)
    for lr, gradients in zip(RATES, problem[1]):
        for group in theirs.param_groups:
            group["lr"] = lr * group["factor"]
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(gradients[name])
        theirs.step()
    found, _ = trained(kind, optimizer, problem)
    largest = max(
        np.abs(found[name] - parameter.detach().numpy()).max()
        for name, parameter in parameters.items()
    )
    measured(
        f"{optimizer} on {kind.__name__}: largest difference from PyTorch after {len(RATES)} steps "
        f"{largest:.1e}"
    )
    assert largest < 1e-5


@pytest.mark.parametrize("kind", [HostOptimizer, DeviceOptimizer])
@pytest.mark.parametrize("clip_norm", [100.0, 1e4])
def test_clips_the_gradient_as_pytorch_does(kind, clip_norm, problem):
    """The norms of all gradients together are some 265: one limit shortens them, one does not."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    parameters = {
        name: torch.tensor(value, dtype=torch.float64, requires_grad=True)
        for name, value in problem[0].items()
    }
    weight, bias = parameters.values()
    groups = [{"params": [weight], "weight_decay": 0.1}, {"params": [bias], "weight_decay": 0.0}]
    theirs = torch.optim.SGD(groups, momentum=0.9, lr=1.0)
    for lr, gradients in zip(RATES, problem[1]):
        for group, factor in zip(theirs.param_groups, (1, 2)):
            group["lr"] = lr * factor
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(gradients[name])
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), clip_norm)
        assert 200 < float(norm) < 300
        theirs.step()
    found, _ = trained(kind, "momentum", problem, loss_scale=8.0, clip_norm=clip_norm)
    if kind is HostOptimizer:
        found, _ = trained(kind, "momentum", problem, clip_norm=clip_norm)
    for name, parameter in parameters.items():
        assert np.abs(found[name] - parameter.detach().numpy()).max() < 1e-5


@pytest.mark.parametrize("kind", [HostOptimizer, DeviceOptimizer])
def test_a_frozen_backbone_does_not_count_for_the_norm(kind):
    config = make_config(clip_norm=1.0, momentum=0, weight_decay=0, freeze_epochs=1)
    parameters = [
        Parameter(Tensor(np.zeros((2, 2), np.float32)), name=name)
        for name in ("conv.weight", "classifier.weight")
    ]
    instance = kind(parameters, create_update_rule(config), config)
    instance.backbone_frozen = True
    updater(instance, config)(1.0, [np.full((2, 2), g, np.float32) for g in (1000.0, 1.0)], 1.0)
    # The classifier's gradient has norm 2, so half of it remains.
    assert np.allclose(parameters[1].asnumpy(), -0.5, atol=1e-5), parameters[1].asnumpy()


# timm's scales: decay ** (number of the last layer - number of the layer), one number per residual
# block, one for the stem and one for the classifier.
@pytest.mark.parametrize(
    "network,layers",
    [
        ("resnet18", ["conv1", *(f"layer{s}.{b}" for s in (1, 2, 3, 4) for b in (0, 1))]),
        ("cifar_quick", ["conv1", "conv2", "conv3", "fc1"]),
        ("wrn16_8_cifar", ["conv1", *(f"blocks.{b}" for b in range(6)), "last_norm"]),
    ],
)
def test_layer_decay_is_timms(network, layers):
    names = [p.name for p in create_model(network, 4, "acb").trainable_params()]
    factors = layer_factors(names, 0.5)
    for number, layer in enumerate(reversed([*layers, "classifier"])):
        found = {factor for name, factor in factors.items() if name.startswith(f"{layer}.")}
        assert found == {0.5**number}, layer
    assert set(layer_factors(names, 1.0).values()) == {1.0}


@pytest.mark.parametrize("optimizer", ["momentum", "lars"])
def test_loss_scale_does_not_change_the_update(optimizer, problem):
    (plain, _), (scaled, _) = (
        trained(DeviceOptimizer, optimizer, problem),
        trained(DeviceOptimizer, optimizer, problem, loss_scale=1024.0),
    )
    assert all(np.allclose(plain[name], scaled[name], atol=1e-6) for name in plain)


@pytest.mark.parametrize(
    "optimizer", ["momentum", pytest.param("lars", marks=pytest.mark.extended)]
)
def test_a_devices_update_compiles_for_many_parameters(optimizer):
    """A loop over parameters was too deep for MindSpore, which allows 1000 nested calls."""
    config = make_config(optimizer=optimizer, **KEYS)
    parameters = [
        Parameter(Tensor(np.ones((2, 2), np.float32)), name=f"layer{index}.weight")
        for index in range(400)
    ]
    update = updater(DeviceOptimizer(parameters, create_update_rule(config), config), config)
    for step in range(3):
        assert update(0.1, [np.full((2, 2), 1.0 + step, np.float32) for _ in parameters], 1) is None
    assert all(
        np.array_equal(p.asnumpy(), parameters[0].asnumpy()) and (p.asnumpy() < 1).all()
        for p in parameters
    )


def test_a_devices_flat_weights_stay_those_of_the_parameters(problem):
    """The update reads the flat ones and the network the others: they must not drift apart."""

    def assert_equal():
        for members, flat in zip(optimizer.members, optimizer.flat_weights):
            whole = np.concatenate([parameter.asnumpy().ravel() for parameter in members])
            assert np.array_equal(flat.asnumpy(), whole)

    _, optimizer = trained(DeviceOptimizer, "momentum", problem)
    assert_equal()
    optimizer.parameters[0].set_data(Tensor(np.full((70, 1000), 2, np.float32)))
    optimizer.load()
    assert_equal()


def test_a_device_names_the_first_parameter_that_is_not_finite(problem):
    start, gradients = problem
    config = make_config(**KEYS)
    parameters = [Parameter(Tensor(v.astype(np.float32)), name=name) for name, v in start.items()]
    optimizer = DeviceOptimizer(parameters, create_update_rule(config), config)
    arrays = [gradients[0][name].astype(np.float32) for name in start]
    arrays[1][3] = np.inf
    assert updater(optimizer, config)(0.1, arrays, 1.0) == 1
    assert all(np.array_equal(p.asnumpy(), start[p.name].astype(np.float32)) for p in parameters)


@pytest.mark.parametrize("kind", [HostOptimizer, DeviceOptimizer])
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_a_frozen_backbone_keeps_weights_and_state(kind, optimizer):
    """Gradients from while the backbone was frozen have no effect once it is trained."""
    config = make_config(optimizer=optimizer, freeze_epochs=1, **KEYS)
    parameters = [
        Parameter(Tensor(np.ones((3, 2), np.float32)), name=name)
        for name in ("conv.weight", "classifier.weight")
    ]
    instance = kind(parameters, create_update_rule(config), config)
    update = updater(instance, config)
    instance.backbone_frozen = True

    def step(value):
        update(0.1, [np.full((3, 2), value, np.float32) for _ in parameters], 1.0)
        if isinstance(instance, DeviceOptimizer):
            instance.store_states()
        return [p.asnumpy().copy() for p in parameters], [
            [state.asnumpy().copy() for state in of_one] for of_one in instance.states
        ]

    for value in (5.0, -3.0):
        (backbone, classifier), (backbone_states, classifier_states) = step(value)
    assert (backbone == 1).all() and all((state == 0).all() for state in backbone_states)
    assert (classifier != 1).any() and any((state != 0).any() for state in classifier_states)
    instance.backbone_frozen = False
    (backbone, _), _ = step(2.0)
    # As the first update of any training: learning rate times gradient, or, in AdamW, times 1.
    decay = 0.1 * KEYS["weight_decay"]
    assert backbone == pytest.approx(
        1 - decay - 0.1 * (2.0 if optimizer == "momentum" else 1.0), rel=1e-5
    )


def test_states_are_named_after_their_parameters(problem):
    _, optimizer = trained(HostOptimizer, "adamw", problem)
    assert [p.name for p in optimizer.state_parameters] == [
        f"optimizer.{state}.{name}"
        for name in problem[0]
        for state in ("first_moment", "second_moment")
    ]
    assert optimizer.counters() == {"updates": len(RATES), "frozen_updates": 0}


def test_lars_moves_weights_that_are_zero():
    config = make_config(optimizer="lars")
    parameter = Parameter(Tensor(np.zeros((2, 2), np.float32)), name="a.weight")
    HostOptimizer([parameter], create_update_rule(config), config)(
        0.1, [np.ones((2, 2), np.float32)]
    )
    assert np.allclose(parameter.asnumpy(), -0.1)


@pytest.mark.parametrize(
    "text,message",
    [
        ("adam", "did you mean 'adamw'"),
        ("adamw(beta3=1)", "adamw takes no argument 'beta3'"),
        ("adamw(beta1=2)", "less than 1"),
        ("adamw(0.9)", "neither a name nor"),
        ("momentum(momentum='x')", "momentum=x"),
        ("__import__('os')", "neither a name nor"),
    ],
)
def test_a_wrong_optimizer_is_named(text, message):
    with pytest.raises(UserError, match=message):
        create_update_rule(make_config(optimizer=text))
