"""Layer-wise adaptive rate scaling (You et al., arXiv:1708.03888, algorithm 1)."""

from typing import Annotated, Any

import pydantic

from src.training.update_rules import Momentum, with_decay
from src.utils.named import STRICT


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Lars(Momentum):
    """v <- momentum v + rate * f (g + decay w); w <- w - v, with f = trust |w| / (|g| + decay |w|) for each layer.

    Parameters of one dimension, batch norms and biases, have f = 1, as have those whose weights or gradients are all zero.
    """

    trust: Annotated[float, pydantic.Field(gt=0)] = 0.001

    def rate_factor(self, weight_norm: float, gradient_norm: float, decay: float) -> float:
        if not weight_norm > 0 or not gradient_norm > 0:
            return 1.0
        return self.trust * weight_norm / (gradient_norm + decay * weight_norm)

    @staticmethod
    def update(weight: Any, gradient: Any, states: tuple[Any, ...], rate: Any, decay: float, constants: Any) -> tuple[Any, Any]:
        velocity = constants[0] * states[0] + rate * with_decay(gradient, weight, decay)
        return weight - velocity, (velocity,)
