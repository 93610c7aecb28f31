"""The start and the end of a residual block: splitting and adding its branches."""

from mindspore import Tensor, nn


class AddRelu(nn.Cell):
    """(x, shortcut) -> relu(layer(x) + shortcut).

    Attributes:
        source: the layer. If it is a ReparamConv, it takes the shortcut and adds it itself.
    """

    def __init__(self, source: nn.Cell) -> None:
        super().__init__()
        self.source, self.relu = source, nn.ReLU()
        self.adds_inside = getattr(source, "adds_shortcut", False)

    def construct(self, x: Tensor, shortcut: Tensor) -> Tensor:
        if self.adds_inside:
            return self.relu(self.source(x, shortcut))
        return self.relu(self.source(x) + shortcut)


class SplitResidual(nn.Cell):
    """x -> (x, x), the inputs of the two branches of a residual block."""

    def construct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class SplitProjected(SplitResidual):
    """``SplitResidual`` for two branches that both compute: neither is a plain shortcut.

    The sum of the gradients is written as a difference. MindSpore's GPU backend would accumulate a
    sum in place, and in networks of basic blocks it then miscounts the references to that memory
    ("Invalid new ref count", docs/gpu.md).
    """

    def bprop(
        self, x: Tensor, out: tuple[Tensor, Tensor], gradients: tuple[Tensor, Tensor]
    ) -> tuple[Tensor]:
        return (gradients[0] - (-gradients[1]),)
