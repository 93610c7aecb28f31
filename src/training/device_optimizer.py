"""Optimizers for GPU and Ascend: an update of flat arrays, as part of the training step's graph.

Parameters that are updated in the same way form a group. The gradients and each optimizer state of
a group are one flat array, so that an update takes a handful of kernels for any number of
parameters.
"""

from collections.abc import Sequence
from dataclasses import replace

import mindspore
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from src.cli.config import Config
from src.training.optimizers import OptimizerBase, ParamGroup
from src.training.update_rules import UpdateRule


class DeviceOptimizer(OptimizerBase):
    """Parameters in groups, and the update of the groups as a Cell.

    Attributes:
        members: the parameters of each group.
        flat_states: the state arrays of each group, flat, as the update changes them.
    """

    def __init__(self, parameters: Sequence[Parameter], rule: UpdateRule, config: Config) -> None:
        super().__init__(parameters, rule, config)
        # Only with frozen epochs does it matter which parameters are the classifier's.
        freezes = config.freeze_epochs > 0
        kinds = [replace(g, in_classifier=g.in_classifier and freezes) for g in self.groups]
        self._kinds = list(dict.fromkeys(kinds))
        self._indices = [
            [index for index, kind in enumerate(kinds) if kind == wanted] for wanted in self._kinds
        ]
        self.members = [[self.parameters[i] for i in indices] for indices in self._indices]
        self.flat_states = [
            tuple(_zeros(members, f"flat.{state}.{number}") for state in rule.state_names)
            for number, members in enumerate(self.members)
        ]

    def create_update(self, collective: nn.Cell | None = None) -> "FlatUpdate":
        """The update of all groups. ``collective``: a flat gradient -> its mean over ranks."""
        groups = [
            _GroupUpdate(members, states, self.rule, kind, self._uses_norms)
            for members, states, kind in zip(self.members, self.flat_states, self._kinds)
        ]
        return FlatUpdate(groups, collective)

    def settings(self, lr: float, loss_scale: float) -> Tensor:
        """The numbers that ``FlatUpdate`` takes for the next update."""
        backbone, classifier = self._next_scalars()
        values = [1 / loss_scale]
        for kind in self._kinds:
            trained = kind.in_classifier or not self.backbone_frozen
            scalars = classifier if kind.in_classifier else backbone
            values += [lr * kind.lr_factor, float(trained), *scalars]
        return Tensor(np.array(values, np.float32))

    def store_states(self) -> None:
        """Copy the flat arrays to ``state_parameters``."""
        for indices, flats in zip(self._indices, self.flat_states):
            for slot, flat in enumerate(flats):
                parts = np.split(flat.asnumpy(), self._bounds(indices)[1:-1])
                for index, part in zip(indices, parts):
                    state = self.states[index][slot]
                    state.set_data(Tensor(part.reshape(state.shape)))

    def load_states(self) -> None:
        """Copy ``state_parameters``, which were restored, to the flat arrays."""
        for indices, flats in zip(self._indices, self.flat_states):
            for slot, flat in enumerate(flats):
                parts = [self.states[index][slot].asnumpy().ravel() for index in indices]
                flat.set_data(Tensor(np.concatenate(parts)))

    def first_nonfinite(self, flats: Sequence[np.ndarray]) -> int | None:
        """Index of the first parameter whose part of the flat gradients is not finite, or None."""
        nonfinite = [
            index
            for indices, flat in zip(self._indices, flats)
            for index, part in zip(indices, np.split(flat, self._bounds(indices)[1:-1]))
            if not np.isfinite(part).all()
        ]
        return min(nonfinite, default=None)

    def _bounds(self, indices: Sequence[int]) -> np.ndarray:
        return np.cumsum([0, *(self.parameters[index].size for index in indices)])


class FlatUpdate(nn.Cell):
    """(settings, flat gradient of each group, times the loss scale) -> whether all are finite.

    Updates parameters and states if all gradients are finite, and nothing otherwise.

    Args:
        collective: makes an array its mean over ranks; None on one rank.
    """

    def __init__(self, groups: Sequence["_GroupUpdate"], collective: nn.Cell | None) -> None:
        super().__init__(auto_prefix=False)
        self.groups, self.collective = nn.CellList(groups, auto_prefix=False), collective
        self.map = ops.Map()
        # Per group: learning rate, whether it is trained, and the rule's numbers.
        self.count = groups[0].settings
        self.sizes = tuple(group.size for group in groups)
        self.starts = tuple(np.cumsum([0, *self.sizes[:-1]]).tolist())

    def construct(self, settings: Tensor, *gradients: Tensor) -> Tensor:
        numbers = ops.unstack(settings)
        if self.collective is not None:
            # One for all groups: MindSpore 2.10 fails with two in a graph ("send_actor is null").
            whole = self.collective(ops.concat(gradients))
            gradients = self.map(ops.partial(_slice, whole), self.starts, self.sizes)
        finite = ops.stack(self.map(_is_finite, gradients)).all()
        for index in range(len(gradients)):
            start = 1 + index * self.count
            group = self.groups[index]
            group(finite, numbers[0], numbers[start : start + self.count], gradients[index])
        return finite


