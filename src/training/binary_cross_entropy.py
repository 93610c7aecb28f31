"""Binary cross-entropy of every class (Wightman et al., arXiv:2110.00476, section 3)."""

from typing import Annotated

import pydantic
from mindspore import Tensor, nn, ops

from src.cli.config import Config
from src.training.cross_entropy import one_hot
from src.utils.errors import UserError


class BinaryCrossEntropy(nn.Cell):
    """(logits (N, C) float32, targets) -> mean over images and classes, a float32 scalar.

    Each class is a problem of its own, so that an image mixed from two classes can belong to both.

    Args:
        smoothing: e in the targets (1 - e) * target + e / C.
        threshold: targets above it become 1, the others 0; None keeps them as they are. With a
            threshold, every class that has a large enough part of a mixed image counts fully, as in
            the paper.
    """

    def __init__(self, smoothing: float, threshold: float | None = None) -> None:
        super().__init__(auto_prefix=False)
        self.smoothing, self.threshold = smoothing, threshold

    @classmethod
    @pydantic.validate_call(config=pydantic.ConfigDict(arbitrary_types_allowed=True))
    def of(
        cls, config: Config, threshold: Annotated[float, pydantic.Field(ge=0, lt=1)] | None = None
    ) -> nn.Cell:
        off = config.smoothing / config.num_classes if config.num_classes else 0.0
        on = 1 - config.smoothing + off
        if threshold is not None and not off <= threshold < on:
            raise UserError(
                f"loss=binary_cross_entropy(threshold={threshold:g}): with smoothed labels the "
                f"targets are {off:.3g} and {on:.3g}, so every class would be "
                f"{'right' if threshold < off else 'wrong'}; choose a threshold between them"
            )
        return cls(config.smoothing, threshold)

    def construct(self, logits: Tensor, targets: Tensor) -> Tensor:
        classes = logits.shape[1]
        if targets.ndim == 1:
            targets = one_hot(targets, classes)
        targets = (1 - self.smoothing) * targets + self.smoothing / classes
        if self.threshold is not None:
            targets = (targets > self.threshold).astype(logits.dtype)
        # log(1 + exp(x)) - target * x, without overflow.
        softplus = ops.relu(logits) + ops.log(1 + ops.exp(-ops.abs(logits)))
        return (softplus - targets * logits).mean()
