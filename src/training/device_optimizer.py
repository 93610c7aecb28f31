"""Optimizers for GPU and Ascend: an update of flat arrays, as part of the training step's graph.

Parameters that are updated in the same way form a group. The weights of a group, their gradients
and each optimizer state are one flat array, so that an update takes a handful of kernels for any
number of parameters. What remains for each parameter is to subtract its part of the step.
Parameters of the same size are adjacent, because MindSpore can only split an array into equal
parts.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

import mindspore
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from src.cli.config import Config
from src.training.optimizers import CLIP_EPSILON, OptimizerBase, ParamGroup
from src.training.update_rules import UpdateRule

# The compiler allows 1000 nested calls, and needs several for each part of a split.
_MAX_PARTS = 100


class DeviceOptimizer(OptimizerBase):
    """Parameters in groups, and the update of the groups as a Cell.

    Attributes:
        members: the parameters of each group, in the order of the flat arrays: those of several
            dimensions first, and those of one size together.
        flat_weights: the members of each group as a flat array. The update changes both.
        flat_states: the state arrays of each group, flat, as the update changes them.
    """

    def __init__(self, parameters: Sequence[Parameter], rule: UpdateRule, config: Config) -> None:
        super().__init__(parameters, rule, config)
        # Only with frozen epochs does it matter which parameters are the classifier's.
        freezes = config.freeze_epochs > 0
        kinds = [replace(g, in_classifier=g.in_classifier and freezes) for g in self.groups]
        self._kinds = list(dict.fromkeys(kinds))
        in_order = sorted(range(len(kinds)), key=lambda index: _rank_and_size(parameters[index]))
        self._indices = [[i for i in in_order if kinds[i] == wanted] for wanted in self._kinds]
        self.members = [[self.parameters[i] for i in indices] for indices in self._indices]
        self.flat_weights = [
            Parameter(_flat(members), name=f"flat.weight.{number}", requires_grad=False)
            for number, members in enumerate(self.members)
        ]
        self.flat_states = [
            tuple(_zeros(members, f"flat.{state}.{number}") for state in rule.state_names)
            for number, members in enumerate(self.members)
        ]

    def create_update(self, collective: nn.Cell | None = None) -> "FlatUpdate":
        """The update of all groups. ``collective``: a flat gradient -> its mean over ranks."""
        groups = [
            _GroupUpdate(members, weight, states, self.rule, kind, self._uses_norms)
            for members, weight, states, kind in zip(
                self.members, self.flat_weights, self.flat_states, self._kinds
            )
        ]
        return FlatUpdate(groups, collective, self._clip_norm)

    def settings(self, lr: float, loss_scale: float) -> Tensor:
        """The scalar inputs of ``FlatUpdate`` for the next update."""
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

    def load(self) -> None:
        """Copy restored parameters and ``state_parameters`` into the flat arrays."""
        for members, weight in zip(self.members, self.flat_weights):
            weight.set_data(_flat(members))
        for indices, flats in zip(self._indices, self.flat_states):
            for slot, flat in enumerate(flats):
                flat.set_data(_flat([self.states[index][slot] for index in indices]))

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
        clip_norm: largest norm of the gradient, 0 for no limit (see ``HostOptimizer``).
    """

    def __init__(
        self, groups: Sequence["_GroupUpdate"], collective: nn.Cell | None, clip_norm: float
    ) -> None:
        super().__init__(auto_prefix=False)
        self.clip_norm, self.one = clip_norm, Tensor(1.0, mindspore.float32)
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
        inverse_scale = numbers[0]
        if self.clip_norm > 0:
            norm = self._norm(numbers, gradients)
            finite = ops.logical_and(finite, ops.isfinite(norm))
            factor = ops.minimum(self.clip_norm / (norm + CLIP_EPSILON), self.one)
            inverse_scale = inverse_scale * factor
        for index in range(len(gradients)):
            start = 1 + index * self.count
            group = self.groups[index]
            group(finite, inverse_scale, numbers[start : start + self.count], gradients[index])
        return finite

    def _norm(self, numbers: tuple, gradients: tuple) -> Tensor:
        """The norm of the gradient of all groups that are trained."""
        total = 0.0
        for index in range(len(gradients)):
            # The second setting of a group: whether it is trained.
            total = total + numbers[2 + index * self.count] * _square_sum(gradients[index])
        return ops.sqrt(total) * numbers[0]


