"""The table of blocks that train with several branches and become one convolution.

Imports nothing of MindSpore.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from src.utils.errors import UserError, suggestion


@dataclass(frozen=True)
class Block:
    """One kind of block.

    Attributes:
        builder: "MODULE:CLASS" of a ``reparam.ReparamConv``, called as ``builder(in_channels,
            out_channels, kernel_size, stride=..., padding=..., groups=..., norm=...,
            gamma_init=...)``.
        kernels: sizes of the square convolutions that it replaces, each with its batch norm.
        key_patterns: parts of parameter names that occur only before fusion; files of other
            programs are recognised by them.
        fused_key_patterns: the same for names after fusion.
    """

    builder: str = ""
    kernels: tuple[int, ...] = ()
    key_patterns: tuple[str, ...] = ()
    fused_key_patterns: tuple[str, ...] = ()


BLOCKS: dict[str, Block] = {
    "base": Block(),
    # 1x1 and large kernels stay plain, as in the code of the papers.
    "acb": Block("src.models.acb:AsymmetricConvBlock", (3, 5), ("square_conv.",), ("fused_conv.",)),
    "repvgg": Block("src.models.repvgg:RepVGGBlock", (3, 5), ("point_bn.",)),
    "dbb": Block("src.models.dbb:DiverseBranchBlock", (3, 5), ("pool_bn.",)),
}


def find_block(name: str) -> Block:
    """The Block of that name. Raises UserError for an unknown one."""
    if name not in BLOCKS:
        raise UserError(
            f"unknown block={name}{suggestion(name, BLOCKS)}; available: {', '.join(BLOCKS)}"
        )
    return BLOCKS[name]


def recognise_block(names: Iterable[str]) -> tuple[str, bool]:
    """(name of the block, whether it is fused), guessed from another program's parameter names."""
    names = list(names)
    for block, kind in BLOCKS.items():
        for key_patterns, fused in ((kind.key_patterns, False), (kind.fused_key_patterns, True)):
            if any(mark in name for mark in key_patterns for name in names):
                return block, fused
    return "base", False
