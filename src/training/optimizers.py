"""Optimizers: an update rule applied to parameters, here on the host."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from mindspore import Parameter, Tensor

from src.cli.config import Config
from src.models.weight_files import OPTIMIZER_PREFIX
from src.models.weights import is_classifier
from src.training.update_rules import UpdateRule

# Elements updated at a time: few enough that the arrays of a chunk stay in a core's cache.
_CHUNK = 1 << 16
# The layer that a parameter belongs to: "layer2.0.conv1.weight" -> "layer2.0".
_LAYER = re.compile(r"\w+(\.[a-z]*\d+(?=\.))?")
# What PyTorch's clip_grad_norm_ adds to the norm.
CLIP_EPSILON = 1e-6


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


class OptimizerBase:
    """State, groups and learning rates, for every device.

    Attributes:
        backbone_frozen: while True, only the classifier and its optimizer state are updated.
        states: the state arrays of each parameter, in the order of ``rule.state_names``.
        groups: how each parameter is updated.
    """

    def __init__(self, parameters: Sequence[Parameter], rule: UpdateRule, config: Config) -> None:
        self.parameters, self.rule = list(parameters), rule
        self.states = [tuple(_zeros_like(p, name) for name in rule.state_names) for p in parameters]
        factors = layer_factors([p.name for p in parameters], config.layer_decay)
        self.groups = [_param_group(p, config, factors[p.name]) for p in parameters]
        self.backbone_frozen = False
        self._clip_norm = config.clip_norm
        self._updates = self._frozen_updates = 0
        self._uses_norms = type(rule).trust_ratio is not UpdateRule.trust_ratio

    @property
    def state_parameters(self) -> list[Parameter]:
        """The optimizer's state, named ``optimizer.STATE.NAME``."""
        return [state for states in self.states for state in states]

    def counters(self) -> dict[str, int]:
        """The rest of the state that a resumed run needs."""
        return {"updates": self._updates, "frozen_updates": self._frozen_updates}

    def restore_counters(self, counters: dict[str, int]) -> None:
        """Restore what ``counters`` returned."""
        self._updates = counters["updates"]
        self._frozen_updates = counters.get("frozen_updates", 0)

    def _next_scalars(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The rule's scalars for backbone and classifier in the next update.

        The backbone has had fewer updates if it was frozen.
        """
        updates = self._updates + 1
        frozen_updates = self._frozen_updates + self.backbone_frozen
        return self.rule.scalars(max(updates - frozen_updates, 1)), self.rule.scalars(updates)

    def count_update(self) -> None:
        """Advance the counters on which the rule's scalars, such as bias correction, depend."""
        self._updates += 1
        self._frozen_updates += self.backbone_frozen

    @property
    def trained_indices(self) -> list[int]:
        """Indices of the parameters that the next update changes."""
        return [
            index
            for index, group in enumerate(self.groups)
            if group.in_classifier or not self.backbone_frozen
        ]

    def _lr_of(self, lr: float, index: int, norms: tuple[float, float] | None) -> float:
        """Learning rate of a parameter.

        Args:
            norms: of weight and gradient, if the rule uses them.
        """
        group = self.groups[index]
        lr *= group.lr_factor
        if norms is None or self.parameters[index].ndim < 2:
            return lr
        if not min(norms) > 0:
            return lr
        return lr * self.rule.trust_ratio(*norms, group.decay)


class HostOptimizer(OptimizerBase):
    """Updates the parameters' own memory, for CPU: there asnumpy() is that memory, and writable.

    A graph of element-wise operations costs about 10 ms per parameter there (benchmarks/README.md).
    Gradients are arrays.

    Args:
        of_rank_0: a number -> that of rank 0, on every rank.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        rule: UpdateRule,
        config: Config,
        of_rank_0: Callable[[float], float] = lambda number: number,
    ) -> None:
        super().__init__(parameters, rule, config)
        self._of_rank_0 = of_rank_0

    def __call__(
        self, lr: float, gradients: Sequence[np.ndarray], arrivals: Iterable[int] | None = None
    ) -> int | None:
        """Update with learning rate ``lr``.

        Args:
            gradients: one for each of ``trained_indices``, in their order.
            arrivals: positions of all gradients, in the order in which they may be read; None if
                all may be read at once.

        Returns:
            Index of the first parameter whose gradient is not finite, or None. The weights are
            then already corrupted.
        """
        if arrivals is None:
            arrivals = range(len(gradients))
        factor = np.float32(1)
        if self._clip_norm:
            arrivals = list(arrivals)
            # Ranks on other processors may round the norm differently.
            factor = np.float32(self._of_rank_0(self._clip_factor(gradients)))
        scalars = [tuple(map(np.float32, part)) for part in self._next_scalars()]
        self.count_update()
        indices = self.trained_indices
        # Fetch the buffers at every update: loading a parameter replaces its buffer.
        weights = [self.parameters[index].asnumpy() for index in indices]
        nonfinite_indices: list[int] = []
        for position in arrivals:
            index, weight, gradient = indices[position], weights[position], gradients[position]
            group = self.groups[index]
            norms = None
            if self._uses_norms:
                gradient_norm = float(np.linalg.norm(gradient) * factor)
                norms = float(np.linalg.norm(weight)), gradient_norm
            is_finite = self._update(
                weight.reshape(-1),
                gradient.reshape(-1),
                factor,
                [state.asnumpy().reshape(-1) for state in self.states[index]],
                np.float32(self._lr_of(lr, index, norms)),
                group.decay,
                scalars[group.in_classifier],
            )
            if not is_finite:
                nonfinite_indices.append(index)
        return min(nonfinite_indices, default=None)

    def _clip_factor(self, gradients: Sequence[np.ndarray]) -> float:
        """Factor that shortens the whole gradient to ``clip_norm``, at most 1.

        As in PyTorch's clip_grad_norm_. 1 if a gradient is not finite, which is reported later.
        """
        norm = math.sqrt(sum(map(_square_sum, gradients)))
        if not math.isfinite(norm):
            return 1.0
        return min(self._clip_norm / (norm + CLIP_EPSILON), 1.0)

    def _update(
        self,
        weight: np.ndarray,
        gradient: np.ndarray,
        factor: np.float32,
        states: list[np.ndarray],
        lr: np.float32,
        decay: float,
        scalars: tuple[np.float32, ...],
    ) -> bool:
        """Returns whether the gradient is finite; cheap while a chunk is in the cache."""
        finite = True
        for start in range(0, weight.size, _CHUNK):
            part = slice(start, start + _CHUNK)
            gradient_part = gradient[part] if factor == 1 else gradient[part] * factor
            finite = finite and _is_finite(gradient_part)
            state_parts = tuple(state[part] for state in states)
            weight[part], new_states = self.rule.update(
                weight[part], gradient_part, state_parts, lr, decay, scalars
            )
            for state, new in zip(state_parts, new_states):
                state[...] = new
        return finite


def _square_sum(array: np.ndarray) -> float:
    """In float64, whose range the squares of float32 numbers do not leave."""
    flat = array.reshape(-1)
    chunks = (flat[start : start + _CHUNK] for start in range(0, flat.size, _CHUNK))
    return sum(float(np.square(chunk, dtype=np.float64).sum()) for chunk in chunks)


def is_bias(name: str) -> bool:
    """True for biases and batch-norm offsets; PyTorch calls both bias."""
    return name.rpartition(".")[2] in ("bias", "beta")


def layer_factors(names: Sequence[str], decay: float) -> dict[str, float]:
    """{name: learning rate relative to that of the last layer} by layer-wise decay.

    Clark et al., arXiv:2003.10555, appendix A. A layer is what timm's ``param_groups_layer_decay``
    takes for one: a residual block, or a convolution with its batch norm outside of blocks.

    Args:
        names: of parameters, in the order of the network's layers.
        decay: the factor from each layer to the one before it.
    """
    layers = {name: _LAYER.match(name)[0] for name in names}  # type: ignore[index]
    order = list(dict.fromkeys(layers.values()))
    return {name: decay ** (len(order) - 1 - order.index(layer)) for name, layer in layers.items()}


def _param_group(parameter: Parameter, config: Config, layer_factor: float) -> ParamGroup:
    in_classifier = is_classifier(parameter.name)
    lr_factor = layer_factor * (1.0 if in_classifier else config.backbone_lr_factor)
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
