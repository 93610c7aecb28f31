"""Gradients as forward convolutions: those of MindSpore's own kernels."""

import mindspore
import numpy as np
import pytest
from mindspore import Tensor, nn

from src.training.create_step import replace_conv_gradients


@pytest.mark.parametrize(
    "kernel,padding,dilation,groups,replaced",
    [
        (1, 0, 1, 1, True),
        (1, 0, 1, 3, True),
        (3, 1, 1, 3, True),
        (3, 0, 1, 6, True),
        (3, 2, 2, 2, True),
        (5, 2, 1, 6, True),
        ((1, 3), (0, 0, 1, 1), 1, 2, True),
        ((5, 1), (1, 1, 0, 0), 1, 3, True),
        (3, 1, 1, 1, False),
        (1, 1, 1, 1, False),
    ],
)
def test_gradients_are_the_same(kernel, padding, dilation, groups, replaced):
    def make():
        mindspore.set_seed(0)
        return Twice()

    class Twice(nn.Cell):
        """Two convolutions, so that the gradient of the second's input matters."""

        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(4, 6, 1)
            self.second = nn.Conv2d(
                6, 12, kernel, pad_mode="pad", padding=padding, dilation=dilation, group=groups
            )

        def construct(self, x):
            return (self.second(self.first(x)) ** 2).sum()

    x = Tensor(np.random.default_rng(0).normal(size=(2, 4, 7, 9)).astype(np.float32))
    results = []
    for changed in (False, True):
        # A network of its own, or MindSpore would take the graph that it has.
        network = make()
        if changed:
            before = network.second.conv2d
            replace_conv_gradients(network)
            assert (network.second.conv2d is not before) == replaced and len(
                list(network.get_parameters())
            ) == 2
        loss, gradients = mindspore.value_and_grad(network, 0, network.trainable_params())(x)
        results.append(
            [
                loss.asnumpy(),
                gradients[0].asnumpy(),
                *(gradient.asnumpy() for gradient in gradients[1]),
            ]
        )
    for ours, theirs in zip(*results):
        assert np.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())
