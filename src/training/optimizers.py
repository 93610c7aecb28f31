"""Optimizers: an update rule executed on the host or on a device."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mindspore
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from src.cli.config import Config
from src.models.weight_files import OPTIMIZER_PREFIX
from src.models.weights import is_classifier
from src.training.update_rules import UpdateRule, create_update_rule

# Elements updated at a time: few enough that the arrays of a chunk stay in a core's cache.
_CHUNK = 1 << 16


@dataclass(frozen=True)
class ParamGroup:
    """How a parameter is updated.

    Attributes:
        decay: its weight decay.
        lr_factor: its learning rate relative to ``lr``.
        in_classifier: whether it belongs to the classifier, not to the backbone.
    """

    decay: float
    lr_factor: float
    in_classifier: bool


class Optimizer(Protocol):
    """Updates parameters from their gradients.

    Attributes:
        backbone_frozen: while True, only the classifier and its optimizer state are updated.
    """

    parameters: list[Parameter]
    backbone_frozen: bool

    def __call__(
        self,
        lr: float,
        gradients: Sequence[Any],
        loss_scale: float = 1.0,
        arrivals: Iterable[int] | None = None,
    ) -> int | None:
        """Update with learning rate ``lr`` from ``gradients`` divided by ``loss_scale``.

        Args:
            gradients: one per parameter, in the parameters' order.
            arrivals: indices of all gradients, in the order in which they may be read; None if
                all may be read at once.

        Returns:
            Index of the first parameter whose gradient is not finite, or None. With loss scaling
            the update is then skipped; without it, the weights are already corrupted.
        """

    @property
    def state_parameters(self) -> list[Parameter]:
        """The optimizer's state, named ``optimizer.STATE.NAME``."""

    def counters(self) -> dict[str, int]:
        """The rest of the state that a resumed run needs."""

    def restore_counters(self, counters: dict[str, int]) -> None:
        """Restore what ``counters`` returned."""