class _GroupUpdate(nn.Cell):
    """(may update, 1 / loss scale, settings of the group, flat gradient) -> True."""

    def __init__(
        self,
        members: Sequence[Parameter],
        weight: Parameter,
        states: tuple[Parameter, ...],
        rule: UpdateRule,
        kind: ParamGroup,
        uses_norms: bool,
    ) -> None:
        super().__init__(auto_prefix=False)
        self.weight, self.states = weight, ParameterTuple(states)
        self.size = int(weight.size)
        self.rule_update, self.trust_ratio = rule.update, rule.trust_ratio
        self.decay = kind.decay
        self.has_norms = uses_norms and any(parameter.ndim > 1 for parameter in members)
        self.settings = 2 + len(rule.scalars(1))
        runs = _runs(members)
        starts = np.cumsum([0, *(sum(member.size for member in run) for run in runs)]).tolist()
        self.runs = nn.CellList(list(map(_Run, runs, starts)), auto_prefix=False)
        if self.has_norms:
            sizes = [parameter.size for parameter in members]
            self.is_layer = Tensor(np.array([parameter.ndim > 1 for parameter in members]))
            self.member_of = Tensor(np.repeat(np.arange(len(members), dtype=np.int32), sizes))

    def construct(
        self, may_update: Tensor, inverse_scale: Tensor, settings: tuple, gradient: Tensor
    ) -> bool:
        lr, scalars = settings[0], settings[2:]
        may_update = ops.logical_and(may_update, settings[1] > 0)
        gradient = gradient * inverse_scale
        if self.has_norms:
            lr = lr * self._trust_ratios(gradient)
        updated, new_states = self.rule_update(
            self.weight, gradient, self.states, lr, self.decay, scalars
        )
        # Multiplying by 0 would not do: 0 times an infinite gradient is NaN.
        step = ops.where(may_update, self.weight - updated, ops.zeros_like(gradient))
        for slot in range(len(self.states)):
            state = self.states[slot]
            ops.assign(state, ops.where(may_update, new_states[slot], state))
        ops.assign_sub(self.weight, step)
        for run in self.runs:
            run(step)
        return True

    def _trust_ratios(self, gradient: Tensor) -> Tensor:
        """The trust ratio of each element's parameter; 1 for batch norms and biases."""
        weight_norms, gradient_norms = self._norms(self.weight), self._norms(gradient)
        has_ratio = ops.logical_and(weight_norms > 0, gradient_norms > 0)
        has_ratio = ops.logical_and(has_ratio, self.is_layer)
        ratios = self.trust_ratio(weight_norms, gradient_norms, self.decay)
        ratios = ops.where(has_ratio, ratios, ops.ones_like(weight_norms))
        return ops.gather(ratios, self.member_of, 0)

    def _norms(self, flat: Tensor) -> Tensor:
        """(members,): the Euclidean norm of each one's part of a flat array."""
        squares = ops.square(flat)
        sums: tuple[Tensor, ...] = ()
        for run in self.runs:
            sums = (*sums, run.sums(squares))
        return ops.sqrt(ops.concat(sums))


class _Run(nn.Cell):
    """Flat step of the group -> True. Subtracts it from ``members``, parameters of one size.

    Args:
        start: index of their first element in the flat arrays.
    """

    def __init__(self, members: Sequence[Parameter], start: int) -> None:
        super().__init__(auto_prefix=False)
        self.members, self.start = ParameterTuple(members), start
        self.count, self.size = len(members), int(members[0].size)
        self.map, self.split = ops.Map(), ops.Split(0, self.count)

    def construct(self, step: Tensor) -> bool:
        part = _slice(step, self.start, self.count * self.size)
        if self.count == 1:
            _subtract(self.members[0], part)
        else:
            self.map(_subtract, self.members, self.split(part))
        return True

    def sums(self, flat: Tensor) -> Tensor:
        """(members,): the sum of each one's part of a flat array."""
        part = _slice(flat, self.start, self.count * self.size)
        return part.reshape((self.count, self.size)).sum(1)


def flat_gradient(gradients: Sequence[Tensor]) -> Tensor:
    """The gradients of a group as one flat float32 array; part of a graph."""
    return ops.concat(ops.Map()(_flattened, gradients))


def _flattened(tensor: Tensor) -> Tensor:
    return ops.cast(tensor, mindspore.float32).reshape((-1,))


def _is_finite(gradient: Tensor) -> Tensor:
    return ops.isfinite(gradient).all()


def _square_sum(gradient: Tensor) -> Tensor:
    return ops.square(gradient).sum()


def _slice(flat: Tensor, start: int, size: int) -> Tensor:
    return ops.slice(flat, (start,), (size,))


def _subtract(parameter: Parameter, step: Tensor) -> Tensor:
    return ops.assign_sub(parameter, step.reshape(parameter.shape))


def _rank_and_size(parameter: Parameter) -> tuple[bool, int]:
    return parameter.ndim < 2, parameter.size


def _runs(members: Sequence[Parameter]) -> list[list[Parameter]]:
    """The members in runs of one size, at most _MAX_PARTS each."""
    runs = []
    for _, found in groupby(members, _rank_and_size):
        run = list(found)
        runs += [run[i : i + _MAX_PARTS] for i in range(0, len(run), _MAX_PARTS)]
    return runs


def _flat(parameters: Sequence[Parameter]) -> Tensor:
    return Tensor(np.concatenate([parameter.asnumpy().ravel() for parameter in parameters]))


def _zeros(members: Sequence[Parameter], name: str) -> Parameter:
    size = sum(parameter.size for parameter in members)
    return Parameter(Tensor(np.zeros(size, np.float32)), name=name, requires_grad=False)
