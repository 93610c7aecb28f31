"""The network of a checkpoint or an exported file: its configuration, form and class names."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import index
from pathlib import Path
from typing import Any

import numpy as np

from src.cli.config import DIGITS, Affects, Config, keys_affecting, validated
from src.cli.flags import current_keys, flags_without_effect
from src.cli.recipes import load_config
from src.dataset.batches import global_batch_size
from src.dataset.image_set import ImageSet, are_numbers
from src.dataset.splits import open_eval_part, open_train_part, validation_path
from src.models.blocks import BLOCKS, find_block, recognise_block
from src.models.networks import NETWORKS, aliases, count_classes
from src.models.published_weights import published_as, published_at
from src.models.weight_files import Arrays
from src.utils.errors import UserError
from src.utils.log import WARNING

# Checkpoints of version 0.2 and before did not record these; there was only one value.
_FORMER_SETTINGS: dict[str, Any] = {
    "eval_resize_mode": "square",
    "crop_pct": 0.875,
    "interpolation": "bilinear",
    "antialias": False,
}
# Up to this number of folders 0, 1, 2 ... the order of text is that of numbers.
_ONE_DIGIT = 10
# Listing more training images than this takes long.
_MAX_COMPARED = 100_000
# How torchvision, timm and the ACNet repository evaluate.
_FOREIGN_SETTINGS = {
    "eval_resize_mode": "shorter_side",
    "interpolation": "bilinear",
    "antialias": True,
}
# timm's key of preprocessing, ours, and {timm's value: ours}.
_TIMM_WORDS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("interpolation", "interpolation", {"bilinear": "bilinear", "bicubic": "bicubic"}),
    ("crop_mode", "eval_resize_mode", {"center": "shorter_side", "squash": "square"}),
)


@dataclass(frozen=True)
class CheckpointModel:
    """What a checkpoint holds.

    Attributes:
        config: its resolved configuration.
        fused: whether its blocks are fused.
        class_to_index: its class map, or None.
        notes: sentences that the user should read.
    """

    config: Config
    fused: bool
    class_to_index: dict[str, int] | None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        arrays: Arrays,
        metadata: Mapping[str, Any],
        flags: Mapping[str, Any],
        path: Path | None = None,
    ) -> "CheckpointModel":
        """The model of a file as ``read_weights`` returns it.

        Flags override recorded values. Files of other programs record nothing: there, the file name
        and the names of the weights show what the file holds.

        Args:
            path: the file; class_indexing.json may be next to it.

        Raises:
            UserError: if flags or the weights contradict what is recorded.
        """
        recorded = {
            **_recorded_data(metadata, flags),
            **infer_model_settings(arrays, metadata, path, flags),
        }
        fused = bool(metadata.get("fused", False))
        if not metadata.get("config"):
            recorded["data_path"] = ""
            fused = _is_fused_foreign_file(arrays, flags)
        network = flags.get("network", recorded.get("network"))
        if network is None:
            raise UserError("the checkpoint does not name its network; pass --network=NAME")
        classes = count_classes(arrays, network) or recorded.get("num_classes", 0)
        if arrays and not classes:
            raise UserError(
                f"'{path}' has no classifier: the weights are those of a backbone; "
                f"'python3 train.py --config_path=finetune --pretrained={path} --data_path=DIR' "
                "trains one"
            )
        config = load_config(flags, checkpoint_layer={**recorded, "num_classes": classes})
        class_to_index: dict[str, int] | None
        if config.class_names:
            class_to_index = read_class_names(config.class_names, config.num_classes)
            own = metadata.get("class_to_index") or {}
            if any(own.get(name, label) != label for name, label in class_to_index.items()):
                raise UserError(
                    f"--class_names lists the class names of '{path}' in a different order from "
                    "training"
                )
        else:
            class_to_index = recorded_classes(metadata, path, config.num_classes)
        notes = _notes(config, metadata.get("config", {}), flags, path)
        return cls(config, fused, class_to_index, tuple(notes))

    @property
    def prediction_notes(self) -> tuple[str, ...]:
        """``notes`` for commands that always prepare images with this program's own pipeline."""
        if self.config.input_pipeline == "own":
            return self.notes
        return (
            *self.notes,
            f"{WARNING}training prepared images with input_pipeline={self.config.input_pipeline}, "
            "which ignores their orientation and transparency; this command does not",
        )

    @property
    def has_branches(self) -> bool:
        """Whether its network has blocks that can be fused."""
        return bool(find_block(self.config.block).kernels) and not self.fused

    def open_training_images(self) -> ImageSet:
        """The images that it was trained on, or those of --data_path.

        Raises:
            UserError: if there are none.
        """
        return open_train_part(self.config, self.class_to_index)

    def open_images(self) -> ImageSet:
        """The images to evaluate on: those of --data_path, or the recorded validation images.

        Raises:
            UserError: if there are none, or their labels do not fit the network.
        """
        images = open_eval_part(self.config, self.class_to_index)
        if images.num_classes > self.config.num_classes:
            raise UserError(
                f"the data in '{self.config.data_path}' has {images.num_classes} classes but the "
                f"checkpoint was trained with {self.config.num_classes}"
            )
        return images if self.class_to_index else self._with_numbered_classes(images)

    def _with_numbered_classes(self, images: ImageSet) -> ImageSet:
        """The images with the labels of a network whose classes have no names.

        Folders that are numbers are labels. Other folders are labelled in the order of their names,
        which is right only if there is one for every class.

        Raises:
            UserError: if there are fewer, or the numbers are 1, 2, 3 and so on.
        """
        path = Path(self.config.eval_data_path or self.config.data_path)
        names, classes = images.class_to_index, self.config.num_classes
        if images.is_list or str(path) == DIGITS:
            return images
        numbered = are_numbers(names)
        counts_from_1 = numbered and sorted(map(int, names)) == [*range(1, len(names) + 1)]
        if numbered and len(set(map(int, names))) < len(names):
            raise UserError(f"'{path}' has two class folders of one number, as 1 and 01 are")
        if numbered and not counts_from_1 and all(int(name) < classes for name in names):
            numbers = np.zeros(images.num_classes, np.int32)
            for name, label in names.items():
                numbers[label] = int(name)
            return replace(
                images,
                class_to_index={name: int(name) for name in names},
                labels=numbers[images.labels],
                most_classes=classes,
            )
        if len(names) != classes or (numbered and sorted(names, key=int) != list(names)):
            raise UserError(
                f"the network has {classes} classes without names and '{path}' has {len(names)} "
                "class folders, so it is unknown which class each folder is; pass "
                "--class_names=FILE, a text file with one class name per line"
            )
        return images