class _OptimizerBase:
    """State, groups and learning rates, for every device."""

    def __init__(self, parameters: Sequence[Parameter], rule: UpdateRule, config: Config) -> None:
        self.parameters, self.rule = list(parameters), rule
        self.states = [tuple(_zeros_like(p, name) for name in rule.state_names) for p in parameters]
        self.groups = [_param_group(p, config) for p in parameters]
        self.backbone_frozen = False
        self._updates = self._frozen_updates = 0
        self._uses_norms = type(rule).trust_ratio is not UpdateRule.trust_ratio

    @property
    def state_parameters(self) -> list[Parameter]:
        return [state for states in self.states for state in states]

    def counters(self) -> dict[str, int]:
        return {"updates": self._updates, "frozen_updates": self._frozen_updates}

    def restore_counters(self, counters: dict[str, int]) -> None:
        self._updates = counters["updates"]
        self._frozen_updates = counters.get("frozen_updates", 0)

    def _count_update(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Count one more update. Returns the rule's scalars for the backbone and the classifier.

        The backbone has had fewer updates if it was frozen.
        """
        self._updates += 1
        self._frozen_updates += self.backbone_frozen
        backbone_updates = max(self._updates - self._frozen_updates, 1)
        return self.rule.scalars(backbone_updates), self.rule.scalars(self._updates)

    def _is_frozen(self, index: int) -> bool:
        return self.backbone_frozen and not self.groups[index].in_classifier

    def _lr_of(self, lr: float, index: int, norms: tuple[float, float] | None) -> float:
        """Learning rate of a parameter.

        Args:
            norms: of weight and gradient, if the rule uses them.
        """
        group = self.groups[index]
        lr *= group.lr_factor
        if norms is None or self.parameters[index].ndim < 2:
            return lr
        return lr * self.rule.trust_ratio(*norms, group.decay)


class HostOptimizer(_OptimizerBase):
    """Updates the parameters' own memory, for CPU: there asnumpy() is that memory, and writable.

    A graph of element-wise operations costs about 10 ms per parameter there (benchmarks/README.md).
    Gradients are arrays.
    """

    def __call__(
        self,
        lr: float,
        gradients: Sequence[np.ndarray],
        loss_scale: float = 1.0,
        arrivals: Iterable[int] | None = None,
    ) -> int | None:
        if arrivals is None:
            arrivals = range(len(gradients))
        if loss_scale != 1.0:
            arrivals = list(arrivals)
            for gradient in gradients:
                gradient *= np.float32(1 / loss_scale)
            nonfinite = next((i for i, g in enumerate(gradients) if not _is_finite(g)), None)
            if nonfinite is not None:
                return nonfinite
        scalars = [tuple(map(np.float32, part)) for part in self._count_update()]
        # Fetch the buffers at every update: loading a parameter replaces its buffer.
        weights = [p.asnumpy() for p in self.parameters]
        nonfinite_indices: list[int] = []
        for index in arrivals:
            weight, gradient = weights[index], gradients[index]
            group = self.groups[index]
            if self._is_frozen(index):
                is_finite = _is_finite(gradient)
            else:
                norms = None
                if self._uses_norms:
                    norms = float(np.linalg.norm(weight)), float(np.linalg.norm(gradient))
                is_finite = self._update(
                    weight.reshape(-1),
                    gradient.reshape(-1),
                    [state.asnumpy().reshape(-1) for state in self.states[index]],
                    np.float32(self._lr_of(lr, index, norms)),
                    group.decay,
                    scalars[group.in_classifier],
                )
            if not is_finite:
                nonfinite_indices.append(index)
        return min(nonfinite_indices, default=None)

    def _update(
        self,
        weight: np.ndarray,
        gradient: np.ndarray,
        states: list[np.ndarray],
        lr: np.float32,
        decay: float,
        scalars: tuple[np.float32, ...],
    ) -> bool:
        """Returns whether the gradient is finite; cheap while a chunk is in the cache."""
        finite = True
        for start in range(0, weight.size, _CHUNK):
            part = slice(start, start + _CHUNK)
            finite = finite and _is_finite(gradient[part])
            state_parts = tuple(state[part] for state in states)
            weight[part], new_states = self.rule.update(
                weight[part], gradient[part], state_parts, lr, decay, scalars
            )
            for state, new in zip(state_parts, new_states):
                state[...] = new
        return finite


class DeviceOptimizer(_OptimizerBase):
    """Updates in a graph, for GPU and Ascend. Only flags and norms travel to the host.

    Gradients are tensors.
    """

    def __init__(self, parameters: Sequence[Parameter], rule: UpdateRule, config: Config) -> None:
        super().__init__(parameters, rule, config)
        self._survey = _Survey(self.parameters, self._uses_norms)
        self._graph = _UpdateGraph(self.parameters, self.states, rule, self.groups)

    def __call__(
        self,
        lr: float,
        gradients: Sequence[Tensor],
        loss_scale: float = 1.0,
        arrivals: Iterable[int] | None = None,
    ) -> int | None:
        finite, norms = (tensor.asnumpy() for tensor in self._survey(*gradients))
        if not finite.all():
            return int(finite.argmin())
        scalars = [(*part, 1 / loss_scale) for part in self._count_update()]
        indices = range(len(self.parameters))
        unscaled: list[tuple[float, float] | None] = [None for _ in indices]
        if self._uses_norms:
            unscaled = [(float(w), float(g) / loss_scale) for w, g in norms.T]
        rates = [self._lr_of(lr, index, unscaled[index]) for index in indices]
        trained = [not self._is_frozen(index) for index in indices]
        self._graph(
            Tensor(rates, mindspore.float32),
            Tensor(trained, mindspore.bool_),
            Tensor(scalars, mindspore.float32),
            *gradients,
        )
        return None


class _Survey(nn.Cell):
    """Gradients -> (whether each is finite (n,), norms of weights and gradients (2, n)).

    Without ``norms`` the second is zeros (2, 1).
    """

    def __init__(self, parameters: Sequence[Parameter], norms: bool) -> None:
        super().__init__(auto_prefix=False)
        self.parameters, self.norms = ParameterTuple(parameters), norms
        # Not a loop: to the compiler each turn is a function call, and it allows 1000 nested ones.
        self.map = ops.Map()

    def construct(self, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        finite = ops.stack(self.map(_all_finite, gradients))
        if not self.norms:
            return finite, ops.zeros((2, 1), mindspore.float32)
        weight_norms = ops.stack(self.map(_norm, self.parameters))
        return finite, ops.stack((weight_norms, ops.stack(self.map(_norm, gradients))))


class _UpdateGraph(nn.Cell):
    """Updates weights and states. Its result is unused.

    Takes learning rates (n,), which parameters are trained (n,), the rule's scalars and 1 / loss
    scale for backbone and classifier (2, k), and the gradients. The gradients are separate
    arguments, because a graph is compiled again for every new tuple of tensors.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        states: Sequence[tuple[Parameter, ...]],
        rule: UpdateRule,
        groups: Sequence[ParamGroup],
    ) -> None:
        super().__init__(auto_prefix=False)
        self.parameters = ParameterTuple(parameters)
        self.decays = tuple(group.decay for group in groups)
        self.parts = tuple(int(group.in_classifier) for group in groups)
        self.states = [ParameterTuple(slot) for slot in zip(*states)]
        self.map, self.rule_update = ops.Map(), rule.update

    def construct(
        self, rates: Tensor, trained: Tensor, scalars: Tensor, *gradients: Tensor
    ) -> Tensor:
        self.map(
            ops.partial(self._update, scalars),
            ops.unstack(rates),
            ops.unstack(trained),
            self.decays,
            self.parts,
            self.parameters,
            gradients,
            *self.states,
        )
        return rates

    def _update(
        self,
        scalars: Tensor,
        lr: Tensor,
        trained: Tensor,
        decay: float,
        part: int,
        parameter: Parameter,
        gradient: Tensor,
        *states: Parameter,
    ) -> bool:
        scalars = scalars[part]
        gradient = ops.cast(gradient, mindspore.float32) * scalars[-1]
        weight, new_states = self.rule_update(parameter, gradient, states, lr, decay, scalars)
        ops.assign(parameter, ops.where(trained, weight, parameter))
        for slot in range(len(states)):
            ops.assign(states[slot], ops.where(trained, new_states[slot], states[slot]))
        return True


