"""Loss scaling for gradients in float16 (Micikevicius et al., arXiv:1710.03740, section 3.2)."""

from typing import Any

from src.utils.config import Config

_STEPS_TO_DOUBLE = 2000
_LARGEST = 2.0 ** 24


class LossScale:
    """The loss is multiplied by ``value`` before the backward pass, and the gradients are divided by it after.

    A step whose gradients are not all finite is skipped. A dynamic scale is halved then, and doubled after 2,000 good steps.

    Attributes:
        value: the scale of the next step; 1 if not active.
        active: whether there is any scaling.
    """

    def __init__(self, value: float = 1.0, dynamic: bool = False, active: bool = False) -> None:
        self.value, self.active, self._dynamic, self._good_steps = value, active, dynamic, 0

    @classmethod
    def of(cls, config: Config) -> "LossScale":
        """By the keys amp_level, loss_scale and is_dynamic_loss_scale."""
        # On CPU halves are bfloat16, whose range is that of float32.
        if config.device_target == "CPU" or config.precision == "O0":
            return cls()
        return cls(config.loss_scale, config.is_dynamic_loss_scale, active=True)

    def adjust(self, overflow: bool) -> None:
        """Take note of a step, whose gradients overflowed or not."""
        self._good_steps = 0 if overflow else self._good_steps + 1
        if not self._dynamic:
            return
        if overflow:
            self.value = max(self.value / 2, 1.0)
        elif self._good_steps == _STEPS_TO_DOUBLE:
            self.value, self._good_steps = min(self.value * 2, _LARGEST), 0

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"value": self.value, "good_steps": self._good_steps}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what ``state`` gave."""
        self.value, self._good_steps = state["value"], state["good_steps"]
