"""The factory of layers that compute with oneDNN's kernels on CPU.

Parameters have the names, shapes and values that LayerFactory gives them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mindspore
from mindspore import nn

from src.kernels import layers
from src.kernels.attributes import Epilogue, Pooling
from src.kernels.library import KernelLibrary, ReadyGradients
from src.models.layers import ConvNorm, GlobalAverage, LayerFactory, scale_and_offset
from src.models.reparam import ReparamConv


@dataclass(frozen=True, kw_only=True)
class KernelLayers(LayerFactory):
    """Activations flow in blocks of channels.

    A layer that the kernels do not support is MindSpore's own, between two changes of layout.

    Attributes:
        library: the kernels.
        bfloat16: activations and their gradients are bfloat16; parameters and their gradients
            stay float32.
    """

    library: KernelLibrary
    bfloat16: bool = False

    @property
    def uses_blocked_layout(self) -> bool:
        return True

    def ready_gradients(self) -> ReadyGradients:
        return ReadyGradients(self.library)

    def max_pool(self, kernel_size: int, stride: int, padding: int = 0) -> nn.Cell:
        source = super().max_pool(kernel_size, stride, padding)
        return layers.Pool(self.library, source, kernel_size, stride, padding, Pooling.MAX)

    def average_pool(self, kernel_size: int, stride: int) -> nn.Cell:
        source = super().average_pool(kernel_size, stride)
        return layers.Pool(self.library, source, kernel_size, stride, 0, Pooling.AVERAGE)

    def global_average(self) -> nn.Cell:
        return layers.GlobalAverage(self.library, GlobalAverage())

    def dense(self, in_channels: int, out_channels: int) -> nn.Cell:
        return layers.DenseLayer(self.library, super().dense(in_channels, out_channels))

    def split_residual(self) -> nn.Cell:
        return layers.SplitResidual(self.library)

    def split_projected(self) -> nn.Cell:
        return self.split_residual()

    def add(self) -> nn.Cell:
        return layers.Add(self.library, self._dtype)

    def stochastic_add(self, channels: int, epilogue: Epilogue = Epilogue.NONE) -> nn.Cell:
        if channels % self.library.block:
            source = super().stochastic_add(channels, epilogue)
            return layers.NchwFallbackWithShortcut(self.library, source)
        return layers.StochasticAdd(self.library, self._dtype, epilogue)

    def concat(self) -> nn.Cell:
        return layers.Concat(self.library, super().concat())

    def to_nchw(self) -> nn.Cell:
        return layers.ToNchw(self.library)

    def input_normalizer(self, mean: Sequence[float], std: Sequence[float]) -> nn.Cell:
        return layers.ImageNormalizer(self.library, *scale_and_offset(mean, std), self._dtype)

    def _finish(self, layer: nn.Cell, epilogue: Epilogue) -> nn.Cell:
        library = self.library
        if isinstance(layer, nn.Conv2d) and layers.supports(library, [layer]):
            return layers.ConvLayer(library, layer, self._dtype, epilogue)
        branches = _norm_branches(layer)
        if layers.supports(library, [conv for conv, _ in branches]):
            return layers.ConvNormLayer(library, layer, branches, self._dtype, epilogue)
        if isinstance(layer, nn.BatchNorm2d) and layer.num_features % library.block == 0:
            return layers.NormLayer(library, layer, self._dtype, epilogue)
        source = super()._finish(layer, epilogue)
        if epilogue.has_shortcut:
            return layers.NchwFallbackWithShortcut(library, source)
        return layers.NchwFallback(library, source)

    @property
    def _dtype(self) -> Any:
        return mindspore.bfloat16 if self.bfloat16 else mindspore.float32


def _norm_branches(layer: nn.Cell) -> tuple[tuple[nn.Conv2d, nn.Cell], ...]:
    if isinstance(layer, ConvNorm):
        return ((layer.conv, layer.norm),)
    return layer.norm_branches() if isinstance(layer, ReparamConv) else ()
