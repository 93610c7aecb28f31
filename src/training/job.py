"""The story of a training run, from the opened data to the recorded results."""

import os

import numpy as np

from src.cli.command import Command
from src.cli.config import DIGITS, Config
from src.cli.flags import flags_without_effect
from src.dataset.batches import global_batch_size
from src.dataset.class_folders import SPLITS
from src.dataset.image_set import (
    ImageSet,
    are_numbers_sorted_as_text,
    class_names,
    duplicate_messages,
)
from src.dataset.splits import TrainingData, set_messages, validation_path
from src.distributed.communicator import Communicator, check_ranks_agree
from src.distributed.launcher import tell_launcher
from src.distributed.stopping import GracefulStop
from src.inference.export import deploy
from src.kernels.library import KernelChoice
from src.models.create import create_network
from src.runs.recorder import LogOnly, Recorder, RunRecorder
from src.runs.run_folder import RunFolder, create_run_folder
from src.training.distillation import open_teacher
from src.training.dry_run import estimate
from src.training.resolve import PreparedData, resolve
from src.training.schedules import create_schedule
from src.training.start import choose_start, read_pretrained
from src.training.trainer import Trainer
from src.utils.log import WARNING, create_log
from src.utils.machine import available_cores, software_versions

# The largest class has this many times the images of the smallest.
_IMBALANCED = 5
_RATES_LOOKED_AT = 200
_WEIGHTS_SHOWN = 12


def train(command: Command, data: PreparedData) -> None:
    """Train as the command line says. Leaves a run folder."""
    communicator, images = command.communicator, data.images

    # Pretrained weights bring their network and preprocessing, so they come before the final
    # configuration.
    weights = command.config.checkpoint_file_path
    pretrained = read_pretrained(weights, command.flags) if weights else None
    settings = pretrained.settings if pretrained else None
    check_ranks_agree(communicator, settings or {}, "use the same weights file on every host")

    # The configuration that is recorded. Nothing changes it after this line.
    config = resolve(command.flags, command.config, images, settings, communicator)

    # Which checkpoint to resume depends on the final configuration, and where to record depends on
    # the checkpoint.
    start = choose_start(config, pretrained, communicator)
    network = create_network(config, command.kernels.library)
    recorder = create_recorder(config, command, start.run_folder or data.folder)
    trainer = Trainer(network, config, communicator, images, recorder, command.kernels)
    if config.teacher:
        classes = images.train.class_to_index
        trainer.teacher = open_teacher(config, classes, command.kernels, recorder.log)
        found = {"teacher": trainer.teacher.checksum}
        check_ranks_agree(communicator, found, "give the same file to every rank")
    message = start.load_into(trainer)

    for line in (
        *flags_without_effect(command.flags, config, communicator.size),
        *batch_messages(command.config, config, communicator.size),
        *class_weights_messages(command.config, config, images.train),
    ):
        recorder.log(line)
    log_summary(trainer, command.kernels, message)
    if config.dry_run:
        for line in estimate(trainer, config, communicator):
            recorder.log(line)
        return
    with GracefulStop(command.signals, communicator) as stop:
        images_per_second = trainer.fit(stop)
    log_speed(trainer, images_per_second)
    if config.deploy and images.validation is not None:
        deploy(network, config, communicator, images.validation, recorder, command.kernels)
    recorder.log_results()
    if message := trainer.accuracy_drop_warning():
        recorder.log(message)


def create_recorder(config: Config, command: Command, folder: RunFolder) -> Recorder:
    """Rank 0 records to the run folder, created if new; the other ranks record nothing."""
    communicator = command.communicator
    if not communicator.is_root:
        return Recorder()
    if config.dry_run:
        return LogOnly(command.checked(create_log()))
    if not config.resume:
        folder = create_run_folder(folder)
    tell_launcher(
        run_folder=str(folder.path.resolve()),
        accumulation_steps=config.accumulation_steps,
        global_batch_size=config.global_batch_size
        or config.per_batch_size * communicator.size * config.accumulation_steps,
    )
    environment = {
        "hosts": communicator.hosts,
        "device": config.device_target,
        "kernels": command.kernels.name,
        **software_versions(),
    }
    log = command.checked(create_log(file=folder.log))
    return RunRecorder(folder, config, log, environment)


