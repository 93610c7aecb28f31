"""Learning rates against closed forms."""

import math

import pytest
from conftest import make_config

from src.training.schedules import create_schedule

STEPS = 10  # an epoch


def rates(count, **values):
    config = make_config(**values)
    schedule = create_schedule(config)
    return [schedule(step, STEPS) for step in range(count)]


def test_warm_up_rises_linearly_to_lr():
    found = rates(20, lr=0.4, warmup_epochs=2, max_epoch=10)
    assert found == pytest.approx([0.4 * (step + 1) / 20 for step in range(20)])


def test_cosine_annealing_by_step_is_pytorchs():
    """As ACNet's code calls CosineAnnealingLR: after every iteration, without warm-up."""
    torch = pytest.importorskip(
        "torch", reason="PyTorch, a development-only dependency, is not installed"
    )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    theirs, expected = (
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10 * STEPS, eta_min=0.01),
        [],
    )
    for _ in range(100):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert rates(
        100, lr=0.1, lr_interval="step", warmup_epochs=0, max_epoch=10, eta_min=0.01
    ) == pytest.approx(expected)


def test_cosine_annealing_by_epoch_is_the_model_zoos():
    """eta_min + (lr - eta_min) (1 + cos(pi epoch / T_max)) / 2, with whole epochs.

    Epochs count from the first one of the warm-up.
    """
    found = rates(100, lr=0.13, warmup_epochs=2, max_epoch=10, eta_min=0.01)
    for epoch in range(2, 10):
        expected = 0.01 + 0.12 * 0.5 * (1 + math.cos(math.pi * epoch / 10))
        assert found[epoch * STEPS : (epoch + 1) * STEPS] == pytest.approx([expected] * STEPS)


# Worked out by hand from the published formula: lr (1 + cos(pi epoch / 150)) / 2 with lr=0.4, at
# the first step of the epoch.
@pytest.mark.parametrize(
    "epoch,expected", [(1, 0.399956), (50, 0.3), (75, 0.2), (100, 0.1), (149, 0.0000439)]
)
def test_the_resnext_recipe_at_some_epochs(epoch, expected):
    config = make_config(config_path="resnext50_imagenet")
    assert create_schedule(config)(epoch * 1251, 1251) == pytest.approx(expected, rel=1e-3)


def test_cosine_stays_at_its_end_after_t_max():
    assert rates(100, lr=1, warmup_epochs=0, max_epoch=10, T_max=5, eta_min=0.25)[
        50:
    ] == pytest.approx([0.25] * 50)


@pytest.mark.parametrize("scheduler", ["step", "exponential"])
def test_milestones_count_epochs_from_the_start(scheduler):
    """`exponential` is the model zoo's word for them.

    With its defaults lr stays 0.4 until epoch 30.
    """
    found = rates(
        100,
        lr=1,
        lr_scheduler=scheduler,
        lr_epochs="3,6",
        lr_gamma=0.1,
        warmup_epochs=1,
        max_epoch=10,
    )
    assert found[10:30] == pytest.approx([1] * 20)
    assert found[30:60] == pytest.approx([0.1] * 30) and found[60:] == pytest.approx([0.01] * 40)
    zoo = make_config(config_path="resnext50_imagenet", lr_scheduler=scheduler)
    assert [create_schedule(zoo)(epoch * 7, 7) for epoch in (5, 29, 30, 60, 120)] == pytest.approx(
        [0.4, 0.4, 0.04, 0.004, 4e-5]
    )


@pytest.mark.parametrize(
    "interval,epochs", [("step", lambda step: step / STEPS), ("epoch", lambda step: step // STEPS)]
)
def test_exponential_decay(interval, epochs):
    found = rates(
        100,
        lr=2,
        lr_scheduler="exponential_decay",
        lr_interval=interval,
        lr_gamma=0.5,
        warmup_epochs=1,
        max_epoch=10,
    )
    assert found[10:] == pytest.approx([2 * 0.5 ** (epochs(step) - 1) for step in range(10, 100)])


def test_warm_up_longer_than_the_training_is_all_there_is():
    assert rates(10, lr=1, warmup_epochs=5, max_epoch=1)[-1] == pytest.approx(10 / 50)


def pytorch_rates(create, count, lr):
    torch = pytest.importorskip(
        "torch", reason="PyTorch, a development-only dependency, is not installed"
    )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    schedule, found = create(torch.optim.lr_scheduler, optimizer), []
    for _ in range(count):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("rise", [0.3, 0.5, 0.05])
def test_one_cycle_is_pytorchs(rise):
    theirs = pytorch_rates(
        lambda schedules, optimizer: schedules.OneCycleLR(
            optimizer, max_lr=0.4, total_steps=10 * STEPS, pct_start=rise
        ),
        10 * STEPS - 1,
        lr=0.4,
    )
    ours = rates(10 * STEPS, lr=0.4, lr_scheduler=f"one_cycle(rise={rise})", max_epoch=10)
    assert ours[:-1] == pytest.approx(theirs)
    assert ours[-1] == pytest.approx(0.4 / 25 / 1e4)


def test_one_cycle_may_begin_at_its_peak():
    found = rates(STEPS, lr=0.4, lr_scheduler="one_cycle(rise=0.1)", max_epoch=1)
    assert found[0] == 0.4 and found == sorted(found, reverse=True)


@pytest.mark.parametrize("factor", [1, 2])
def test_cosine_restarts_are_pytorchs(factor):
    expected = pytorch_rates(
        lambda schedules, optimizer: schedules.CosineAnnealingWarmRestarts(
            optimizer, T_0=2 * STEPS, T_mult=factor, eta_min=0.01
        ),
        10 * STEPS,
        lr=0.4,
    )
    assert rates(
        10 * STEPS,
        lr=0.4,
        eta_min=0.01,
        lr_scheduler=f"cosine_restarts(period=2, factor={factor})",
        lr_interval="step",
        warmup_epochs=0,
        max_epoch=10,
    ) == pytest.approx(expected)
