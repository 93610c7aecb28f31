"""Learning rates against closed forms."""

import math

import pytest
from conftest import make_config

from src.training.schedule import learning_rate

STEPS = 10  # an epoch


def rates(count, **values):
    config = make_config(**values)
    return [learning_rate(step, STEPS, config) for step in range(count)]


def test_warm_up_rises_linearly_to_lr():
    found = rates(20, lr=0.4, warmup_epochs=2, max_epoch=10)
    assert found == pytest.approx([0.4 * (step + 1) / 20 for step in range(20)])


def test_cosine_annealing():
    found = rates(100, lr=0.13, warmup_epochs=2, max_epoch=10, eta_min=0.01)
    expected = [0.01 + 0.12 * 0.5 * (1 + math.cos(math.pi * (step - 20) / 80)) for step in range(20, 100)]
    assert found[20:] == pytest.approx(expected)
    assert found[20] == pytest.approx(0.13)


def test_cosine_stays_at_its_end_after_t_max():
    assert rates(100, lr=1, warmup_epochs=0, max_epoch=10, T_max=5, eta_min=0.25)[50:] == pytest.approx([0.25] * 50)


def test_step_counts_epochs_from_the_start():
    found = rates(100, lr=1, lr_scheduler="step", lr_epochs="3,6", lr_gamma=0.1, warmup_epochs=1, max_epoch=10)
    assert found[10:30] == pytest.approx([1] * 20)
    assert found[30:60] == pytest.approx([0.1] * 30) and found[60:] == pytest.approx([0.01] * 40)


def test_exponential():
    found = rates(100, lr=2, lr_scheduler="exponential", lr_gamma=0.5, warmup_epochs=1, max_epoch=10)
    assert found[10:] == pytest.approx([2 * 0.5 ** ((step - 10) / 10) for step in range(10, 100)])


def test_warm_up_longer_than_the_training_is_all_there_is():
    assert rates(10, lr=1, warmup_epochs=5, max_epoch=1)[-1] == pytest.approx(10 / 50)
