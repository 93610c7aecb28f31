"""Weights to start from: what they are of, and into a network whose classifier may be another."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindspore import nn

from src.inference.origin import recorded_model
from src.models.formats import Arrays, read_weights
from src.models.weights import assign_weights, classes_in
from src.utils.config import Config, load_config
from src.utils.errors import UserError


@dataclass(frozen=True)
class Pretrained:
    """A file of weights, what it says of its network, and its class map if it has one."""

    path: str
    arrays: Arrays
    recorded: dict[str, Any]
    class_to_index: dict[str, int] | None

    def configure(self, flags: Mapping[str, Any], config: Config) -> Config:
        """The configuration of a training that starts from the file: network and preprocessing are its own, unless flags or the recipe
        say otherwise; what the data decided in ``config`` stays.
        """
        of_file = {key: value for key, value in self.recorded.items() if key != "num_classes"}
        return load_config(flags, starts_from=of_file).model_copy(
            update={key: getattr(config, key) for key in ("num_classes", "val_split")})

    def load(self, network: nn.Cell, config: Config, class_to_index: Mapping[str, int]) -> str:
        """Copy the weights into ``network``; what to say about it.

        With allow_head_mismatch the classifier begins anew if it is for other classes than ``class_to_index``, also if they are as many.

        Raises:
            UserError: if the weights do not fit.
        """
        others = self.class_to_index is not None and self.class_to_index != class_to_index
        left_out = assign_weights(network, self.arrays, self.path, config.allow_head_mismatch, config.allow_head_mismatch and others)
        line = f"starting from {self.path}"
        if left_out:
            there = classes_in(self.arrays, config.network)
            line += (f" without {', '.join(left_out)}: the classifier begins anew, for {config.num_classes} classes"
                     + (f" in place of {there}{' others' if there == config.num_classes else ''}" if there else ""))
        return line


def read_pretrained(path: str) -> Pretrained:
    """Raises UserError if the file cannot be read, or holds a fused network, which has no batch norms to train with."""
    arrays, metadata = read_weights(path)
    if metadata.get("fused"):
        raise UserError(f"'{path}' is a fused network, which is for deployment; train on from the checkpoint that it was made of")
    return Pretrained(path, arrays, recorded_model(arrays, metadata, Path(path)), metadata.get("class_to_index"))
