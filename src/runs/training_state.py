"""All that a training needs to go on. This module alone knows what a training's checkpoint holds: writer and reader side by side."""

import math
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mindspore import Parameter, Tensor, nn

from src.models.formats import Arrays, read_weights
from src.models.weights import assign_weights
from src.runs.checkpoint import save_checkpoint
from src.utils.errors import UserError

# 1 had no version, one random stream for all augmentations, and momentum under another name; 2 other formulas of learning rates and
# smoothed labels under the same keys.
VERSION = 3


@dataclass(frozen=True)
class TrainingState:
    """A training after a step, but for the weights and the optimizer's arrays.

    Attributes:
        step: optimizer steps that are done.
        epoch: the epoch, from 1, that the last of them belongs to.
        finished_epoch: whether that epoch was evaluated and recorded.
        epoch_sums: what the epoch, if it is not finished, has summed up over its steps.
        best_top1: best accuracy on the validation images so far, in percent; -1 for none.
        best_loss: the loss on the validation images then, by which equal accuracies differ.
        since_best: evaluations in a row that were no better.
        steps_per_epoch, world_size, labels: steps in an epoch, number of ranks, checksum of the training images' labels.
        threads: number of cores of each rank, which decides how sums are rounded.
        kernels: what computed, which decides it too.
        class_to_index: class name -> label.
        config: the resolved configuration, JSON-serialisable.
        optimizer, loss_scale: their counters.
    """

    step: int
    epoch: int
    finished_epoch: bool
    epoch_sums: dict[str, float]
    best_top1: float
    steps_per_epoch: int
    world_size: int
    threads: list[int]
    labels: int
    class_to_index: dict[str, int]
    config: dict[str, Any]
    optimizer: dict[str, Any]
    loss_scale: dict[str, Any]
    # What checkpoints did not record before there was such a thing.
    kernels: str = "mindspore"
    best_loss: float = math.inf
    since_best: int = 0

    def write(self, path: Path, network: nn.Cell, optimizer_state: Sequence[Parameter]) -> None:
        """Write a checkpoint. Raises UserError if it cannot be written."""
        save_checkpoint(path, [*network.get_parameters(), *optimizer_state], {"version": VERSION, "fused": False, **asdict(self)})


def read_training_state(path: str) -> tuple[TrainingState, Arrays]:
    """The state and the arrays of a checkpoint. Raises UserError if it is damaged or no checkpoint of a training."""
    arrays, metadata = read_weights(path)
    metadata = {**{field.name: field.default for field in fields(TrainingState) if field.default is not MISSING}, **metadata}
    names = {field.name for field in fields(TrainingState)}
    if metadata.get("version") != VERSION or not names <= set(metadata):
        what = ("was written by another version of this program" if "step" in metadata and metadata.get("version") != VERSION
                else "is no checkpoint of a training")
        raise UserError(f"'{path}' {what}; start from its weights with --checkpoint_file_path={path}")
    return TrainingState(**{name: metadata[name] for name in names}), arrays


def restore_arrays(arrays: Arrays, path: Path, network: nn.Cell, optimizer_state: Sequence[Parameter]) -> None:
    """Put weights, running statistics and the optimizer's arrays back. Raises UserError if they do not fit."""
    assign_weights(network, arrays, path)
    for state in optimizer_state:
        stored = arrays.get(state.name)
        if stored is None or stored.shape != state.shape:
            raise UserError(f"'{path}' has no optimizer state {state.name}; start anew from its weights with "
                            f"--checkpoint_file_path={path}")
        state.set_data(Tensor(stored))
