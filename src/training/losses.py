"""The table of losses. Imports nothing of MindSpore, so that a wrong name is reported at once."""

from typing import Any

from src.cli.config import Config
from src.utils.specs import check_spec, create_from_spec

# {name: "MODULE:CLASS"} of Cells (logits (N, C) float32, targets) -> scalar, created by
# ``of(config, **arguments)``. Targets are (N,) int32 labels, or (N, C) float32 probabilities from
# augmentations that mix samples.
LOSSES = {
    "cross_entropy": "src.training.cross_entropy:CrossEntropy",
    "binary_cross_entropy": "src.training.binary_cross_entropy:BinaryCrossEntropy",
}


def check_loss(config: Config) -> None:
    """Raise UserError for an unknown loss."""
    check_spec("loss", config.loss, LOSSES)


def create_loss(config: Config) -> Any:
    """The loss that the key ``loss`` describes. Raises UserError for a wrong argument."""
    return create_from_spec("loss", config.loss, LOSSES, config)