def _notes(
    config: Config, recorded: Mapping[str, Any], flags: Mapping[str, Any], path: Path | None
) -> list[str]:
    """Warnings on what the recipe and the flags change, and on flags that change nothing."""
    keys = ("crop_pct", "eval_resize", "reduced_decoding", "calibration_images")
    notes = flags_without_effect({k: flags[k] for k in keys if k in flags}, config, ranks=1)
    is_onnx = config.eval_engine == "onnx" or (path is not None and path.suffix == ".onnx")
    if is_onnx and "amp_level" in flags and config.amp_level not in ("auto", "O0"):
        notes.append(f"{WARNING}--amp_level changes nothing with onnxruntime, which uses float32")
    warning = _recipe_warning(config, recorded, flags)
    return [*notes, *([warning] if warning else [])]


def _recipe_warning(
    config: Config, recorded: Mapping[str, Any], flags: Mapping[str, Any]
) -> str | None:
    """A warning if the recipe changes the network or preprocessing that a checkpoint records."""
    recipe, present = flags.get("config_path"), config.model_dump(mode="json")
    before = current_keys(recorded)
    changed = [
        key
        for key in sorted(keys_affecting(Affects.MODEL) & before.keys())
        if key not in flags and before[key] != present[key]
    ]
    if not recipe or not changed:
        return None
    return (
        f"{WARNING}--config_path={recipe} changes {', '.join(changed)} from what the checkpoint "
        "records; leave it out to keep the recorded values"
    )


def recorded_classes(
    metadata: Mapping[str, Any], path: Path | None, classes: int
) -> dict[str, int] | None:
    """The class map in a file of weights, in class_indexing.json or timm's config.json next to it.

    None if there is none.

    Raises:
        UserError: if it does not have ``classes`` names.
    """
    return (
        metadata.get("class_to_index")
        or _class_map_beside(path, classes)
        or _timm_class_map(path, classes)
    )


def open_recorded_training_images(
    metadata: Mapping[str, Any], class_to_index: Mapping[str, int] | None
) -> ImageSet | None:
    """The images that a checkpoint was trained on, if they are where they were and not very many.

    Args:
        metadata, class_to_index: what the checkpoint records.
    """
    recorded = metadata.get("config", {})
    steps = metadata.get("steps_per_epoch", 0)
    if not steps or not recorded.get("data_path"):
        return None
    try:
        config = validated(current_keys(recorded))
        if steps * global_batch_size(config, metadata["world_size"]) > _MAX_COMPARED:
            return None
        images = open_train_part(config, class_to_index)
    except (UserError, OSError):  # such as somebody else's folder
        return None
    return images if images.fingerprint() == metadata.get("images") else None


