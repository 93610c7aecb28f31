"""Optimizers as formulas for one parameter.

They are written with operators that numpy arrays and MindSpore tensors share, so that every device
computes the same. Imports nothing of MindSpore.
"""

from typing import Annotated, Any, ClassVar

import pydantic

from src.cli.config import Config
from src.utils.specs import FORBID_EXTRA, create_from_spec

Fraction = Annotated[float, pydantic.Field(ge=0, lt=1)]
Positive = Annotated[float, pydantic.Field(gt=0)]


class UpdateRule:
    """An optimizer's formula.

    Attributes:
        state_names: names of the arrays that it keeps for each parameter, of that parameter's
            shape and initially zero.
    """

    state_names: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def of(cls, config: Config, **arguments: Any) -> "UpdateRule":
        """The rule with the arguments in the key ``optimizer``."""
        return cls(**arguments)

    def scalars(self, step: int) -> tuple[float, ...]:
        """Numbers of the formula at update ``step``, counted from 1."""
        return ()

    def trust_ratio(self, weight_norm: Any, gradient_norm: Any, decay: float) -> Any:
        """Factor of the learning rate of a parameter, from its Euclidean norms, numbers or tensors.

        Used for parameters with two or more dimensions, if neither norm is 0.
        """
        return 1.0

    @staticmethod
    def update(
        weight: Any, gradient: Any, states: tuple[Any, ...], lr: Any, decay: float, scalars: Any
    ) -> tuple[Any, Any]:
        """(new weight, new states): all arrays or all tensors, of one shape.

        Compiled as part of a graph on devices.

        Args:
            lr: learning rate of this parameter.
            decay: weight decay of this parameter, a Python number.
            scalars: the result of ``scalars``.
        """
        return weight, states


@pydantic.dataclasses.dataclass(frozen=True, config=FORBID_EXTRA)
class Momentum(UpdateRule):
    """SGD with momentum as in PyTorch (dampening 0).

    v <- momentum v + (g + decay w); w <- w - lr v.
    """

    momentum: Fraction
    state_names = ("momentum",)

    @classmethod
    def of(cls, config: Config, **arguments: Any) -> "Momentum":
        return cls(**{"momentum": config.momentum, **arguments})

    def scalars(self, step: int) -> tuple[float, ...]:
        return (self.momentum,)

    @staticmethod
    def update(
        weight: Any, gradient: Any, states: tuple[Any, ...], lr: Any, decay: float, scalars: Any
    ) -> tuple[Any, Any]:
        velocity = scalars[0] * states[0] + with_decay(gradient, weight, decay)
        return weight - lr * velocity, (velocity,)


class Nesterov(Momentum):
    """Nesterov momentum as in PyTorch.

    d = g + decay w; v <- momentum v + d; w <- w - lr (d + momentum v).
    """

    @staticmethod
    def update(
        weight: Any, gradient: Any, states: tuple[Any, ...], lr: Any, decay: float, scalars: Any
    ) -> tuple[Any, Any]:
        direction = with_decay(gradient, weight, decay)
        velocity = scalars[0] * states[0] + direction
        return weight - lr * (direction + scalars[0] * velocity), (velocity,)


@pydantic.dataclasses.dataclass(frozen=True, config=FORBID_EXTRA)
class AdamW(UpdateRule):
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101, algorithm 2), with PyTorch's epsilon.

    m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2;
    w <- (1 - lr decay) w - lr m' / (sqrt(v') + epsilon),
    with m' = m / (1 - b1^t) and v' = v / (1 - b2^t) at update t, counted from 1.
    """

    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    epsilon: Positive = 1e-8
    state_names = ("first_moment", "second_moment")

    def scalars(self, step: int) -> tuple[float, ...]:
        return (
            self.beta1,
            1 - self.beta1,
            self.beta2,
            1 - self.beta2,
            self.epsilon,
            1 / (1 - self.beta1**step),
            (1 - self.beta2**step) ** -0.5,
        )

    @staticmethod
    def update(
        weight: Any, gradient: Any, states: tuple[Any, ...], lr: Any, decay: float, scalars: Any
    ) -> tuple[Any, Any]:
        first = scalars[0] * states[0] + scalars[1] * gradient
        second = scalars[2] * states[1] + scalars[3] * gradient * gradient
        step = scalars[5] * first / (scalars[6] * second**0.5 + scalars[4])
        return weight - lr * (step + decay * weight), (first, second)


@pydantic.dataclasses.dataclass(frozen=True, config=FORBID_EXTRA)
class Lars(Momentum):
    """Layer-wise adaptive rate scaling (You et al., arXiv:1708.03888, algorithm 1).

    v <- momentum v + lr * r (g + decay w); w <- w - v, with the trust ratio
    r = trust |w| / (|g| + decay |w|) of each layer. r is 1 for parameters of one dimension (batch
    norms and biases), and if the weights or gradients are all zero.
    """

    trust: Positive = 0.001

    def trust_ratio(self, weight_norm: Any, gradient_norm: Any, decay: float) -> Any:
        return self.trust * weight_norm / (gradient_norm + decay * weight_norm)

    @staticmethod
    def update(
        weight: Any, gradient: Any, states: tuple[Any, ...], lr: Any, decay: float, scalars: Any
    ) -> tuple[Any, Any]:
        velocity = scalars[0] * states[0] + lr * with_decay(gradient, weight, decay)
        return weight - velocity, (velocity,)


OPTIMIZERS: dict[str, type[UpdateRule]] = {
    "momentum": Momentum,
    "nesterov": Nesterov,
    "adamw": AdamW,
    "lars": Lars,
}


def create_update_rule(config: Config) -> UpdateRule:
    """The UpdateRule that the key ``optimizer`` describes.

    Raises:
        UserError: for an unknown optimizer or a wrong argument.
    """
    return create_from_spec("optimizer", config.optimizer, OPTIMIZERS, config)


def with_decay(gradient: Any, weight: Any, decay: float) -> Any:
    """The gradient plus that of decay / 2 * |weight|^2."""
    if decay > 0:
        return decay * weight + gradient
    return gradient
