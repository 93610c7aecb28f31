"""What is computed: networks, the asymmetric convolution block, and its fusion."""

from src.models.acb import AsymmetricConvBlock, fuse
from src.models.registry import build_model

__all__ = ["AsymmetricConvBlock", "build_model", "fuse"]
