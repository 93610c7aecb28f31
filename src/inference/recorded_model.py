"""What a checkpoint says about its network: enough to build it, read its data and name its classes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindspore import nn

from src.dataset.image_set import ImageSet
from src.dataset.sources import open_images, validation_path
from src.kernels.library import KernelLibrary
from src.models.blocks import BLOCKS, find_block, recognise_block
from src.models.build import create_network
from src.models.formats import Arrays
from src.models.weights import classes_in
from src.utils.config import Affects, Config, keys_affecting, load_config
from src.utils.errors import UserError

# What checkpoints of version 0.2 and before did not record, because there was one way only.
_NOT_RECORDED_BEFORE = {"eval_resize_mode": "square", "crop_pct": 0.875, "interpolation": "bilinear", "antialias": False}
# For files of other programs: the evaluation of torchvision, timm and the ACNet repository.
_PREPROCESSING_ELSEWHERE = {"eval_resize_mode": "shorter_side", "interpolation": "bilinear", "antialias": True}


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
    def of(cls, arrays: Arrays, metadata: Mapping[str, Any], flags: Mapping[str, Any], folder: Path | None = None) -> "RecordedModel":
        """The model of a checkpoint as ``read_weights`` returns it; ``flags`` win over what it records.

        Args:
            folder: where to look for class_indexing.json if the checkpoint itself has no class map.

        Raises:
            UserError: if flags or the weights contradict what is recorded.
        """
        fused = bool(metadata.get("fused", False))
        recorded = {key: value for key, value in metadata.get("config", {}).items()
                    if key in keys_affecting(Affects.MODEL, Affects.IMAGES, Affects.BATCH) | {"seed"}}
        if "data_path" in flags:
            recorded.pop("eval_data_path", None)
            recorded.pop("val_split", None)
        elif recorded.get("data_path") and not recorded.get("eval_data_path") and not recorded.get("val_split"):
            recorded["eval_data_path"] = validation_path(recorded["data_path"]) or ""
        if recorded:
            recorded = {**_NOT_RECORDED_BEFORE, **recorded}
        else:
            guessed, fused = recognise_block(arrays)
            recorded = {"block": guessed, "data_path": "", **_PREPROCESSING_ELSEWHERE}
            # A block that is asked for and shows nowhere is one that is fused.
            fused = fused or (guessed == "base" and find_block(flags.get("block", guessed)) != BLOCKS["base"])
        network = flags.get("network", recorded.get("network"))
        if network is None:
            raise UserError("the checkpoint does not say of which network it is; pass --network=NAME")
        recorded["num_classes"] = classes_in(arrays, network) or recorded.get("num_classes", 0)
        config = load_config(flags, checkpoint_layer=recorded)
        return cls(config, fused, metadata.get("class_to_index") or _class_map_beside(folder))

    @property
    def has_branches(self) -> bool:
        """Whether its network has blocks that can be fused."""
        return bool(find_block(self.config.block).kernels) and not self.fused

    def build(self, kernels: KernelLibrary | None = None) -> nn.Cell:
        """The network, its weights still to be loaded."""
        return create_network(self.config, self.fused, kernels)

    def open_images(self) -> ImageSet:
        """The images to evaluate on: those of --data_path, or the validation images of the recorded run.

        Raises:
            UserError: if there are none, or their labels do not fit the network.
        """
        path = self.config.eval_data_path or self.config.data_path
        if not path:
            raise UserError("no images to evaluate on: pass --data_path=DIR")
        images = open_images(path, "train" if self.config.val_split else "val", self.config.dataset_format, self.class_to_index)
        if self.config.val_split:
            _, images = images.split(self.config.val_split, self.config.seed)
        if images.num_classes > self.config.num_classes:
            raise UserError(f"the data in '{self.config.data_path}' has {images.num_classes} classes but the checkpoint "
                            f"was trained with {self.config.num_classes}")
        return images


def _class_map_beside(folder: Path | None) -> dict[str, int] | None:
    """class_indexing.json in ``folder`` or above it, or None."""
    for place in (folder, folder and folder.parent):
        file = place and Path(place) / "class_indexing.json"
        if file and file.is_file():
            try:
                found = json.loads(file.read_text(encoding="utf-8"))
                return {str(name): int(label) for name, label in found.items()}
            except (ValueError, AttributeError, TypeError):
                raise UserError(f"{file} is damaged: it must map class names to indices") from None
    return None
