"""AdamW (Loshchilov and Hutter, arXiv:1711.05101, algorithm 2), with PyTorch's placement of epsilon."""

from typing import Annotated, Any

import pydantic

from src.training.update_rules import Share, UpdateRule
from src.utils.named import STRICT


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class AdamW(UpdateRule):
    """m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2; w <- (1 - rate decay) w - rate m' / (sqrt(v') + epsilon).

    m' = m / (1 - b1^t) and v' = v / (1 - b2^t) at update t, counted from 1.
    """

    beta1: Share = 0.9
    beta2: Share = 0.999
    epsilon: Annotated[float, pydantic.Field(gt=0)] = 1e-8
    states = ("first_moment", "second_moment")

    def constants(self, updates: int) -> tuple[float, ...]:
        return (self.beta1, 1 - self.beta1, self.beta2, 1 - self.beta2, self.epsilon, 1 / (1 - self.beta1 ** updates),
                (1 - self.beta2 ** updates) ** -0.5)

    @staticmethod
    def update(weight: Any, gradient: Any, states: tuple[Any, ...], rate: Any, decay: float, constants: Any) -> tuple[Any, Any]:
        first = constants[0] * states[0] + constants[1] * gradient
        second = constants[2] * states[1] + constants[3] * gradient * gradient
        step = constants[5] * first / (constants[6] * second ** 0.5 + constants[4])
        return weight - rate * (step + decay * weight), (first, second)
