"""Learning-rate schedules: pure functions of the step, in a table."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any

import pydantic

from src.cli.config import Config
from src.utils.specs import FORBID_EXTRA, create_from_spec


class Schedule(ABC):
    """A schedule's formula; its fields are the arguments that lr_scheduler may give it."""

    # Whether the linear warm-up over warmup_epochs comes first.
    has_warmup = True

    @classmethod
    def of(cls, config: Config, **arguments: Any) -> "Schedule":
        """The schedule with the arguments in lr_scheduler."""
        return cls(**arguments)

    @abstractmethod
    def rate(self, config: Config, step: int, steps_per_epoch: int) -> float:
        """Learning rate of ``step``, counted from 0."""

    def horizon_epochs(self, config: Config) -> float | None:
        """Epochs that the whole curve is scaled to; None if a longer run keeps earlier rates."""
        return None


@dataclass(frozen=True)
class LearningRate:
    """The learning rate of a run: the warm-up, then the schedule."""

    config: Config
    schedule: Schedule

    def __call__(self, step: int, steps_per_epoch: int) -> float:
        """Learning rate of ``step``, counted from 0.

        The warm-up rises linearly from lr / steps to lr (Goyal et al., arXiv:1706.02677,
        section 2.2).
        """
        warmup_steps = round(self.config.warmup_epochs * steps_per_epoch)
        if self.schedule.has_warmup and step < warmup_steps:
            return self.config.lr * (step + 1) / warmup_steps
        return self.schedule.rate(self.config, step, steps_per_epoch)

    @property
    def horizon_epochs(self) -> float | None:
        """Epochs that the whole curve is scaled to; None if a longer run keeps earlier rates."""
        return self.schedule.horizon_epochs(self.config)


@pydantic.dataclasses.dataclass(frozen=True, config=FORBID_EXTRA)
class CosineAnnealing(Schedule):
    """eta_min + (lr - eta_min) (1 + cos(pi t / T_max)) / 2, and eta_min from T_max on.

    t is in epochs from the start of the run (Loshchilov and Hutter, arXiv:1608.03983, without
    restarts).
    """

    def rate(self, config: Config, step: int, steps_per_epoch: int) -> float:
        epochs = elapsed_epochs(config, step, steps_per_epoch)
        return _cosine(config.lr, config.eta_min, min(epochs / self.horizon_epochs(config), 1))

    def horizon_epochs(self, config: Config) -> float:
        return config.T_max or config.max_epoch


@pydantic.dataclasses.dataclass(frozen=True, config=FORBID_EXTRA)
class StepDecay(Schedule):
    """lr * lr_gamma ** (number of lr_epochs that have passed)."""

    def rate(self, config: Config, step: int, steps_per_epoch: int) -> float:
        passed = sum(step >= round(epoch * steps_per_epoch) for epoch in config.lr_epochs)
        return config.lr * config.lr_gamma**passed


@pydantic.dataclasses.dataclass(frozen=True, config=FORBID_EXTRA)
class ExponentialDecay(Schedule):
    """lr * lr_gamma ** max(t - warmup_epochs, 0), t in epochs from the start of the run."""

    def rate(self, config: Config, step: int, steps_per_epoch: int) -> float:
        epochs = elapsed_epochs(config, step, steps_per_epoch)
        return config.lr * config.lr_gamma ** max(epochs - config.warmup_epochs, 0)


@pydantic.dataclasses.dataclass(frozen=True, config=FORBID_EXTRA)
class CosineRestarts(Schedule):
    """Cosine annealing from lr to eta_min that starts again after each period.

    Loshchilov and Hutter, arXiv:1608.03983, section 3; PyTorch's CosineAnnealingWarmRestarts. The
    first period begins after the warm-up.

    Args:
        period: epochs in the first period.
        factor: length of each period relative to the one before.
    """

    period: Annotated[float, pydantic.Field(ge=0.01)] = 10.0
    factor: Annotated[float, pydantic.Field(ge=1)] = 1.0

    def rate(self, config: Config, step: int, steps_per_epoch: int) -> float:
        position = elapsed_epochs(config, step, steps_per_epoch) - config.warmup_epochs
        position, period = max(position, 0.0), self.period
        while position >= period:
            position -= period
            period *= self.factor
        return _cosine(config.lr, config.eta_min, position / period)


@pydantic.dataclasses.dataclass(frozen=True, config=FORBID_EXTRA)
class OneCycle(Schedule):
    """Up from lr / start_divisor to lr, then down to lr / (start_divisor * end_divisor).

    Smith and Topin, arXiv:1708.07120; both halves are cosines, as in PyTorch's OneCycleLR. Changes
    every step, and has its own warm-up.

    Args:
        rise: fraction of the steps until the peak.
    """

    rise: Annotated[float, pydantic.Field(gt=0, lt=1)] = 0.3
    start_divisor: Annotated[float, pydantic.Field(ge=1)] = 25.0
    end_divisor: Annotated[float, pydantic.Field(ge=1)] = 1e4
    has_warmup = False

    def rate(self, config: Config, step: int, steps_per_epoch: int) -> float:
        last = steps_per_epoch * config.max_epoch - 1
        peak = self.rise * (last + 1) - 1
        start = config.lr / self.start_divisor
        if step < peak:
            return _cosine(start, config.lr, step / peak)
        return _cosine(config.lr, start / self.end_divisor, (step - peak) / max(last - peak, 1))

    def horizon_epochs(self, config: Config) -> float:
        return config.max_epoch


SCHEDULES: dict[str, type[Schedule]] = {
    "cosine_annealing": CosineAnnealing,
    "step": StepDecay,
    "exponential": StepDecay,  # the model zoo's word
    "exponential_decay": ExponentialDecay,
    "cosine_restarts": CosineRestarts,
    "one_cycle": OneCycle,
}


def create_schedule(config: Config) -> LearningRate:
    """The learning rate that lr_scheduler describes.

    Raises:
        UserError: for an unknown schedule or a wrong argument.
    """
    schedule = create_from_spec("lr_scheduler", config.lr_scheduler, SCHEDULES, config)
    return LearningRate(config, schedule)


def elapsed_epochs(config: Config, step: int, steps_per_epoch: int) -> float:
    """Epochs before ``step``; whole epochs with lr_interval=epoch."""
    if config.lr_interval == "epoch":
        return step // steps_per_epoch
    return step / steps_per_epoch


def _cosine(start: float, end: float, fraction: float) -> float:
    """From ``start`` to ``end`` as ``fraction`` goes from 0 to 1."""
    return end + (start - end) * (1 + math.cos(math.pi * fraction)) / 2