def create_optimizer(config: Config, parameters: Sequence[Parameter]) -> Optimizer:
    """The optimizer that the key ``optimizer`` describes, for the device of ``config``.

    Raises:
        UserError: for an unknown optimizer or a wrong argument.
    """
    kind = HostOptimizer if config.device_target == "CPU" else DeviceOptimizer
    return kind(parameters, create_update_rule(config), config)


def is_bias(name: str) -> bool:
    """True for biases and batch-norm offsets; PyTorch calls both bias."""
    return name.rpartition(".")[2] in ("bias", "beta")


def _all_finite(gradient: Tensor) -> Tensor:
    return ops.isfinite(ops.cast(gradient, mindspore.float32)).all()


def _norm(tensor: Tensor) -> Tensor:
    return ops.sqrt(ops.square(ops.cast(tensor, mindspore.float32)).sum())


def _param_group(parameter: Parameter, config: Config) -> ParamGroup:
    in_classifier = is_classifier(parameter.name)
    lr_factor = 1.0 if in_classifier else config.backbone_lr_factor
    if is_bias(parameter.name):
        lr_factor *= config.bias_lr_factor
    decays = config.decay_norm_and_bias or parameter.ndim > 1
    return ParamGroup(config.weight_decay if decays else 0.0, lr_factor, in_classifier)


def _zeros_like(parameter: Parameter, state: str) -> Parameter:
    return Parameter(
        Tensor(np.zeros(parameter.shape, np.float32)),
        name=f"{OPTIMIZER_PREFIX}{state}.{parameter.name}",
        requires_grad=False,
    )


def _is_finite(array: np.ndarray) -> bool:
    # The sum can overflow although every element is finite, so then check the elements.
    return bool(np.isfinite(array.sum()) or np.isfinite(array).all())
