"""The factory of layers that compute with oneDNN's kernels on CPU. Parameters have LayerFactory's names, shapes and values."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mindspore
from mindspore import nn

from src.kernels import cells
from src.kernels.announcements import Announcements
from src.kernels.library import KernelLibrary
from src.models.fusion import BranchedConv
from src.models.layers import ConvNorm, GlobalAverage, LayerFactory, scale_and_offset


@dataclass(frozen=True)
class KernelLayers(LayerFactory):
    """Activations flow in blocks of channels. A layer that the kernels cannot take is MindSpore's own, with a change of layout around it.

    Attributes:
        library: the kernels.
        bfloat16: activations and their gradients are bfloat16, parameters and their gradients float32.
    """

    library: KernelLibrary | None = None
    bfloat16: bool = False

    @property
    def has_own_layout(self) -> bool:
        return True

    def announcements(self) -> Announcements:
        return Announcements(self._library)

    def max_pool(self, kernel_size: int, stride: int, padding: int = 0) -> nn.Cell:
        return cells.Pool(self._library, super().max_pool(kernel_size, stride, padding), kernel_size, stride, padding, average=False)

    def average_pool(self, kernel_size: int, stride: int) -> nn.Cell:
        return cells.Pool(self._library, super().average_pool(kernel_size, stride), kernel_size, stride, 0, average=True)

    def global_average(self) -> nn.Cell:
        return cells.GlobalAverage(self._library, GlobalAverage())

    def dense(self, in_channels: int, out_channels: int) -> nn.Cell:
        return cells.DenseLayer(self._library, super().dense(in_channels, out_channels))

    def fork(self) -> nn.Cell:
        return cells.Fork(self._library)

    def sum(self) -> nn.Cell:
        return cells.Sum(self._library, self._type)

    def plain(self) -> nn.Cell:
        return cells.Plain(self._library)

    def input_normalizer(self, mean: Sequence[float], std: Sequence[float]) -> nn.Cell:
        return cells.ImageNormalizer(self._library, *scale_and_offset(mean, std), self._type)

    def _finish(self, layer: nn.Cell, relu: bool, shortcut: bool) -> nn.Cell:
        library, block = self._library, self._library.block
        if isinstance(layer, nn.Conv2d) and cells.takes(library, layer):
            return cells.ConvLayer(library, layer, self._type, relu, shortcut)
        branches = _norm_branches(layer)
        if branches and all(cells.takes(library, conv) for conv, _ in branches):
            return cells.ConvNormLayer(library, layer, branches, self._type, relu, shortcut)
        if isinstance(layer, nn.BatchNorm2d) and layer.num_features % block == 0:
            return cells.NormLayer(library, layer, self._type, relu)
        plain = super()._finish(layer, relu, shortcut)
        return (cells.PlainLayerWithShortcut if shortcut else cells.PlainLayer)(library, plain)

    @property
    def _library(self) -> KernelLibrary:
        if self.library is None:
            raise ValueError("KernelLayers needs a library")
        return self.library

    @property
    def _type(self) -> Any:
        return mindspore.bfloat16 if self.bfloat16 else mindspore.float32


def _norm_branches(layer: nn.Cell) -> tuple[tuple[nn.Conv2d, nn.Cell], ...]:
    if isinstance(layer, ConvNorm):
        return ((layer.conv, layer.norm),)
    return layer.norm_branches() if isinstance(layer, BranchedConv) else ()
