"""What a checkpoint tells of its network: enough to build it, read its data and name its classes."""

import json
from dataclasses import dataclass
from pathlib import Path

from src.dataset.sources import open_images, validation_path
from src.models.weights import classes_in
from src.training.setup import create_network
from src.utils.config import Config, load_config
from src.utils.errors import UserError

# Keys of a run that describe its network and its images; the others are the run's own business.
_KEYS = ("network", "block", "num_classes", "image_size", "gamma_init", "dropout", "eval_resize", "mean", "std",
         "data_path", "eval_data_path", "dataset_format", "per_batch_size", "global_batch_size")


@dataclass(frozen=True)
class RecordedModel:
    """The resolved configuration of a checkpoint, whether its ACBs are fused, and its class map.

    Checkpoints of other programs record nothing: flags and the weights' names say what they are.
    """

    config: Config
    fused: bool
    class_to_index: dict

    @classmethod
    def of(cls, arrays, metadata, flags, folder=None):
        """The model of a checkpoint as ``read_weights`` returns it; ``flags`` win over what it records.

        Args:
            folder: where to look for class_indexing.json if the checkpoint itself has no class map.

        Raises:
            UserError: where flags or the weights contradict what is recorded.
        """
        recorded = {key: value for key, value in metadata.get("config", {}).items() if key in _KEYS}
        if "data_path" in flags:
            recorded.pop("eval_data_path", None)
        elif recorded.get("data_path") and not recorded.get("eval_data_path"):
            recorded["eval_data_path"] = validation_path(recorded["data_path"]) or ""
        has_acb = any("square_conv." in name for name in arrays)
        has_fused = any("fused_conv." in name for name in arrays)
        if not recorded:
            recorded = {"block": "acb" if has_acb or has_fused else "base", "data_path": ""}
        network = flags.get("network", recorded.get("network"))
        if network is None:
            raise UserError("the checkpoint does not say of which network it is; pass --network=NAME")
        recorded["num_classes"] = classes_in(arrays, network) or recorded.get("num_classes", 0)
        config = load_config(flags, checkpoint_layer=recorded)
        fused = config.block == "acb" and not has_acb
        return cls(config, fused, metadata.get("class_to_index") or _class_map_beside(folder))

    def build(self):
        """The network, its weights still to be loaded."""
        return create_network(self.config, self.fused)

    def open_images(self):
        """The images to evaluate on: those of --data_path, or the validation images of the recorded run.

        Raises:
            UserError: where there are none, or their labels do not fit the network.
        """
        path = self.config.eval_data_path or self.config.data_path
        if not path:
            raise UserError("no images to evaluate on: pass --data_path=DIR")
        images = open_images(path, "val", self.config.dataset_format, self.class_to_index)
        if images.num_classes > self.config.num_classes:
            raise UserError(f"the data in '{self.config.data_path}' has {images.num_classes} classes but the checkpoint "
                            f"was trained with {self.config.num_classes}")
        return images


def _class_map_beside(folder):
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