def first_label_message(model: CheckpointModel, images: ImageSet) -> str | None:
    """A message if folders are taken as labels and may count from 1; None otherwise."""
    names = images.class_to_index
    if model.class_to_index or images.is_list or images.pixels is not None:
        return None
    if not are_numbers(names):
        return None
    if any(label != int(name) for name, label in names.items()):
        return None
    shown = f"{WARNING}the class folders {', '.join([*names][:3])} ... are taken as labels"
    if min(map(int, names)) > 0:
        return f"{shown} that count from 0; if they count from 1, pass --class_names=FILE"
    if model.config.num_classes > _ONE_DIGIT:
        return (
            f"{shown}, the folder 10 as label 10; if the network was trained on folders in the "
            "order of text (0, 1, 10, 11, ...), as torchvision sorts them, pass --class_names=FILE"
        )
    return None


def infer_model_settings(
    arrays: Arrays,
    metadata: Mapping[str, Any],
    path: Path | None,
    flags: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """{key: value} of a file's network and preprocessing.

    Our checkpoints record them. For a file of another program they come from, in this order: the
    evaluation that such programs share, the block that the names of the weights show, the network
    that the file name begins with, and timm's config.json next to the file.

    Args:
        arrays, metadata: the result of ``read_weights``.
        path: the file; None for exported files, which record everything.
        flags: {key: value as typed}, which win over the result.

    Raises:
        UserError: if config.json is damaged, is of another network, or asks for what does not exist
            here and no flag replaces.
    """
    model_keys = keys_affecting(Affects.MODEL)
    recorded = current_keys(metadata.get("config", {}))
    own = {key: value for key, value in recorded.items() if key in model_keys}
    if own:
        if "crop_pct" not in own:
            # They rounded to the nearest pixel.
            side = round(own["image_size"] / _FORMER_SETTINGS["crop_pct"])
            own["eval_resize"] = own.get("eval_resize") or side
        return {**_FORMER_SETTINGS, **own}
    settings: dict[str, Any] = {"block": recognise_block(arrays)[0], **_FOREIGN_SETTINGS}
    if path is not None:
        if network := _network_in_name(path.stem):
            settings["network"] = network
        settings |= _timm_settings(path, flags or {}, settings.get("network"))
    return settings


def read_class_names(file: str, classes: int) -> dict[str, int]:
    """{name: label} from a text file with one name per line, or from a class_indexing.json.

    Lines are in the order of labels, from 0.

    Raises:
        UserError: if the file cannot be read, names a class twice, or does not have ``classes``
            names.
    """
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as failure:
        reason = getattr(failure, "strerror", None) or "it is not text"
        raise UserError(f"cannot read class_names '{file}': {reason}") from None
    if file.endswith(".json"):
        return _parse_class_map(text, Path(file), classes)
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if len(names) != classes:
        raise UserError(
            f"class_names '{file}' has {len(names)} names, one per line, but the network has "
            f"{classes} classes"
        )
    class_to_index = {name: label for label, name in enumerate(names)}
    if len(class_to_index) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"class_names '{file}' has '{twice}' twice; class names must be unique")
    return class_to_index


