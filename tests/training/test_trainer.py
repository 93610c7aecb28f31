"""The training loop with ranks that are made up, so that what another rank does can be chosen.

Real ranks are in test_train.py.
"""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import make_config
from mindspore import Tensor

from src.dataset.image_set import ImageSet
from src.dataset.splits import TrainingData
from src.distributed.communicator import Communicator
from src.kernels.library import KernelChoice
from src.models.create import create_network
from src.runs.recorder import Recorder
from src.training.job import block_init_warning, class_weights_messages
from src.training.start import RandomWeights
from src.training.trainer import Trainer
from src.utils.errors import TrainingInterrupted, UserError

IMAGES = ImageSet(
    {str(i): i for i in range(4)},
    np.arange(24, dtype=np.int32) % 4,
    pixels=np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), np.uint8),
)


class Notes(Recorder):
    """Notes the calls."""

    def __init__(self):
        self.calls, self.states = [], []
        self.log = lambda text: self.calls.append(f"log {text}")

    def start(self, class_to_index):
        self.calls.append("start")

    def add_epoch(self, metrics):
        self.calls.append(f"epoch {metrics['epoch']} step {metrics['step']}")

    def save(self, state, network, optimizer_state):
        self.calls.append(f"save {state.step}")
        self.states.append(dataclasses.replace(state, epoch_sums=dict(state.epoch_sums)))

    def save_best(self, state, network, optimizer_state):
        self.calls.append(f"best {state.step}")

    def finish(self):
        self.calls.append("finish")

    def last_checkpoint(self):
        return "the last.ckpt"


class TwoRanks(Communicator):
    """Rank ``rank`` of two.

    The other one has the same loss, and a signal at its ``stops_at``-th step.
    """

    size = 2

    def __init__(self, rank, stops_at=0):
        self.rank, self._stops_at, self._sums = rank, stops_at, 0

    def all_reduce_sum(self, values):
        values = np.asarray(values, np.float64)
        if len(values) != 3:
            return 2 * values
        self._sums += 1
        return values + [values[0], self._sums == self._stops_at, 1]

    def all_gather(self, value):
        return [value, 15] if self.rank == 0 else [15, value]


def trainer(recorder, communicator=None, eval_images=None, **keys):
    config = make_config(
        **{
            "network": "cifar_quick",
            "image_size": 32,
            "train_crop": "resize",
            "num_classes": 4,
            "per_batch_size": 4,
            "max_epoch": 2,
            "lr": 0.01,
            "warmup_epochs": 0,
            "compile_cache": 0,
            **keys,
        }
    )
    trainer = Trainer(
        create_network(config, None),
        config,
        communicator or Communicator(),
        TrainingData(IMAGES, eval_images),
        recorder,
        KernelChoice(),
    )
    RandomWeights().load_into(trainer)
    return trainer


def test_reports_and_saves_at_its_steps():
    notes = Notes()
    trainer(notes, eval_images=IMAGES, ckpt_interval_steps=4, ckpt_interval=5).fit()
    assert [call for call in notes.calls if not call.startswith(("best", "log"))] == [
        "start",
        "save 4",
        "epoch 1 step 6",
        "save 8",
        "epoch 2 step 12",
        "save 12",
        "finish",
    ]
    assert "best 6" in notes.calls
    within, _, last = notes.states
    assert (within.epoch, within.finished_epoch, last.epoch, last.finished_epoch) == (
        1,
        False,
        2,
        True,
    )
    assert within.epoch_sums["loss"] > 0 and last.epoch_sums == {
        "loss": 0.0,
        "skipped": 0,
        "replaced": 0,
    }
    assert last.optimizer == {"updates": 12, "frozen_updates": 0}


def test_both_twins_see_the_same_loop():
    """A rank with nothing to record takes the same steps: same weights, no file."""
    with_notes, silent = trainer(Notes()), trainer(Recorder())
    with_notes.fit(), silent.fit()
    pairs = zip(with_notes.network.get_parameters(), silent.network.get_parameters())
    assert all(np.array_equal(a.asnumpy(), b.asnumpy()) for a, b in pairs)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_on_another_rank_stops_this_one_after_the_same_step(rank):
    notes = Notes()
    with pytest.raises(TrainingInterrupted) as stopped:
        trainer(notes, TwoRanks(rank, stops_at=2)).fit()
    assert stopped.value.signal == 15
    assert "save 2" in notes.calls and any(
        "stopped by SIGTERM after step 2" in call for call in notes.calls
    )
    # One image per step was replaced on the other rank.
    assert notes.states[-1].epoch_sums["replaced"] == 2