class _GroupUpdate(nn.Cell):
    """(may update, 1 / loss scale, settings of the group, flat gradient) -> True."""

    def __init__(
        self,
        members: Sequence[Parameter],
        states: tuple[Parameter, ...],
        rule: UpdateRule,
        kind: ParamGroup,
        uses_norms: bool,
    ) -> None:
        super().__init__(auto_prefix=False)
        self.members, self.states = ParameterTuple(members), ParameterTuple(states)
        sizes = [int(parameter.size) for parameter in members]
        self.size = sum(sizes)
        self.offsets = tuple(np.cumsum([0, *sizes[:-1]]).tolist())
        self.rule_update, self.trust_ratio = rule.update, rule.trust_ratio
        self.decay = kind.decay
        self.has_norms = uses_norms and any(parameter.ndim > 1 for parameter in members)
        self.settings = 2 + len(rule.scalars(1))
        self.map = ops.Map()
        if self.has_norms:
            self.is_layer = tuple(parameter.ndim > 1 for parameter in members)
            self.member_of = Tensor(np.repeat(np.arange(len(members), dtype=np.int32), sizes))

    def construct(
        self, may_update: Tensor, inverse_scale: Tensor, settings: tuple, gradient: Tensor
    ) -> bool:
        lr, scalars = settings[0], settings[2:]
        may_update = ops.logical_and(may_update, settings[1] > 0)
        gradient = gradient * inverse_scale
        weight = ops.concat(self.map(_flattened, self.members))
        if self.has_norms:
            lr = lr * self._trust_ratios(gradient)
        updated, new_states = self.rule_update(
            weight, gradient, self.states, lr, self.decay, scalars
        )
        # A product with 0 would not do: gradients may be infinite.
        step = ops.where(may_update, weight - updated, ops.zeros_like(weight))
        for slot in range(len(self.states)):
            state = self.states[slot]
            ops.assign(state, ops.where(may_update, new_states[slot], state))
        self.map(ops.partial(_subtract_part, step), self.members, self.offsets)
        return True

    def _trust_ratios(self, gradient: Tensor) -> Tensor:
        """The trust ratio of each element's parameter; 1 for batch norms and biases."""
        ratios = self.map(
            ops.partial(self._trust_ratio, gradient), self.is_layer, self.members, self.offsets
        )
        return ops.gather(ops.stack(ratios), self.member_of, 0)

    def _trust_ratio(
        self, gradient: Tensor, is_layer: bool, weight: Parameter, offset: int
    ) -> Tensor:
        one = Tensor(1.0, mindspore.float32)
        if not is_layer:
            return one
        weight_norm, gradient_norm = _norm(weight), _norm(_part(gradient, weight, offset))
        has_ratio = ops.logical_and(weight_norm > 0, gradient_norm > 0)
        return ops.where(has_ratio, self.trust_ratio(weight_norm, gradient_norm, self.decay), one)


def flat_gradient(gradients: Sequence[Tensor]) -> Tensor:
    """The gradients of a group as one flat float32 array; part of a graph."""
    return ops.concat(ops.Map()(_flattened, gradients))


def _flattened(tensor: Tensor) -> Tensor:
    return ops.cast(tensor, mindspore.float32).reshape((-1,))


def _is_finite(gradient: Tensor) -> Tensor:
    return ops.isfinite(gradient).all()


def _part(flat: Tensor, parameter: Parameter, offset: int) -> Tensor:
    """The part of a flat array that belongs to a parameter, in its shape."""
    # Not one split of the whole: the compiler's limit is 1000 nested calls, and a split into 400
    # parts exceeds it.
    return _slice(flat, offset, parameter.size).reshape(parameter.shape)


def _slice(flat: Tensor, start: int, size: int) -> Tensor:
    return ops.slice(flat, (start,), (size,))


def _subtract_part(step: Tensor, parameter: Parameter, offset: int) -> Tensor:
    return ops.assign_sub(parameter, _part(step, parameter, offset))


def _norm(tensor: Tensor) -> Tensor:
    return ops.sqrt(ops.square(tensor).sum())


def _zeros(members: Sequence[Parameter], name: str) -> Parameter:
    size = sum(parameter.size for parameter in members)
    return Parameter(Tensor(np.zeros(size, np.float32)), name=name, requires_grad=False)
