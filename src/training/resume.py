"""Going on with a run from its checkpoint, as if it had never stopped."""

from dataclasses import dataclass
from pathlib import Path

from mindspore import Tensor

from src.models.formats import read_weights
from src.models.weights import assign_weights
from src.training.records import RunFolder
from src.utils.errors import UserError

# What the checkpoint of a training records beside its weights.
_RECORDED = {"step", "config", "epoch_sums", "finished_epoch", "best_top1", "world_size", "step_state",
             "steps_per_epoch", "labels"}
# Keys that may differ between a run and its continuation: they say where, how fast and how often, not what is computed.
FREE_KEYS = {"checkpoint_file_path", "allow_head_mismatch", "resume", "output_path", "result_path", "save_figure", "file_format",
              "fuse", "log_interval", "keep_checkpoint_max", "ckpt_interval", "ckpt_interval_steps", "run_eval", "eval_interval",
              "eval_data_path", "eval_engine", "num_parallel_workers", "device_target", "device_id", "run_distribute",
              "max_steps", "data_path", "per_batch_size", "global_batch_size", "stall_timeout_s", "compile_cache"}


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to go on from: arrays by name, and what the run recorded beside them."""

    path: Path
    arrays: dict
    metadata: dict
    passed_over: tuple = ()

    @property
    def step(self):
        """Optimizer steps that are done."""
        return self.metadata["step"]

    @property
    def best_top1(self):
        return self.metadata["best_top1"]

    @property
    def world_size(self):
        return self.metadata["world_size"]

    @property
    def run_folder(self):
        """The folder of the run, in which it goes on."""
        parent = self.path.parent
        return RunFolder(parent.parent if parent.name == "ckpt_0" else parent)

    @property
    def finished_epoch(self):
        """Whether the epoch of the last step was evaluated and recorded."""
        return self.metadata["finished_epoch"]

    @property
    def epoch_sums(self):
        """What the unfinished epoch had summed up: see Trainer."""
        return self.metadata["epoch_sums"]

    def restore(self, network, step):
        """Put weights, running statistics, optimizer state and loss scale back. Raises UserError where they do not fit."""
        assign_weights(network, self.arrays, self.path)
        for velocity in step.velocities:
            stored = self.arrays.get(velocity.name)
            if stored is None or stored.shape != velocity.shape:
                raise UserError(f"'{self.path}' has no optimizer state {velocity.name}; start anew from its weights with "
                                f"--checkpoint_file_path={self.path}")
            velocity.set_data(Tensor(stored))
        step.restore(self.metadata["step_state"])


def find_resume_point(config, communicator):
    """The ResumePoint that ``config.resume`` names: a file, or "auto", the newest checkpoint under output_path.

    With "auto" a damaged checkpoint is passed over for the one before it.

    Raises:
        UserError: where there is none, or the run differs from ``config`` in what it computes (the keys are named).
    """
    found = _newest_first(config.output_path) if config.resume == "auto" else [config.resume]
    found = communicator.from_root(found)
    path, arrays, metadata = _first_readable(found, config)
    if not _RECORDED <= set(metadata):
        raise UserError(f"'{path}' is no checkpoint of a training; start from its weights with --checkpoint_file_path={path}")
    point = ResumePoint(Path(path), arrays, metadata, tuple(found[:found.index(path)]))
    present = config.model_dump(mode="json")
    differing = [key for key, value in metadata["config"].items() if key not in FREE_KEYS and present.get(key) != value]
    if differing:
        shown = ", ".join(f"{key}={metadata['config'][key]} there and {present.get(key)} here" for key in differing[:3])
        raise UserError(f"'{path}' is of another training: {shown}" + (" ..." if len(differing) > 3 else ""))
    return point


def resume_line(point, size):
    """What to tell of a resumed run, another number of ranks included."""
    text = f"going on from {point.path} after step {point.step}"
    if point.passed_over:
        text += f"; passed over, as damaged: {', '.join(point.passed_over)}"
    if point.world_size != size:
        text += (f"; it ran on {point.world_size} ranks and goes on with {size}: the same global batches, but sums are "
                 "rounded in another order and batch norm sees other shares")
    return text


def check_batches(point, steps_per_epoch, labels):
    """Raise UserError where the continued run would form other global batches than the run that stopped.

    Args:
        labels: checksum of the labels of the training images.
    """
    if point.metadata["labels"] != labels:
        raise UserError(f"'{point.path}' was trained on other images than data_path holds now; give the same data, or start "
                        f"anew from its weights with --checkpoint_file_path={point.path}")
    if point.metadata["steps_per_epoch"] != steps_per_epoch:
        raise UserError(f"'{point.path}' made {point.metadata['steps_per_epoch']} steps an epoch and this run would make "
                        f"{steps_per_epoch}; keep the data and the global batch (--global_batch_size)")


def _newest_first(output_path):
    files = [*Path(output_path).glob("*/ckpt_0/*.ckpt"), *Path(output_path).glob("*/best.ckpt")]
    found = sorted((file for file in files if not file.name.startswith(".")), key=lambda file: -file.stat().st_mtime_ns)
    return [str(file) for file in found]


def _first_readable(paths, config):
    if not paths:
        raise UserError(f"resume=auto finds no checkpoint under output_path '{config.output_path}'")
    for path in paths:
        try:
            return path, *read_weights(path)
        except UserError:
            if path == paths[-1]:
                raise