def _recorded_data(metadata: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """{key: value} of the recorded images and batch size, as far as flags do not replace them."""
    kept = keys_affecting(Affects.IMAGES, Affects.BATCH) | {"seed"}
    recorded = {k: v for k, v in metadata.get("config", {}).items() if k in kept}
    data_path = recorded.get("data_path")
    if flags.get("eval_data_path"):
        if flags.get("val_split", "auto") != "auto" and float(flags["val_split"]):
            raise UserError(
                "val_split and eval_data_path both choose the validation images; give only one of "
                "them"
            )
        recorded.pop("val_split", None)
        recorded.pop("dataset_format", None)
    if "data_path" in flags:
        recorded.pop("eval_data_path", None)
        # Keep the split if the data is the training folder: evaluate on the held-out part.
        if os.path.realpath(flags["data_path"]) != os.path.realpath(data_path or os.devnull):
            recorded.pop("val_split", None)
            recorded.pop("dataset_format", None)
    elif data_path and not recorded.get("eval_data_path") and not recorded.get("val_split"):
        recorded["eval_data_path"] = validation_path(data_path) or ""
    return recorded


def _is_fused_foreign_file(arrays: Arrays, flags: Mapping[str, Any]) -> bool:
    block, fused = recognise_block(arrays)
    # If the user names a block and the weights show none, the block is fused.
    named = find_block(flags.get("block", block))
    return fused or (block == "base" and named != BLOCKS["base"])


def _network_in_name(stem: str) -> str | None:
    """The network whose name or alias a file name begins with, the longest one."""
    known = {**{name: name for name in NETWORKS}, **aliases()}
    name = stem.lower().replace("-", "_")
    matches = [candidate for candidate in known if name.startswith(candidate)]
    return known[max(matches, key=len)] if matches else None


def _timm_settings(path: Path, flags: Mapping[str, Any], network: str | None) -> dict[str, Any]:
    """{key: value} from timm's config.json next to ``path``: architecture and preprocessing.

    Args:
        network: what the name of the file says.

    Raises:
        UserError: if the architecture contradicts the file's name or a flag, or for preprocessing
            that does not exist here, unless a flag replaces it.
    """
    file, timm = path.with_name("config.json"), _read_timm_config(path)
    settings: dict[str, Any] = {
        key: timm[key] for key in ("mean", "std", "crop_pct") if key in timm
    }
    if architecture := timm.get("architecture"):
        settings["network"] = _known_network(str(architecture).partition(".")[0])
        if "network" in flags and _known_network(str(flags["network"])) != settings["network"]:
            raise UserError(
                f"--network={flags['network']} contradicts {file}, which is of {architecture}"
            )
        if network not in (None, settings["network"]):
            raise UserError(
                f"{file} is of {architecture} and '{path}' of {network}; move one of them to "
                "another folder"
            )
        if settings["network"] is None:
            raise UserError(f"{file} is of {architecture}, a network that does not exist here")
    changes = timm.get("model_args") or {}
    if changes:
        raise UserError(
            f"{file} has model_args={changes}, which change the network; only its default form is "
            "supported"
        )
    if timm.get("global_pool", "avg") != "avg":
        raise UserError(
            f"{file} has global_pool={timm['global_pool']}; only average pooling is supported"
        )
    for word, key, values in _TIMM_WORDS:
        if word in timm and key not in flags:
            if timm[word] not in values:
                raise UserError(
                    f"{file} has {word}={timm[word]}, which is not supported; choose with --{key}"
                )
            settings[key] = values[timm[word]]
    size = timm.get("input_size")
    if size is not None and "image_size" not in flags:
        if not (isinstance(size, list) and len(size) == 3 and size[0] == 3 and size[1] == size[2]):
            raise UserError(
                f"{file} has input_size={size}; images are [3, SIDE, SIDE] here: choose with "
                "--image_size"
            )
        settings["image_size"] = size[-1]
    return settings


def _known_network(name: str) -> str | None:
    """The network of this very name or alias."""
    return name if name in NETWORKS else aliases().get(name)


def _timm_class_map(path: Path | None, classes: int) -> dict[str, int] | None:
    """The class map in timm's config.json next to ``path``, or None.

    Raises:
        UserError: if it names a class twice, or does not have ``classes`` names.
    """
    names = _read_timm_config(path).get("label_names") if path is not None else None
    if path is None or names is None:
        return None
    file = path.with_name("config.json")
    if not isinstance(names, list):
        raise UserError(f"{file} has label_names that are not a list; pass --class_names=FILE")
    class_to_index = {str(name): label for label, name in enumerate(names)}
    if len(class_to_index) < len(names) or len(names) != classes:
        raise UserError(
            f"{file} has {len(class_to_index)} different label_names, but the network has "
            f"{classes} classes; pass --class_names=FILE"
        )
    return class_to_index


def _read_timm_config(path: Path) -> dict[str, Any]:
    """timm's config.json next to ``path``, with its pretrained_cfg; {} without a file."""
    if published := published_at(path):
        return published.timm_config
    file = path.with_name("config.json")
    if not file.is_file() and (published := published_as(path.name)):
        return published.timm_config
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if not isinstance(content, dict):
            return {}
        return {**content, **content.get("pretrained_cfg", {})}
    except (OSError, ValueError, TypeError):
        raise UserError(
            f"{file} is damaged: it must be the JSON that timm writes next to weights"
        ) from None


def _class_map_beside(path: Path | None, classes: int) -> dict[str, int] | None:
    """The class map in class_indexing.json in the folder of ``path``, or in its run folder."""
    if path is None:
        return None
    run_folder = path.parent.parent if path.parent.name.startswith("ckpt_") else path.parent
    file = run_folder / "class_indexing.json"
    if not file.is_file():
        return None
    return _parse_class_map(file.read_text(encoding="utf-8"), file, classes)


def _parse_class_map(text: str, file: Path, classes: int) -> dict[str, int]:
    try:
        class_to_index = {str(name): index(label) for name, label in json.loads(text).items()}
    except (ValueError, AttributeError, TypeError):
        raise UserError(
            f'{file} must map class names to indices, as in {{"cat": 0, "dog": 1}}'
        ) from None
    if sorted(class_to_index.values()) != list(range(classes)):
        raise UserError(
            f"{file} does not have one name for each of the network's {classes} classes; pass "
            "--class_names=FILE that does"
        )
    return class_to_index