def batch_messages(before: Config, config: Config, size: int) -> list[str]:
    """Messages on the batch and learning rate that fit_batch and lr_batch_size have changed.

    Args:
        before: the configuration from the command line, whose batch ``size`` ranks may not divide.
    """
    lines = []
    wanted = before.global_batch_size or before.per_batch_size * size * before.accumulation_steps
    batch = global_batch_size(config, size)
    if before.fit_batch and batch != wanted:
        lines.append(f"{WARNING}fit_batch: {batch} images per step instead of {wanted}")
    if config.lr != before.lr and before.lr_batch_size:
        lines.append(
            f"lr_batch_size: lr={config.lr:g} for {batch} images per step, from {before.lr:g} for "
            f"{before.lr_batch_size}"
        )
    return lines


def log_summary(trainer: Trainer, kernels: KernelChoice, start_message: str | None) -> None:
    """Log what is about to be trained, and hints and warnings."""
    config, images = trainer.config, trainer.data
    validation = images.validation
    lines = [
        kernels.hint,
        ranks_hint(config, trainer.communicator, kernels),
        "training on the bundled handwritten digits; --data_path=DIR trains on your own images"
        if config.data_path == DIGITS
        else None,
        validation_message(config, images),
        *set_messages(images.train, "training"),
        *(set_messages(validation, "validation") if validation is not None else ()),
        f"{WARNING}the training data has a single class" if config.num_classes == 1 else None,
        imbalance_hint(config, images.train),
        block_init_warning(config),
        warmup_warning(config) or rate_warning(config, trainer.steps_per_epoch),
        stop_hint(config, trainer.steps_per_epoch),
        # Rank 0 reads the files, and only its lines are seen.
        *(duplicate_warnings(trainer) if trainer.communicator.rank == 0 else ()),
        val_loss_hint(config),
        start_message,
        f"{WARNING}freeze_epochs={config.freeze_epochs} covers every epoch: only the classifier "
        "is trained"
        if config.freeze_epochs >= config.max_epoch
        else None,
        f"{config.network} block={config.block} on {trainer.communicator.size} x "
        f"{config.device_target}: {len(images.train)} images, {config.num_classes} classes, "
        f"{trainer.steps_per_epoch} steps of {trainer.batches.global_batch_size} images per epoch, "
        f"{config.max_epoch} epochs",
    ]
    for line in filter(None, lines):
        trainer.recorder.log(line)


def validation_message(config: Config, images: TrainingData) -> str | None:
    """A message on where the validation images come from; None without any."""
    if images.validation is None:
        return None
    count = len(images.validation)
    if config.val_split:
        message = f"{count} validation images, split off from {config.data_path}"
        others = validation_path(config.data_path)
        if others is not None and config.data_path != DIGITS:
            message += f"\n{WARNING}the images of {others} are not used, because of val_split"
        return message
    path = config.eval_data_path or validation_path(config.data_path) or ""
    return f"{count} validation images of {_part_of(images.validation, path)}"


def _part_of(images: ImageSet, path: str) -> str:
    """The part of a root that the images are in, such as ROOT/test; ``path`` if it has no parts."""
    if images.is_list or images.paths is None:
        return path
    part = os.path.relpath(images.paths[0], path).split(os.sep)[0]
    names = [name for group in SPLITS["val"] for name in group]
    return os.path.join(path, part) if part.lower() in names else path


def imbalance_hint(config: Config, images: ImageSet) -> str | None:
    """A message on classes of very different sizes; None without any."""
    counts = np.bincount(images.labels)
    counts = counts[counts > 0]
    if config.sampling == "balanced" or config.class_weights != "none":
        return None
    if counts.max() < _IMBALANCED * counts.min():
        return None
    return (
        f"the classes have {counts.min()} to {counts.max()} images; --sampling=balanced draws all "
        "classes equally often, --class_weights=balanced weights them equally"
    )


def class_weights_messages(before: Config, config: Config, images: ImageSet) -> list[str]:
    """A message that gives each class its weight, if there are weights.

    Args:
        before: the configuration from the command line, which may say "balanced".
    """
    weights, classes = config.class_weights, images.class_to_index
    if not isinstance(weights, list):
        return []
    pairs = list(zip(class_names(classes, config.num_classes), weights))
    shown = ", ".join(f"{name}={weight:.3g}" for name, weight in pairs[:_WEIGHTS_SHOWN])
    more = " ..." if len(pairs) > _WEIGHTS_SHOWN else ""
    message = f"class_weights, scaled to a mean of 1: {shown}{more}"
    if isinstance(before.class_weights, list) and are_numbers_sorted_as_text(classes):
        return [f"{WARNING}{message}; the classes are in the order of text, 10 before 2"]
    return [message]


def block_init_warning(config: Config) -> str | None:
    """A warning if weight_init does not reach the blocks, else None."""
    is_default = config.block == "base" or config.weight_init == "kaiming_uniform"
    if is_default or config.checkpoint_file_path or config.resume:
        return None
    return (
        f"{WARNING}weight_init={config.weight_init} applies to plain convolutions only; those "
        f"inside {config.block} blocks keep kaiming_uniform"
    )


