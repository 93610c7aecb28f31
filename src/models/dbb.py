"""Diverse branch block (DBB).

Ding et al., "Diverse Branch Block: Building a Convolution as an Inception-like Unit", CVPR 2021,
arXiv:2103.13425, section 3.3.
"""

from collections.abc import Callable

import numpy as np
from mindspore import Tensor, nn, ops

from src.models.reparam import ReparamConv, fold_batch_norm, kernel_of, merge_1x1_kxk, set_gamma


class DiverseBranchBlock(ReparamConv):
    """Sum of four branches: k x k; 1x1; 1x1 then k x k; 1x1 then average pooling.

    Batch norm follows each convolution and the pooling. As in the paper's code, the 1x1 convolution
    before the k x k one keeps the number of channels and starts as the identity. The output of a
    batch norm is padded with the values that it gives for zeros, so that the block can be fused
    into one convolution.

    Args:
        norm: makes the batch norm of a branch from its number of channels.
        gamma_init: initial scale of the batch norms that end the branches; None keeps 1.

    Raises:
        ValueError: for a dilation above 1 too, which average pooling does not have.
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
        if dilation > 1:
            raise ValueError(f"DiverseBranchBlock: dilation must be 1, got {dilation}")
        self.dense_conv, self.dense_bn = self.conv(kernel_size), norm(out_channels)
        self.linear_conv = self.conv(1, padding=max(self.shift, 0))
        self.linear_bn = norm(out_channels)
        self.inner_conv = self.conv(1, out_channels=in_channels, stride=1, padding=0)
        self.inner_conv.weight.set_data(Tensor(np.zeros(self.inner_conv.weight.shape, np.float32)))
        self.inner_bn = _BatchNormThenPad(norm(in_channels), padding)
        self.outer_conv, self.outer_bn = self.conv(kernel_size, padding=0), norm(out_channels)
        self.mix_conv = self.conv(1, stride=1, padding=0)
        self.mix_bn = _BatchNormThenPad(norm(out_channels), padding)
        self.pool = nn.AvgPool2d(kernel_size, stride, pad_mode="valid")
        self.pool_bn = norm(out_channels)
        self.crop = max(-self.shift, 0)
        set_gamma(gamma_init, self.dense_bn, self.linear_bn, self.outer_bn, self.pool_bn)

    def construct(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        centre = x if self.crop == 0 else x[:, :, self.crop : -self.crop, self.crop : -self.crop]
        out = self.dense_bn(self.dense_conv(x)) + self.linear_bn(self.linear_conv(centre))
        out = out + self.outer_bn(self.outer_conv(self.inner_bn(x + self.inner_conv(x))))
        if shortcut is not None:
            out = out + shortcut
        return out + self.pool_bn(self.pool(self.mix_bn(self.mix_conv(x))))

    def equivalent_kernel_bias(self) -> tuple[np.ndarray, np.ndarray]:
        size, groups, out_channels = (
            self.geometry[key] for key in ("kernel_size", "groups", "out_channels")
        )
        kernel, bias = fold_batch_norm(kernel_of(self.dense_conv), self.dense_bn)
        linear, linear_bias = fold_batch_norm(kernel_of(self.linear_conv), self.linear_bn)
        inner = fold_batch_norm(
            kernel_of(self.inner_conv) + self.identity_kernel(), self.inner_bn.norm
        )
        outer = fold_batch_norm(kernel_of(self.outer_conv), self.outer_bn)
        mix = fold_batch_norm(kernel_of(self.mix_conv), self.mix_bn.norm)
        channels = np.arange(out_channels)
        average = np.zeros((out_channels, out_channels // groups, size, size))
        average[channels, channels % (out_channels // groups)] = 1 / size**2
        pool = fold_batch_norm(average, self.pool_bn)
        in_depth, in_depth_bias = merge_1x1_kxk(*inner, *outer, groups)
        pooled, pooled_bias = merge_1x1_kxk(*mix, *pool, groups)
        return kernel + self.at_centre(
            linear
        ) + in_depth + pooled, bias + linear_bias + in_depth_bias + pooled_bias


class _BatchNormThenPad(nn.Cell):
    """Batch norm, then ``padding`` pixels on each side.

    The pixels have the values that the batch norm makes of zeros with its running statistics.
    """

    def __init__(self, norm: nn.Cell, padding: int) -> None:
        super().__init__()
        self.norm, self.padding = norm, padding
        self.pad = ops.Pad(((0, 0), (0, 0), (padding, padding), (padding, padding)))

    def construct(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if self.padding == 0:
            return x
        scale = self.norm.gamma / ops.sqrt(self.norm.moving_variance + self.norm.eps)
        of_zeros = ops.stop_gradient(self.norm.beta - self.norm.moving_mean * scale).reshape(
            (1, -1, 1, 1)
        )
        return self.pad(x - of_zeros) + of_zeros
