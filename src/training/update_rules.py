"""Optimizers as formulas for one parameter: written with operators that numpy arrays and MindSpore tensors share, so that every
device computes the same. Imports nothing of MindSpore.
"""

from typing import Annotated, Any, ClassVar

import pydantic

from src.utils.config import Config
from src.utils.named import STRICT, make_named

OPTIMIZERS = {
    "momentum": "src.training.update_rules:Momentum",
    "nesterov": "src.training.update_rules:Nesterov",
    "adamw": "src.training.adamw:AdamW",
    "lars": "src.training.lars:Lars",
}
Share = Annotated[float, pydantic.Field(ge=0, lt=1)]


class UpdateRule:
    """An optimizer's formula.

    Attributes:
        states: names of the arrays, zero at first, that it keeps for each parameter, of that parameter's shape.
    """

    states: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def of(cls, config: Config, **arguments: Any) -> "UpdateRule":
        """The rule with the arguments that the key ``optimizer`` gives it."""
        return cls(**arguments)

    def constants(self, updates: int) -> tuple[float, ...]:
        """Numbers of the formula at update number ``updates``, counted from 1."""
        return ()

    def rate_factor(self, weight_norm: float, gradient_norm: float, decay: float) -> float:
        """Factor of the learning rate of a parameter with two or more dimensions, by its Euclidean norms."""
        return 1.0

    @staticmethod
    def update(weight: Any, gradient: Any, states: tuple[Any, ...], rate: Any, decay: float, constants: Any) -> tuple[Any, Any]:
        """(new weight, new states), all arrays or all tensors of one shape. Compiled as part of a graph on devices.

        Args:
            rate: learning rate of this parameter.
            decay: weight decay of this parameter, a Python number.
            constants: those of ``constants``.
        """
        return weight, states


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Momentum(UpdateRule):
    """SGD with momentum as in PyTorch (dampening 0): v <- momentum v + (g + decay w); w <- w - rate v."""

    momentum: Share
    states = ("momentum",)

    @classmethod
    def of(cls, config: Config, **arguments: Any) -> "Momentum":
        return cls(**{"momentum": config.momentum, **arguments})

    def constants(self, updates: int) -> tuple[float, ...]:
        return (self.momentum,)

    @staticmethod
    def update(weight: Any, gradient: Any, states: tuple[Any, ...], rate: Any, decay: float, constants: Any) -> tuple[Any, Any]:
        velocity = constants[0] * states[0] + with_decay(gradient, weight, decay)
        return weight - rate * velocity, (velocity,)


class Nesterov(Momentum):
    """Nesterov momentum as in PyTorch: d = g + decay w; v <- momentum v + d; w <- w - rate (d + momentum v)."""

    @staticmethod
    def update(weight: Any, gradient: Any, states: tuple[Any, ...], rate: Any, decay: float, constants: Any) -> tuple[Any, Any]:
        direction = with_decay(gradient, weight, decay)
        velocity = constants[0] * states[0] + direction
        return weight - rate * (direction + constants[0] * velocity), (velocity,)


def with_decay(gradient: Any, weight: Any, decay: float) -> Any:
    """The gradient with that of decay / 2 * |weight|^2 added."""
    if decay > 0:
        return decay * weight + gradient
    return gradient


def make_rule(config: Config) -> UpdateRule:
    """The UpdateRule that the key ``optimizer`` names. Raises UserError for an unknown one or a wrong argument."""
    return make_named("optimizer", config.optimizer, OPTIMIZERS, config)