def test_a_loss_that_is_not_finite_names_step_parameter_and_checkpoint():
    notes = Notes()
    broken = trainer(notes, ckpt_interval_steps=1)
    weight = broken.network.classifier.weight
    weight.set_data(Tensor(np.full(weight.shape, np.nan, np.float32)))
    with pytest.raises(
        UserError,
        match=r"at step 1 \(epoch 1\).*gradient of conv1.conv.weight is not finite.*the last.ckpt",
    ):
        broken.fit()
    assert not any(call.startswith("save") for call in notes.calls)


def test_ends_early_in_the_middle_of_an_epoch():
    notes = Notes()
    trainer(notes, max_steps=8).fit()
    assert [call for call in notes.calls if not call.startswith("log")] == [
        "start",
        "epoch 1 step 6",
        "epoch 2 step 8",
        "save 8",
        "finish",
    ]


def evaluations(*top1s):
    """An evaluator that finds these accuracies, one after the other."""
    results = iter(top1s)
    found = SimpleNamespace(top5=100.0, correct=1, images=4, loss=1.0, class_top1=[])
    return lambda backend: SimpleNamespace(
        **vars(found), top1=next(results), text="", undecodable=(), nonfinite=0
    )


@pytest.mark.parametrize(
    "keys,top1s,best,since",
    [
        # In the middle of an epoch; after an epoch that is not evaluated otherwise.
        ({"max_steps": 8}, (50.0, 75.0), [6], 0),
        ({"max_steps": 6, "eval_interval": 2}, (50.0,), [6], 0),
        ({"max_steps": 18, "max_epoch": 4, "eval_interval": 2}, (50.0, 75.0), [12], 0),
        ({"max_steps": 8}, (50.0, 25.0), [6], 0),
        # As far as every run would evaluate, all of them count.
        ({"max_steps": 12}, (50.0, 75.0), [6, 12], 0),
        ({}, (50.0, 25.0), [6], 1),
    ],
)
def test_an_evaluation_that_only_this_stop_makes_counts_for_nothing(keys, top1s, best, since):
    """Else a resumed run would end with another best.ckpt, or earlier."""
    notes = Notes()
    stopped = trainer(notes, **keys)
    stopped.evaluator = evaluations(*top1s)
    stopped.fit()
    assert [int(call.split()[1]) for call in notes.calls if call.startswith("best")] == best
    assert notes.states[-1].since_best == since
    # A run that has no other best keeps this one, and does not know it when it resumes.
    counted = keys != {"max_steps": 6, "eval_interval": 2}
    expected = max(top1s[: len(best)]) if counted else -1
    assert notes.states[-1].best_top1 == expected
    says = any("best.ckpt is unchanged" in call for call in notes.calls)
    assert says == (max(top1s) > expected and counted)


def test_a_run_without_steps_to_do_reports_nothing_twice():
    notes = Notes()
    done = trainer(notes)
    done.first_step = done.last_step
    done.fit()
    assert notes.calls == ["start", "finish"]


def test_class_weights_are_said_by_name():
    classes = {str(number): label for label, number in enumerate([0, 1, 10, 2])}
    images = ImageSet(classes, np.arange(4, dtype=np.int32), pixels=IMAGES.pixels[:4])
    config = make_config(class_weights="1,1,2,1", num_classes=4)
    (message,) = class_weights_messages(config, config, images)
    assert message == (
        "warning: class_weights, scaled to a mean of 1: 0=1, 1=1, 10=2, 2=1; the classes are in "
        "the order of text, 10 before 2"
    )
    # Whoever says "balanced" needs no order.
    balanced = make_config(class_weights="balanced", num_classes=4)
    assert class_weights_messages(balanced, config, images)[0].startswith("class_weights, scaled")
    named = dataclasses.replace(images, class_to_index={"a": 0, "b": 1, "c": 2, "d": 3})
    (message,) = class_weights_messages(config, config, named)
    assert message.endswith("mean of 1: a=1, b=1, c=2, d=1")
    assert class_weights_messages(make_config(), make_config(), images) == []


def test_initial_weights_that_do_not_reach_the_blocks_are_told():
    assert "keep kaiming_uniform" in block_init_warning(
        make_config(block="acb", weight_init="kaiming_normal")
    )
    assert block_init_warning(make_config(weight_init="kaiming_normal")) is None
    assert block_init_warning(make_config(block="acb")) is None