def warmup_warning(config: Config) -> str | None:
    """A warning if the warm-up leaves nothing of the schedule after it, else None."""
    if not create_schedule(config).schedule.has_warmup:
        return None
    if config.warmup_epochs > 0 and config.warmup_epochs >= config.max_epoch:
        return (
            f"{WARNING}warmup_epochs={config.warmup_epochs:g} covers the whole run: the learning "
            f"rate rises towards lr={config.lr:g} and never falls"
        )
    if 0 < config.T_max <= config.warmup_epochs and config.lr_scheduler == "cosine_annealing":
        return (
            f"{WARNING}T_max={config.T_max:g} ends within warmup_epochs={config.warmup_epochs:g}: "
            f"after the warm-up the learning rate is eta_min={config.eta_min:g}"
        )
    return None


def rate_warning(config: Config, steps_per_epoch: int) -> str | None:
    """A warning if the learning rate never falls, or is 0 for a part of the run, else None."""
    schedule, steps = create_schedule(config), steps_per_epoch * config.max_epoch
    peak = min(round(config.warmup_epochs * steps_per_epoch), steps - 1)
    shown = np.union1d(np.linspace(0, steps - 1, _RATES_LOOKED_AT).astype(int), [peak])
    rates = np.array([schedule(int(step), steps_per_epoch) for step in shown])
    if config.max_epoch > 1 and (np.diff(rates) >= 0).all():
        return (
            f"{WARNING}with lr_scheduler={config.lr_scheduler} as it is set, the learning rate "
            f"never falls in {config.max_epoch} epochs"
        )
    idle = int(np.count_nonzero(rates == 0))
    if idle > len(rates) / 10:
        return (
            f"{WARNING}the learning rate is 0 in {100 * idle / len(rates):.0f} % of the run; see "
            "T_max and eta_min"
        )
    return None


def stop_hint(config: Config, steps_per_epoch: int) -> str | None:
    """A hint if max_steps stops the run in the middle of its schedule, else None."""
    steps = steps_per_epoch * config.max_epoch
    if not 0 < config.max_steps < steps:
        return None
    rate = create_schedule(config)(config.max_steps - 1, steps_per_epoch)
    return (
        f"max_steps={config.max_steps} stops before the schedule, of {steps} steps, ends: the last "
        f"learning rate is {rate:.3g}"
    )


def duplicate_warnings(trainer: Trainer) -> list[str]:
    """Warnings on images that are in two classes, or in both training and validation."""
    train, validation = trainer.data.train, trainer.data.validation
    same = trainer.fingerprints[0] == trainer.fingerprints[1]
    if validation is None or not (same and train.looks_like(validation)):
        return duplicate_messages(train, validation)
    # The folder itself, a link to it, or a copy of it; also of a form that is not files.
    count = len(validation)
    return [
        *duplicate_messages(train, None),
        f"{WARNING}{count} of {count} validation images are training images too; the accuracy says "
        "little about unseen images",
    ]


def val_loss_hint(config: Config) -> str | None:
    """A message on losses that cannot be compared, else None."""
    is_plain = config.loss == "cross_entropy" and config.class_weights == "none"
    if is_plain or not config.evaluates:
        return None
    what = f"{config.loss}{'' if config.class_weights == 'none' else ' with class_weights'}"
    return (
        f"training minimises {what}, but val_loss is the softmax cross-entropy: do not compare one "
        "with the other"
    )


def ranks_hint(config: Config, communicator: Communicator, kernels: KernelChoice) -> str | None:
    """A hint if several ranks on this machine would be faster, else None.

    oneDNN's kernels use the cores of one process as well as ranks do; MindSpore's own kernels do
    not (docs/distributed.md).
    """
    cores = available_cores()
    alone = communicator.size == 1 and config.run_distribute is not False
    if config.device_target != "CPU" or kernels.library or not alone or cores < 2:
        return None
    return (
        f"one process computes on {cores} cores; --ranks=auto, one rank per core, trains 1.1 to "
        "1.5 times as fast with these kernels on 2 cores"
    )


def log_speed(trainer: Trainer, images_per_second: float) -> None:
    """Log the speed in the model zoo's words. A run that was resumed at its end has none."""
    if images_per_second:
        trainer.recorder.log(
            f"FPS: {images_per_second:.2f} img/s in total, "
            f"{images_per_second / trainer.communicator.size:.2f} img/s per device, "
            f"{images_per_second / trainer.batches.global_batch_size:.2f} it/s"
        )
