"""The images of a run and what must be right before it begins. Nothing here needs MindSpore, which takes seconds to import."""

from src.dataset.batches import HOW_TO_GO_ON, steps_per_epoch
from src.dataset.image_set import ImageSet
from src.dataset.sources import find_bad_image, open_images, split_share, validation_path
from src.models.networks import check_network
from src.parallel.communicator import Communicator
from src.utils.config import Config
from src.utils.errors import UserError


def check_training_keys(config: Config) -> None:
    """Raise UserError for keys that the network or the device does not support, or that need others."""
    check_network(config.network, config.image_size)
    if config.freeze_epochs and not (config.checkpoint_file_path or config.resume):
        raise UserError(f"freeze_epochs={config.freeze_epochs} trains the classifier alone at first, which needs a trained network under "
                        "it: pass --pretrained=FILE, or --freeze_epochs=0")
    if config.early_stopping and not (config.run_eval or config.val_split):
        raise UserError(f"early_stopping={config.early_stopping} needs validation images: add --run_eval=1 or --val_split=auto, or "
                        "--early_stopping=0")
    if config.device_target == "CPU":
        if config.precision == "O3":
            raise UserError("amp_level=O3 needs device_target=GPU or Ascend; CPU trains in float32 (O0) or bfloat16 (O2)")
        if config.sync_bn:
            raise UserError("sync_bn=1 needs device_target=GPU or Ascend; on CPU running statistics are averaged over "
                            "ranks, batch statistics are those of each rank")
        if config.reducer == "device":
            raise UserError("reducer=device needs device_target=GPU or Ascend; on CPU gradients go through MPI")
    elif config.gradient_compression != "none" and config.reducer != "mpi":
        raise UserError(f"gradient_compression={config.gradient_compression} compresses what MPI sends; add --reducer=mpi")


def resolve_data(config: Config, images: ImageSet) -> Config:
    """The configuration with the data's num_classes and val_split as a number. Raises UserError if a given number of classes differs."""
    if config.num_classes not in (0, images.num_classes):
        raise UserError(f"num_classes={config.num_classes} but the data in '{config.data_path}' has "
                        f"{images.num_classes} classes")
    resolved = config.model_copy(update={"num_classes": images.num_classes, "val_split": split_share(config)})
    if resolved.smoothing > 1:
        raise UserError(f"label_smooth_factor={config.label_smooth_factor:g} leaves the true one of {images.num_classes} classes less than "
                        "the others; use a smaller one")
    return resolved


def open_image_sets(config: Config, communicator: Communicator) -> tuple[ImageSet, ImageSet | None]:
    """The training images of ``config`` and, if it evaluates while training, the validation images, labelled alike.

    Raises:
        UserError: on every rank, for data that cannot be used or is not there.
    """
    if config.deploy and not (config.run_eval or config.val_split):
        raise UserError(f"deploy={'best' if config.deploy == 'best' else 1} evaluates the trained and the fused network in the end: add "
                        "--run_eval=1, or --deploy=0")
    images = _open_train_images(config, communicator)
    validation: ImageSet | None
    share = split_share(config)
    if share:
        if config.eval_data_path:
            raise UserError("val_split takes validation images from the training images and eval_data_path names others; give one of them")
        images, validation = images.split(share, config.seed)
        if not len(validation):
            raise UserError(f"val_split={share:g} finds no class with two images or more in '{config.data_path}'; add images, or train "
                            "without validation: --val_split=0 --run_eval=0 --early_stopping=0 --deploy=0")
    else:
        validation = _open_eval_images(config, images) if config.run_eval or config.val_split else None
    if not config.fit_batch:
        steps_per_epoch(len(images), config, communicator.size)
    return images, validation


def _open_train_images(config: Config, communicator: Communicator) -> ImageSet:
    images = open_images(config.data_path, "train", config.dataset_format)
    if config.bad_samples == "error":
        found = [message for messages in communicator.gather(find_bad_image(images, communicator.rank, communicator.size))
                 for message in messages]
        if found:
            raise UserError(f"{found[0]}; {HOW_TO_GO_ON}")
    return images


def _open_eval_images(config: Config, train_images: ImageSet) -> ImageSet:
    path = config.eval_data_path or validation_path(config.data_path)
    if path is None:
        raise UserError(f"run_eval=1 but no validation data lies beside '{config.data_path}'; pass --eval_data_path=DIR, or "
                        "--val_split=0.1 to split some off")
    return open_images(path, "val", config.dataset_format, train_images.class_to_index)
