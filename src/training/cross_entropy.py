"""Cross-entropy with label smoothing."""

from collections.abc import Sequence

import mindspore
import pydantic
from mindspore import Tensor, nn, ops

from src.cli.config import Config


class CrossEntropy(nn.Cell):
    """(logits (N, C) float32, targets) -> mean cross-entropy, a float32 scalar.

    Smoothing e spreads its mass over all classes (Szegedy et al., arXiv:1512.00567, section 7), as
    in PyTorch: (1 - e) * (-log p[label]) + e * mean over classes of (-log p). ``Config.smoothing``
    converts a fraction for the other classes into such an e.

    Args:
        class_weights: C factors on the terms of the classes, or None. The mean is over images, not
            over weights as in PyTorch: so it does not depend on how a batch is spread over ranks.
    """

    def __init__(self, smoothing: float, class_weights: Sequence[float] | None = None) -> None:
        super().__init__(auto_prefix=False)
        self.smoothing = smoothing
        self.class_weights = (
            None if class_weights is None else Tensor(class_weights, mindspore.float32)
        )
        # Not nn.CrossEntropyLoss: it takes the logarithm separately, and its last bit on CPU
        # depends on where the memory lies. log_softmax's gradient is reference code in oneDNN.
        self.cross_entropy = ops.SparseSoftmaxCrossEntropyWithLogits()

    @classmethod
    @pydantic.validate_call(config=pydantic.ConfigDict(arbitrary_types_allowed=True))
    def of(cls, config: Config) -> nn.Cell:
        weights = config.class_weights
        return cls(config.smoothing, weights if isinstance(weights, list) else None)

    def construct(self, logits: Tensor, targets: Tensor) -> Tensor:
        classes = logits.shape[1]
        if targets.ndim == 1:
            targets = one_hot(targets, classes)
        targets = (1 - self.smoothing) * targets + self.smoothing / classes
        if self.class_weights is not None:
            return -(targets * self.class_weights * ops.log_softmax(logits, 1)).sum(1).mean()
        # -log p[c] = (-log p of the likeliest class) + (difference of the two logits); for the
        # likeliest class no exponential underflows.
        likeliest = logits.argmax(1).astype(mindspore.int32)
        differences = (one_hot(likeliest, classes) - targets) * logits
        return self.cross_entropy(logits, likeliest) + differences.sum(1).mean()


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """(N,) int32 -> (N, classes) float32."""
    on, off = Tensor(1.0, mindspore.float32), Tensor(0.0, mindspore.float32)
    return ops.one_hot(labels, classes, on, off)
