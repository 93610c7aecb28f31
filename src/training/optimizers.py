"""Optimizers: the execution of an update rule on the host or on a device, with the learning rate as an argument of every update."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import mindspore
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from src.models.formats import OPTIMIZER_PREFIX
from src.models.weights import is_classifier
from src.training.update_rules import UpdateRule, make_rule
from src.utils.config import Config

# Elements updated at a time: few enough that the arrays of a chunk stay in a core's cache.
_CHUNK = 1 << 16


@dataclass(frozen=True)
class _Treatment:
    """Weight decay and learning-rate factor of one parameter, and whether it is of the classifier."""

    decay: float
    lr_factor: float
    of_classifier: bool


class Optimizer:
    """Updates parameters from their gradients by an UpdateRule; subclasses do so on the host or on a device.

    Attributes:
        state_parameters: what it keeps, Parameters named ``optimizer.STATE.NAME``.
        freezes_backbone: while True all but the classifier stays as it is, in what is kept for it too.
    """

    def __init__(self, parameters: Sequence[Parameter], rule: UpdateRule, config: Config) -> None:
        self.parameters, self.rule = list(parameters), rule
        self._updates = self._frozen_updates = 0
        self.states = [tuple(_zeros_like(p, state) for state in rule.states) for p in parameters]
        self.treatments = [_treatment(p, config) for p in parameters]
        self.freezes_backbone = False
        self._uses_norms = type(rule).rate_factor is not UpdateRule.rate_factor

    def __call__(self, lr: float, gradients: Sequence[Any], loss_scale: float = 1.0, arrivals: Iterable[int] | None = None) -> int | None:
        """Update with learning rate ``lr`` from ``gradients``, in the parameters' order, divided by ``loss_scale``.

        Args:
            arrivals: indices of all gradients, in the order in which they may be read; None if they all may.

        Returns:
            Index of the first parameter whose gradient is not finite, or None. With a loss scale other than 1 nothing is
            updated then; without, the weights are of no use any more.
        """
        raise TypeError("an Optimizer is a HostOptimizer or a DeviceOptimizer")

    @property
    def state_parameters(self) -> list[Parameter]:
        return [state for states in self.states for state in states]

    def counters(self) -> dict[str, int]:
        """What else a resumed run needs besides ``state_parameters``."""
        return {"updates": self._updates, "frozen_updates": self._frozen_updates}

    def restore_counters(self, counters: dict[str, int]) -> None:
        """Take back what ``counters`` gave."""
        self._updates, self._frozen_updates = counters["updates"], counters.get("frozen_updates", 0)

    def _count_update(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Count one more; the rule's constants for the backbone, which has had fewer if it was frozen, and for the classifier."""
        self._updates += 1
        self._frozen_updates += self.freezes_backbone
        return self.rule.constants(max(self._updates - self._frozen_updates, 1)), self.rule.constants(self._updates)

    def _is_frozen(self, index: int) -> bool:
        return self.freezes_backbone and not self.treatments[index].of_classifier

    def _rate(self, lr: float, index: int, norms: tuple[float, float] | None) -> float:
        """Learning rate of parameter ``index``, by the norms of weight and gradient if the rule looks at them."""
        treatment = self.treatments[index]
        rate = lr * treatment.lr_factor
        if norms is None or self.parameters[index].ndim < 2:
            return rate
        return rate * self.rule.rate_factor(*norms, treatment.decay)


class HostOptimizer(Optimizer):
    """The update on the parameters' own memory, for CPU, where asnumpy() of a parameter is its memory and writable.

    A graph of element-wise operations costs about 10 ms per parameter there (benchmarks/README.md). Gradients are arrays.
    """

    def __call__(self, lr: float, gradients: Sequence[np.ndarray], loss_scale: float = 1.0,
                 arrivals: Iterable[int] | None = None) -> int | None:
        if arrivals is None:
            arrivals = range(len(gradients))
        if loss_scale != 1.0:
            arrivals = list(arrivals)
            for gradient in gradients:
                gradient *= np.float32(1 / loss_scale)
            nonfinite = next((index for index, gradient in enumerate(gradients) if not _is_finite(gradient)), None)
            if nonfinite is not None:
                return nonfinite
        constants = [tuple(map(np.float32, of_part)) for of_part in self._count_update()]
        # The memory is asked for at every update: a parameter that was loaded since has another.
        weights = [p.asnumpy() for p in self.parameters]
        found: list[int] = []
        for index in arrivals:
            weight, gradient = weights[index], gradients[index]
            if self._is_frozen(index):
                if not _is_finite(gradient):
                    found.append(index)
                continue
            norms = (float(np.linalg.norm(weight)), float(np.linalg.norm(gradient))) if self._uses_norms else None
            states = [state.asnumpy().reshape(-1) for state in self.states[index]]
            if not self._update(weight.reshape(-1), gradient.reshape(-1), states, np.float32(self._rate(lr, index, norms)),
                                self.treatments[index].decay, constants[self.treatments[index].of_classifier]):
                found.append(index)
        return min(found, default=None)

    def _update(self, weight: np.ndarray, gradient: np.ndarray, states: list[np.ndarray], rate: np.float32, decay: float,
                constants: tuple[np.float32, ...]) -> bool:
        """Returns whether the gradient is finite, which costs little while a chunk is in the cache."""
        finite = True
        for start in range(0, weight.size, _CHUNK):
            part = slice(start, start + _CHUNK)
            finite = finite and _is_finite(gradient[part])
            of_part = tuple(state[part] for state in states)
            weight[part], changed = self.rule.update(weight[part], gradient[part], of_part, rate, decay, constants)
            for state, new in zip(of_part, changed):
                state[...] = new
        return finite


