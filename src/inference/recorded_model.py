"""What a checkpoint says about its network: enough to build it, read its data and name its classes."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindspore import nn

from src.dataset.image_set import ImageSet
from src.dataset.sources import open_images, split_share, validation_path
from src.inference.origin import recorded_model
from src.kernels.library import KernelLibrary
from src.models.blocks import BLOCKS, find_block, recognise_block
from src.models.build import create_network
from src.models.formats import Arrays
from src.models.weights import classes_in
from src.utils.config import Affects, Config, keys_affecting, load_config
from src.utils.errors import UserError


@dataclass(frozen=True)
class RecordedModel:
    """The resolved configuration of a checkpoint, whether its blocks are fused, and its class map.

    What the checkpoint records is believed. Files of other programs record nothing: flags and the weights' names say what
    they are.
    """

    config: Config
    fused: bool
    class_to_index: dict[str, int] | None

    @classmethod
    def of(cls, arrays: Arrays, metadata: Mapping[str, Any], flags: Mapping[str, Any], path: Path | None = None) -> "RecordedModel":
        """The model of a checkpoint as ``read_weights`` returns it; ``flags`` win over what it records.

        Args:
            path: the file; beside it lies class_indexing.json, if the checkpoint itself has no class map.

        Raises:
            UserError: if flags or the weights contradict what is recorded.
        """
        fused = bool(metadata.get("fused", False))
        recorded = {key: value for key, value in metadata.get("config", {}).items()
                    if key in keys_affecting(Affects.IMAGES, Affects.BATCH) | {"seed"}}
        if "data_path" in flags:
            recorded.pop("eval_data_path", None)
            # In the folder that was trained on, the part that was not.
            if os.path.realpath(flags["data_path"]) != os.path.realpath(recorded.get("data_path") or os.devnull):
                recorded.pop("val_split", None)
        elif recorded.get("data_path") and not recorded.get("eval_data_path") and not recorded.get("val_split"):
            recorded["eval_data_path"] = validation_path(recorded["data_path"]) or ""
        recorded |= recorded_model(arrays, metadata, path)
        if not metadata.get("config"):
            recorded["data_path"] = ""
            guessed, fused = recognise_block(arrays)
            # A block that is asked for and shows nowhere is one that is fused.
            fused = fused or (guessed == "base" and find_block(flags.get("block", guessed)) != BLOCKS["base"])
        network = flags.get("network", recorded.get("network"))
        if network is None:
            raise UserError("the checkpoint does not say of which network it is; pass --network=NAME")
        recorded["num_classes"] = classes_in(arrays, network) or recorded.get("num_classes", 0)
        config = load_config(flags, checkpoint_layer=recorded)
        named = read_class_names(config.class_names, config.num_classes) if config.class_names else None
        return cls(config, fused, named or metadata.get("class_to_index") or _class_map_beside(path))

    @property
    def has_branches(self) -> bool:
        """Whether its network has blocks that can be fused."""
        return bool(find_block(self.config.block).kernels) and not self.fused

    def build(self, kernels: KernelLibrary | None = None) -> nn.Cell:
        """The network, its weights still to be loaded."""
        return create_network(self.config, self.fused, kernels)

    def open_training_images(self) -> ImageSet:
        """The images that it was trained on, or those of --data_path. Raises UserError if there are none."""
        if not self.config.data_path:
            raise UserError("no training images: pass --data_path=DIR")
        images = open_images(self.config.data_path, "train", self.config.dataset_format, self.class_to_index)
        share = split_share(self.config)
        return images.split(share, self.config.seed)[0] if share else images

    def open_images(self) -> ImageSet:
        """The images to evaluate on: those of --data_path, or the validation images of the recorded run.

        Raises:
            UserError: if there are none, or their labels do not fit the network.
        """
        path = self.config.eval_data_path or self.config.data_path
        if not path:
            raise UserError("no images to evaluate on: pass --data_path=DIR")
        share = split_share(self.config)
        images = open_images(path, "train" if share else "val", self.config.dataset_format, self.class_to_index)
        if share:
            _, images = images.split(share, self.config.seed)
        if images.num_classes > self.config.num_classes:
            raise UserError(f"the data in '{self.config.data_path}' has {images.num_classes} classes but the checkpoint "
                            f"was trained with {self.config.num_classes}")
        return images


def read_class_names(file: str, classes: int) -> dict[str, int]:
    """{name: label} of a text file with a name a line, in the order of labels from 0, or of a class_indexing.json.

    Raises:
        UserError: if it cannot be read, names a class twice, or has not as many names as there are ``classes``.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as failure:
        raise UserError(f"cannot read class_names '{file}': {getattr(failure, 'strerror', None) or 'it is not text'}") from None
    if file.endswith(".json"):
        return _class_map(text, Path(file))
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if len(names) != classes:
        raise UserError(f"class_names '{file}' has {len(names)} names, a line each, but the network has {classes} classes")
    found = {name: label for label, name in enumerate(names)}
    if len(found) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"class_names '{file}' has '{twice}' twice; classes are told apart by their names")
    return found


def _class_map_beside(path: Path | None) -> dict[str, int] | None:
    """class_indexing.json beside ``path`` or in the folder above, or None."""
    for place in (path and path.parent, path and path.parent.parent):
        file = place and Path(place) / "class_indexing.json"
        if file and file.is_file():
            return _class_map(file.read_text(encoding="utf-8"), file)
    return None


def _class_map(text: str, file: Path) -> dict[str, int]:
    try:
        return {str(name): int(label) for name, label in json.loads(text).items()}
    except (ValueError, AttributeError, TypeError):
        raise UserError(f"{file} is damaged: it must map class names to indices") from None
