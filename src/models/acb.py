"""Asymmetric convolution block (ACB).

Ding et al., "ACNet: Strengthening the Kernel Skeletons for Powerful CNN via Asymmetric Convolution
Blocks", ICCV 2019, section 3.2.
"""

from collections.abc import Callable

import numpy as np
from mindspore import Tensor, nn

from src.models.reparam import ReparamConv, fold_batch_norm, kernel_of, set_gamma


class AsymmetricConvBlock(ReparamConv):
    """Sum of a k x k, a 1 x k and a k x 1 convolution, each followed by its own batch norm.

    Args:
        kernel_size: odd, 3 or more.
        norm: makes the batch norm of a branch from its number of channels.
        gamma_init: initial scale of the three batch norms; the paper's code has 1/3 on CIFAR and 1
            on ImageNet.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        norm: Callable[[int], nn.Cell] = nn.BatchNorm2d,
        gamma_init: float | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        self.crop, across = max(-self.shift, 0), max(self.shift, 0)
        self.square_conv = self.conv((kernel_size, kernel_size))
        self.hor_conv = self.conv((1, kernel_size), padding=(across, across, padding, padding))
        self.ver_conv = self.conv((kernel_size, 1), padding=(padding, padding, across, across))
        self.square_bn, self.hor_bn, self.ver_bn = (norm(out_channels) for _ in range(3))
        set_gamma(gamma_init, self.square_bn, self.hor_bn, self.ver_bn)

    def construct(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        hor_input, ver_input = x, x
        if self.crop > 0:
            hor_input = x[:, :, self.crop : -self.crop, :]
            ver_input = x[:, :, :, self.crop : -self.crop]
        out = self.square_bn(self.square_conv(x)) + self.hor_bn(self.hor_conv(hor_input))
        if shortcut is not None:
            out = out + shortcut
        return out + self.ver_bn(self.ver_conv(ver_input))

    def norm_branches(self) -> tuple[tuple[nn.Conv2d, nn.Cell], ...]:
        if self.crop > 0:
            return ()
        return (
            (self.square_conv, self.square_bn),
            (self.hor_conv, self.hor_bn),
            (self.ver_conv, self.ver_bn),
        )

    def equivalent_kernel_bias(self) -> tuple[np.ndarray, np.ndarray]:
        square, square_bias = fold_batch_norm(kernel_of(self.square_conv), self.square_bn)
        hor, hor_bias = fold_batch_norm(kernel_of(self.hor_conv), self.hor_bn)
        ver, ver_bias = fold_batch_norm(kernel_of(self.ver_conv), self.ver_bn)
        return square + self.at_centre(hor) + self.at_centre(ver), square_bias + hor_bias + ver_bias
