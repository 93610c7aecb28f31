"""Momentum SGD with the learning rate as an argument of every step.

Both forms compute PyTorch's SGD (dampening 0): v <- momentum v + (g + weight_decay w); w <- w - lr v, where weight decay
goes through the momentum.
"""

from dataclasses import dataclass

import mindspore
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from src.models.formats import MOMENTUM_PREFIX

# Elements updated at a time: few enough that the four arrays of a chunk stay in a core's cache.
_CHUNK = 1 << 16


@dataclass(frozen=True)
class ParameterRule:
    """Weight decay and learning-rate factor of one parameter."""

    decay: float
    lr_factor: float


class HostMomentum:
    """The update on the parameters' own memory, for CPU, where asnumpy() of a parameter is its memory and writable.

    A graph of ApplyMomentum operations costs about 10 ms a parameter there (benchmarks/README.md).

    Attributes:
        velocities: Parameters named ``momentum.NAME``, zero at first.
    """

    def __init__(self, parameters, rules, momentum):
        self._parameters = parameters
        self.velocities = zero_velocities(parameters)
        self._rules, self._momentum = rules, np.float32(momentum)
        self._scratch = np.empty(_CHUNK, np.float32)

    def __call__(self, lr, gradients):
        """Update with learning rate ``lr`` from arrays ``gradients``, in the parameters' order.

        Returns:
            Index of the first parameter whose gradient is not finite, or None.
        """
        wrong = []
        # The memory is asked for at every step: a parameter that was loaded since has another.
        members = zip(self._parameters, self.velocities, gradients, self._rules)
        for index, (parameter, velocity, gradient, rule) in enumerate(members):
            finite = self._update(parameter.asnumpy().reshape(-1), velocity.asnumpy().reshape(-1), gradient.reshape(-1),
                                  np.float32(rule.decay), np.float32(lr * rule.lr_factor))
            if not finite:
                wrong.append(index)
        return wrong[0] if wrong else None

    def _update(self, weight, velocity, gradient, decay, lr):
        """Returns whether the gradient is finite, which costs little while a chunk is in the cache."""
        finite = True
        for start in range(0, weight.size, _CHUNK):
            part = slice(start, start + _CHUNK)
            w, v, g = weight[part], velocity[part], gradient[part]
            scratch = self._scratch[:w.size]
            # A sum of finite numbers may overflow, so that only a closer look convicts.
            if not np.isfinite(g.sum()) and not np.isfinite(g).all():
                finite = False
            v *= self._momentum
            if decay:
                np.multiply(w, decay, out=scratch)
                # Into the scratch, which stays in the cache, and not into the gradient.
                scratch += g
                v += scratch
            else:
                v += g
            np.multiply(v, lr, out=scratch)
            w -= scratch
        return finite


class DeviceMomentum(nn.Cell):
    """The update as part of a graph, for GPU and Ascend. Call with lr, a float32 scalar, and the tuple of gradients."""

    def __init__(self, parameters, rules, momentum):
        super().__init__(auto_prefix=False)
        self.parameters = ParameterTuple(parameters)
        self.velocities = ParameterTuple(zero_velocities(parameters))
        self.rules = tuple((rule.decay, rule.lr_factor) for rule in rules)
        self.momentum = momentum
        self.apply_momentum = ops.ApplyMomentum()

    def construct(self, lr, gradients):
        for index in range(len(self.rules)):
            decay, lr_factor = self.rules[index]
            gradient = gradients[index]
            if decay > 0:
                gradient = gradient + decay * self.parameters[index]
            self.apply_momentum(self.parameters[index], self.velocities[index], lr * lr_factor, gradient, self.momentum)
        return lr


def parameter_rules(parameters, config):
    """A ParameterRule for each parameter by the keys weight_decay, decay_norm_and_bias and bias_lr_factor."""
    return [ParameterRule(config.weight_decay if config.decay_norm_and_bias or p.ndim > 1 else 0.0,
                          config.bias_lr_factor if is_bias(p.name) else 1.0) for p in parameters]


def zero_velocities(parameters):
    return [Parameter(Tensor(np.zeros(p.shape, np.float32)), name=f"{MOMENTUM_PREFIX}{p.name}", requires_grad=False)
            for p in parameters]


def is_bias(name):
    """True for biases and batch-norm offsets, both of which PyTorch calls bias."""
    return name.rpartition(".")[2] in ("bias", "beta")


def scalar(value):
    """A float32 scalar Tensor."""
    return Tensor(value, mindspore.float32)
