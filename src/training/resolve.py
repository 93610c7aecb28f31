"""From the command line, the data and pretrained weights to the final configuration of a run.

Imports nothing of MindSpore: ``prepare_data`` runs before it is imported.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from src.cli.command import Command
from src.cli.config import DIGITS, Config
from src.cli.recipes import load_config
from src.dataset.batches import SIZE_STAGES, global_batch_size, micro_batch_size
from src.dataset.splits import TrainingData, open_training_data, split_fraction
from src.distributed.communicator import Communicator
from src.models.networks import NETWORKS, check_network, network_name
from src.runs.run_folder import RunFolder, dated_run_folder
from src.utils.errors import UserError
from src.utils.gpu import gpu_bytes
from src.utils.log import create_log
from src.utils.machine import available_bytes

_STEPS_PER_EPOCH = 10
# How far from 1 the mean of recorded class weights is at most, because of rounding.
_ROUNDED_MEAN = 1e-5
# Batch norm is unreliable with fewer images per rank.
_MIN_IMAGES = 8
# Fraction of the free memory that training may take.
_MEMORY_FRACTION = 0.6
# Memory of a process without a network: MindSpore itself and its compiled graph.
_BASE_BYTES = 0.7e9
# Per parameter: weight, gradient, momentum, and buffers of reduction and optimizer. Per activation:
# the activation, its gradient and work space; ResNeXt-50 takes 4.6 bytes with the kernels of
# src/kernels, 7 with MindSpore's.
_BYTES_PER_PARAMETER, _BYTES_PER_ACTIVATION = 20, 8


@dataclass(frozen=True)
class PreparedData:
    """The images of a run, and the folder that a new run will use."""

    images: TrainingData
    folder: RunFolder


def prepare_data(command: Command) -> PreparedData:
    """Check the keys and open the images. Every rank calls it.

    Raises:
        UserError: on every rank, for keys that contradict each other, or data that cannot be used.
    """
    check_training_keys(command.config)
    if not command.config.checkpoint_file_path:  # weights bring their network
        check_progressive_size(command.config)
    images = open_training_data(command.config, command.communicator)
    resolve_data(command.config, images)
    folder = dated_run_folder(command.config.output_path)
    if command.communicator.is_root:
        create_log()(_first_line(command.config, command.communicator, folder))
    return PreparedData(images, folder)


def resolve(
    flags: Mapping[str, str],
    config: Config,
    data: TrainingData,
    pretrained_settings: Mapping[str, Any] | None,
    communicator: Communicator,
) -> Config:
    """The final configuration, which is recorded and never changes. Every rank calls it.

    Args:
        config: the configuration from the command line.
        pretrained_settings: {key: value} that pretrained weights record; None without any.
    """
    if pretrained_settings is not None:
        # Network and preprocessing are those of the weights, unless the recipe or flags differ.
        config = load_config(flags, pretrained_layer=pretrained_settings)
    config = resolve_data(config, data)
    config = auto_batch_size(config, len(data.train), communicator)
    check_training_keys(config)
    check_progressive_size(config)
    _check_batch_norm(config, micro_batch_size(config, communicator.size))
    return config


def check_training_keys(config: Config) -> None:
    """Raise UserError for keys that the network or device does not support, or that need others."""
    check_network(config.network, config.image_size)
    if config.freeze_epochs and not (config.checkpoint_file_path or config.resume):
        raise UserError(
            f"freeze_epochs={config.freeze_epochs} trains only the classifier at first, so the "
            "backbone must be pretrained: pass --pretrained=FILE, or --freeze_epochs=0"
        )
    if config.early_stopping and not (config.run_eval or config.val_split):
        raise UserError(
            f"early_stopping={config.early_stopping} needs validation images: add --run_eval=1 or "
            "--val_split=auto, or --early_stopping=0"
        )
    if config.sync_bn and config.device_target != "Ascend":
        raise UserError(
            "sync_bn=1 needs device_target=Ascend: MindSpore 2.10 has no such operation for CPU or "
            "GPU; there running statistics are averaged over ranks, and batch statistics are those "
            "of each rank"
        )
    if config.ema_decay and config.device_target != "CPU":
        raise UserError(
            f"ema_decay={config.ema_decay:g} needs device_target=CPU: on other devices the average "
            "is not implemented; leave it out"
        )
    on_cpu = config.device_target == "CPU"
    if on_cpu and config.reducer == "device":
        raise UserError(
            "reducer=device needs device_target=GPU or Ascend; on CPU gradients go through MPI"
        )
    if not on_cpu and config.gradient_compression != "none" and config.reducer != "mpi":
        raise UserError(
            f"gradient_compression={config.gradient_compression} compresses what MPI sends; add "
            "--reducer=mpi"
        )


def check_progressive_size(config: Config) -> None:
    """Raise UserError if training cannot begin with smaller images."""
    if not config.progressive_size:
        return
    name, smallest = f"progressive_size={config.progressive_size}", config.progressive_size
    network = NETWORKS[network_name(config.network)]
    problem = ""
    if smallest >= config.image_size:
        problem = f"must be below image_size={config.image_size}"
    elif smallest < network.min_image_size:
        problem = f"is too small for {config.network}, which needs {network.min_image_size} or more"
    elif network.has_fixed_size:
        problem = f"does not fit {config.network}, which is built for images of one size only"
    elif config.max_epoch < SIZE_STAGES:
        problem = f"needs --max_epoch={SIZE_STAGES} or more, an epoch for each size"
    elif config.input_pipeline != "own":
        problem = "needs --input_pipeline=own"
    elif config.teacher:
        problem = "cannot be combined with teacher, which takes images of one size"
    if problem:
        raise UserError(f"{name} {problem}")


def resolve_data(config: Config, data: TrainingData) -> Config:
    """``config`` with the data's num_classes, and val_split as a number.

    Raises:
        UserError: if num_classes does not match the data.
    """
    classes = data.train.num_classes
    if config.num_classes not in (0, classes):
        raise UserError(
            f"num_classes={config.num_classes} but the data in '{config.data_path}' has {classes} "
            "classes"
        )
    # Recorded paths are absolute, so that they mean the same wherever a command starts.
    paths = {
        key: os.path.abspath(path)
        for key in ("data_path", "eval_data_path", "teacher")
        if (path := getattr(config, key)) not in ("", DIGITS)
    }
    fraction = split_fraction(config)
    resolved = config.model_copy(
        update={
            "num_classes": classes,
            "val_split": fraction,
            # val_split=auto has found images to evaluate on.
            "run_eval": config.run_eval or (data.validation is not None and not fraction),
            **paths,
        }
    )
    if resolved.smoothing > 1:
        raise UserError(
            f"label_smooth_factor={config.label_smooth_factor:g} gives the true class a smaller "
            f"target than each of the other {classes - 1}; use a smaller factor"
        )
    if os.path.exists(config.checkpoint_file_path):  # the name of published weights stays
        path = os.path.abspath(config.checkpoint_file_path)
        resolved = resolved.model_copy(update={"checkpoint_file_path": path})
    return _with_class_weights(resolved, data.train.labels)


def _with_class_weights(config: Config, labels: np.ndarray) -> Config:
    """``config`` with class_weights as numbers, whose mean over the training images is 1.

    A class without images, which the mean leaves out, weighs 1 if the weights are balanced.

    Raises:
        UserError: if there are not as many as classes, or the loss takes none.
    """
    if config.class_weights == "none":
        return config
    if config.loss.partition("(")[0] != "cross_entropy":
        raise UserError(f"class_weights need --loss=cross_entropy; --loss={config.loss} has none")
    if config.sampling == "balanced":
        raise UserError("class_weights and sampling=balanced both favour small classes; choose one")
    counts = np.bincount(labels, minlength=config.num_classes)
    if config.class_weights == "balanced":
        weights = np.where(counts, counts.sum() / (np.count_nonzero(counts) * counts.clip(1)), 1)
    elif len(config.class_weights) == config.num_classes:
        weights = np.array(config.class_weights)
    else:
        raise UserError(
            f"class_weights has {len(config.class_weights)} numbers; the data has "
            f"{config.num_classes} classes"
        )
    mean = (counts * weights).sum() / counts.sum()
    # Weights from a recorded configuration stay as they are, so that it repeats to the same bits.
    if abs(mean - 1) > _ROUNDED_MEAN:
        weights = weights / mean
    return config.model_copy(update={"class_weights": [float(f"{w:.7g}") for w in weights]})


def _check_batch_norm(config: Config, images: int) -> None:
    """Raise UserError if a batch norm would see a single value per channel.

    The variance would be 0, and the unbiased variance for the running statistics undefined.

    Args:
        images: per rank and micro-batch.
    """
    network = NETWORKS[network_name(config.network)]
    key = "progressive_size" if config.progressive_size else "image_size"
    size = getattr(config, key)
    if images == 1 and size <= network.single_pixel_at and not config.sync_bn:
        raise UserError(
            f"one image per rank at {key}={size} leaves the last batch norms of "
            f"{config.network} a single value per channel, which has no variance; use two or more "
            f"images per rank, or a larger {key} than {network.single_pixel_at}"
        )


def auto_batch_size(config: Config, images: int, communicator: Communicator) -> Config:
    """``config`` with the batch size and the learning rate in effect.

    With fit_batch the batch is halved until it fits in memory and an epoch of ``images`` images has
    10 steps. With lr_batch_size the learning rate is scaled in proportion to the batch (Goyal et
    al., arXiv:1706.02677, section 2.1). Both keys are reset in the result, so that the recorded
    configuration is the one in effect.
    """
    update: dict[str, Any] = {"fit_batch": False, "lr_batch_size": 0}
    if config.fit_batch:
        batch = _fitting_batch(config, images, communicator)
    else:
        batch = global_batch_size(config, communicator.size)
    if config.fit_batch or communicator.size > 1:
        # The recorded configuration then means the same batch on any number of ranks.
        update["global_batch_size"] = batch
    if config.lr_batch_size:
        scale = batch / config.lr_batch_size
        update |= {"lr": config.lr * scale, "eta_min": config.eta_min * scale}
    return config.model_copy(update=update)


def training_bytes(config: Config, batch: int) -> float:
    """Estimated bytes that one rank needs to train on ``batch`` images; 0 if unknown."""
    network = NETWORKS[network_name(config.network)]
    if network.size is None:
        return 0.0
    pixels = (config.image_size / network.image_size) ** 2
    branches = 1.0 if config.block == "base" else 3.0
    parameters = _BYTES_PER_PARAMETER * branches * network.size.parameters
    activations = _BYTES_PER_ACTIVATION * branches * pixels * network.size.activations
    return _BASE_BYTES + parameters + activations * batch


def uses_collectives(config: Config, communicator: Communicator) -> bool:
    """Whether the devices must be connected to each other before training."""
    on_device = config.device_target != "CPU" and config.reducer != "mpi"
    return on_device and communicator.size > 1


def _fitting_batch(config: Config, images: int, communicator: Communicator) -> int:
    """The global batch that fits. If ranks do not divide the batch, each takes a little less."""
    per_image = communicator.size * config.accumulation_steps
    wanted = config.global_batch_size or config.per_batch_size * per_image
    micro_batch = max(wanted // per_image, 1)
    limit = min(communicator.all_gather(_memory_limit(config, communicator.local_size)))

    def is_too_large(size: int) -> bool:
        few_steps = images // (size * per_image) < _STEPS_PER_EPOCH
        return size > limit or (size > _MIN_IMAGES and few_steps)

    while micro_batch > 1 and is_too_large(micro_batch):
        micro_batch //= 2
    while micro_batch > 1 and images < micro_batch * per_image:
        micro_batch //= 2
    return micro_batch * per_image


def _memory_limit(config: Config, ranks: int) -> float:
    """Images per micro-batch that fit in memory, on each of ``ranks`` ranks of this machine.

    Unlimited on Ascend, whose memory is not known.
    """
    fixed = training_bytes(config, 0)
    per_image = training_bytes(config, 1) - fixed
    if config.device_target == "Ascend" or not per_image:
        return float("inf")
    available = gpu_bytes() if config.device_target == "GPU" else available_bytes() / ranks
    return (_MEMORY_FRACTION * available - fixed) / per_image


def _first_line(config: Config, communicator: Communicator, folder: RunFolder) -> str:
    """What is about to start and where it logs, since the first step may take minutes."""
    name = os.path.basename(config.checkpoint_file_path) or config.network
    hosts = ""
    if communicator.has_several_hosts:
        counts = (f"{host}: {communicator.hosts.count(host)}" for host in communicator.host_names)
        hosts = f" ({', '.join(counts)})"
    where = f"the log will be {folder.log}"
    if config.resume:
        is_auto = config.resume == "auto"
        where = f"continues {f'under {config.output_path}' if is_auto else config.resume}"
    if config.dry_run:
        where = "a dry run"
    return f"{name} on {communicator.size} x {config.device_target}{hosts}: loading; {where}"
