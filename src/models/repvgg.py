"""RepVGG's block.

Ding et al., "RepVGG: Making VGG-style ConvNets Great Again", CVPR 2021, arXiv:2101.03697, section
3.2.
"""

from collections.abc import Callable

import numpy as np
from mindspore import Tensor, nn

from src.models.reparam import ReparamConv, SplitProjected, fold_batch_norm, kernel_of, set_gamma


class RepVGGBlock(ReparamConv):
    """Sum of a k x k convolution, a 1x1 convolution and the input, each with its own batch norm.

    The input is left out if the output has another shape. The paper has k = 3; 5x5 convolutions are
    replaced in the same way. The ReLU after the block belongs to the network.

    Args:
        norm: makes the batch norm of a branch from its number of channels.
        gamma_init: initial scale of the batch norms; None keeps 1, as in the paper's code.
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
        self.dense_conv, self.dense_bn = self.conv(kernel_size), norm(out_channels)
        self.point_conv = self.conv(1, padding=max(self.shift, 0))
        self.point_bn = norm(out_channels)
        self.crop = max(-self.shift, 0)
        self.has_identity = in_channels == out_channels and stride == 1 and self.shift == 0
        set_gamma(gamma_init, self.dense_bn, self.point_bn)
        self.split = SplitProjected()
        if self.has_identity:
            self.identity_bn = norm(out_channels)
            set_gamma(gamma_init, self.identity_bn)

    def construct(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        dense_input, x = self.split(x)
        centre = x if self.crop == 0 else x[:, :, self.crop : -self.crop, self.crop : -self.crop]
        out = self.dense_bn(self.dense_conv(dense_input))
        if shortcut is not None:
            out = out + shortcut
        out = out + self.point_bn(self.point_conv(centre))
        return out + self.identity_bn(x) if self.has_identity else out

    def norm_branches(self) -> tuple[tuple[nn.Conv2d, nn.Cell], ...]:
        if self.crop > 0 or self.has_identity:
            return ()
        return (self.dense_conv, self.dense_bn), (self.point_conv, self.point_bn)

    def equivalent_kernel_bias(self) -> tuple[np.ndarray, np.ndarray]:
        kernel, bias = fold_batch_norm(kernel_of(self.dense_conv), self.dense_bn)
        smaller = [fold_batch_norm(kernel_of(self.point_conv), self.point_bn)]
        if self.has_identity:
            smaller.append(fold_batch_norm(self.identity_kernel(), self.identity_bn))
        for branch_kernel, branch_bias in smaller:
            kernel, bias = kernel + self.at_centre(branch_kernel), bias + branch_bias
        return kernel, bias
