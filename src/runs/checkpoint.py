"""Checkpoint files: their names, their content, and the state of training in them."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn

from src.models.weight_files import (
    AVERAGE_PREFIX,
    CHECKSUM,
    METADATA,
    Arrays,
    content_checksum,
    read_weights,
)
from src.models.weights import assign_weights
from src.utils.errors import UserError
from src.utils.files import write_atomically

# Version 1 had no version number, one random stream for all augmentations, and another name for
# momentum; version 2 had other formulas of learning rates and smoothed labels under the same keys.
VERSION = 3


@dataclass(frozen=True)
class TrainingState:
    """The state of training after a step, except for the weights and the optimizer's arrays.

    Attributes:
        step: number of optimizer steps that are done.
        epoch: the epoch, from 1, that the last of them belongs to.
        finished_epoch: whether that epoch was evaluated and recorded.
        epoch_sums: the fields of EpochSums, over the steps of the unfinished epoch.
        best_top1: best accuracy on the validation images in percent; -1 for none.
        best_loss: validation loss at the best epoch.
        since_best: evaluations since then, none of which was better.
        steps_per_epoch, world_size: steps in an epoch, number of ranks.
        labels: checksum of the labels of the training images.
        threads: number of cores of each rank, which determines how sums are rounded.
        kernels: name of the kernels, which determine it too.
        class_to_index: class name -> label.
        config: the resolved configuration, JSON-serialisable.
        optimizer, loss_scale: their counters.
        images, validation: fingerprints of the training and the validation images; None if unknown.
        teacher: checksum of the file of the teacher; None if there is none, or unknown.
        first_top1: accuracy of the weights that the run began with; 0 if it was not measured.
        seen_before: number of validation images that those weights were trained on.
        software: {name: version} of what the last steps ran with; None if unknown.
    """

    step: int
    epoch: int
    finished_epoch: bool
    epoch_sums: dict[str, Any]
    best_top1: float
    steps_per_epoch: int
    world_size: int
    threads: list[int]
    labels: int
    class_to_index: dict[str, int]
    config: dict[str, Any]
    optimizer: dict[str, Any]
    loss_scale: dict[str, Any]
    # Checkpoints of earlier versions do not have these.
    kernels: str = "mindspore"
    best_loss: float = math.inf
    since_best: int = 0
    images: int | None = None
    validation: int | None = None
    teacher: int | None = None
    first_top1: float = 0.0
    seen_before: int = 0
    software: dict[str, str] | None = None

    @property
    def position(self) -> tuple[int, int]:
        """(epoch, steps in it)."""
        return self.epoch, self.step - (self.epoch - 1) * self.steps_per_epoch

    def write(self, path: Path, network: nn.Cell, optimizer_state: Sequence[Parameter]) -> None:
        """Write a checkpoint.

        Raises:
            UserError: if it cannot be written, or would be of no use: a value is not finite.
        """
        parameters = [*network.get_parameters(), *optimizer_state]
        for parameter in parameters:
            if not np.isfinite(parameter.asnumpy()).all():
                raise UserError(
                    f"{parameter.name} is not finite after step {self.step}, so no checkpoint was "
                    f"written to {path}; try a lower --lr, or a larger batch"
                )
        metadata = {"version": VERSION, "fused": False, **asdict(self)}
        save_checkpoint(path, parameters, metadata)


def read_training_state(path: str) -> tuple[TrainingState, Arrays]:
    """The state and the arrays of a checkpoint.

    Raises:
        UserError: if it is damaged, or not a checkpoint of a training run.
    """
    arrays, metadata = read_weights(path)
    names = {field.name for field in fields(TrainingState)}
    defaults = {f.name: f.default for f in fields(TrainingState) if f.default is not MISSING}
    metadata = {**defaults, **metadata}
    if metadata.get("version") != VERSION or not names <= set(metadata):
        what = "is not a checkpoint of a training run"
        if "step" in metadata and metadata.get("version") != VERSION:
            what = "was written by another version of this program"
        raise UserError(
            f"'{path}' {what}; start from its weights with --checkpoint_file_path={path}"
        )
    return TrainingState(**{name: metadata[name] for name in names}), arrays


def restore_arrays(
    arrays: Arrays, path: Path, network: nn.Cell, optimizer_state: Sequence[Parameter]
) -> None:
    """Restore weights, running statistics, and the optimizer's and averages' arrays.

    Raises:
        UserError: if they do not fit.
    """
    # Not the averages of the weights, which are part of ``optimizer_state``.
    weights = {n: array for n, array in arrays.items() if not n.startswith(AVERAGE_PREFIX)}
    assign_weights(network, weights, path)
    for state in optimizer_state:
        stored = arrays.get(state.name)
        if stored is None or stored.shape != state.shape:
            raise UserError(
                f"'{path}' has no optimizer state {state.name}; start a new run from its weights "
                f"with --checkpoint_file_path={path}"
            )
        state.set_data(Tensor(stored))


def save_checkpoint(path: Path, parameters: Iterable[Parameter], metadata: dict[str, Any]) -> None:
    """Write ``path`` (.ckpt) with a checksum; it is complete or absent, even after kill -9.

    Args:
        parameters: the checkpoint uses their names.
        metadata: JSON-serialisable, stored with the weights.

    Raises:
        UserError: if the folder cannot be written or the disk is full.
    """
    arrays = {p.name: p.asnumpy() for p in parameters}
    arrays[METADATA] = np.frombuffer(json.dumps(metadata).encode(), np.uint8).copy()
    arrays[CHECKSUM] = np.frombuffer(content_checksum(arrays), np.uint8).copy()
    entries = [{"name": name, "data": Tensor(array)} for name, array in arrays.items()]
    write_atomically(path, lambda partial: mindspore.save_checkpoint(entries, str(partial)))