class DeviceOptimizer(Optimizer):
    """The update as a graph, for GPU and Ascend. Gradients are tensors; only flags and norms travel to the host."""

    def __init__(self, parameters: Sequence[Parameter], rule: UpdateRule, config: Config) -> None:
        super().__init__(parameters, rule, config)
        self._survey = _Survey(self.parameters, self._uses_norms)
        self._graph = _UpdateGraph(self.parameters, self.states, rule, self.treatments)

    def __call__(self, lr: float, gradients: Sequence[Tensor], loss_scale: float = 1.0,
                 arrivals: Iterable[int] | None = None) -> int | None:
        finite, norms = (found.asnumpy() for found in self._survey(*gradients))
        if not finite.all():
            return int(finite.argmin())
        constants = [(*of_part, 1 / loss_scale) for of_part in self._count_update()]
        scaled = [(float(weight), float(gradient) / loss_scale) for weight, gradient in norms.T] if self._uses_norms else None
        rates = [self._rate(lr, index, scaled[index] if scaled else None) for index in range(len(self.parameters))]
        trained = [not self._is_frozen(index) for index in range(len(self.parameters))]
        self._graph(Tensor(rates, mindspore.float32), Tensor(trained, mindspore.bool_),
                    Tensor(constants, mindspore.float32), *gradients)
        return None


class _Survey(nn.Cell):
    """Gradients -> (whether each is finite (n,), norms of weights and of gradients (2, n), or zeros (2, 1))."""

    def __init__(self, parameters: Sequence[Parameter], norms: bool) -> None:
        super().__init__(auto_prefix=False)
        self.parameters, self.norms = ParameterTuple(parameters), norms
        # In place of a loop, each turn of which is a function call to the compiler, which allows 1000 inside one another.
        self.map = ops.Map()

    def construct(self, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        finite = ops.stack(self.map(_all_finite, gradients))
        if self.norms:
            return finite, ops.stack((ops.stack(self.map(_norm, self.parameters)), ops.stack(self.map(_norm, gradients))))
        return finite, ops.zeros((2, 1), mindspore.float32)


class _UpdateGraph(nn.Cell):
    """Updates weights and states; returns nothing of use.

    Takes rates (n,), which are trained (n,), the rule's constants and 1 / loss scale for backbone and classifier (2, k), and gradients.

    The gradients are arguments of their own: a graph is compiled again for every new tuple of tensors.
    """

    def __init__(self, parameters: Sequence[Parameter], states: Sequence[tuple[Parameter, ...]], rule: UpdateRule,
                 treatments: Sequence[_Treatment]) -> None:
        super().__init__(auto_prefix=False)
        self.parameters, self.decays = ParameterTuple(parameters), tuple(treatment.decay for treatment in treatments)
        self.parts = tuple(int(treatment.of_classifier) for treatment in treatments)
        self.states = [ParameterTuple(slot) for slot in zip(*states)]
        self.map, self.rule_update = ops.Map(), rule.update

    def construct(self, rates: Tensor, trained: Tensor, constants: Tensor, *gradients: Tensor) -> Tensor:
        self.map(ops.partial(self._update, constants), ops.unstack(rates), ops.unstack(trained), self.decays, self.parts, self.parameters,
                 gradients, *self.states)
        return rates

    def _update(self, constants: Tensor, rate: Tensor, trained: Tensor, decay: float, part: int, parameter: Parameter, gradient: Tensor,
                *states: Parameter) -> bool:
        constants = constants[part]
        gradient = ops.cast(gradient, mindspore.float32) * constants[-1]
        weight, changed = self.rule_update(parameter, gradient, states, rate, decay, constants)
        ops.assign(parameter, ops.where(trained, weight, parameter))
        for slot in range(len(states)):
            ops.assign(states[slot], ops.where(trained, changed[slot], states[slot]))
        return True


def _all_finite(gradient: Tensor) -> Tensor:
    return ops.isfinite(ops.cast(gradient, mindspore.float32)).all()


def _norm(tensor: Tensor) -> Tensor:
    return ops.sqrt(ops.square(ops.cast(tensor, mindspore.float32)).sum())


def create_optimizer(config: Config, parameters: Sequence[Parameter]) -> Optimizer:
    """The optimizer that the key ``optimizer`` names, for the device of ``config``. Raises UserError for an unknown one."""
    kind = HostOptimizer if config.device_target == "CPU" else DeviceOptimizer
    return kind(parameters, make_rule(config), config)


def _treatment(parameter: Parameter, config: Config) -> _Treatment:
    of_classifier = is_classifier(parameter.name)
    factor = (config.bias_lr_factor if is_bias(parameter.name) else 1.0) * (1.0 if of_classifier else config.backbone_lr_factor)
    return _Treatment(config.weight_decay if config.decay_norm_and_bias or parameter.ndim > 1 else 0.0, factor, of_classifier)


def is_bias(name: str) -> bool:
    """True for biases and batch-norm offsets, both of which PyTorch calls bias."""
    return name.rpartition(".")[2] in ("bias", "beta")


def _zeros_like(parameter: Parameter, state: str) -> Parameter:
    return Parameter(Tensor(np.zeros(parameter.shape, np.float32)), name=f"{OPTIMIZER_PREFIX}{state}.{parameter.name}",
                     requires_grad=False)


def _is_finite(array: np.ndarray) -> bool:
    # The sum can overflow although every element is finite, so check the elements before reporting.
    return bool(np.isfinite(array.sum()) or np.isfinite(array).all())
