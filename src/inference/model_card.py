"""A model card, written next to an exported network for whoever receives only that file.

Its parts follow Mitchell et al., "Model Cards for Model Reporting", 2019 (arXiv:1810.03993), as far
as they are known here.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.cli.config import Affects, Config, keys_affecting
from src.dataset.image_set import class_names
from src.dataset.splits import validation_path
from src.inference.checkpoint_model import CheckpointModel
from src.inference.metrics import interval
from src.models.networks import NetworkSize
from src.models.published_weights import find_published
from src.runs.run_folder import RunFolder
from src.utils.errors import UserError
from src.utils.files import write_atomically

_CLASSES_NAMED = 100


def card_of(file: Path) -> Path:
    """The file of the model card of an exported file."""
    return file.with_name(f"{file.name}.md")


@dataclass(frozen=True)
class Exported:
    """An exported file.

    Attributes:
        original, exported: the size of the network before and after fusion.
        difference: |logit - original| / largest |original|, the largest over random inputs and
            real images.
        temperature: what the outputs are divided by.
        model, recorded: what the checkpoint holds, and its metadata.
        is_fused: whether blocks became convolutions with biases and without batch norms.
    """

    path: Path
    original: NetworkSize
    exported: NetworkSize
    difference: float
    temperature: float
    model: CheckpointModel
    recorded: Mapping[str, Any]
    is_fused: bool = False


def write_card(exported: Exported, checkpoint: Path) -> Path:
    """Write the card of a file that was exported from ``checkpoint``. Returns its path.

    Raises:
        UserError: if it cannot be written.
    """
    file, model, metadata = exported.path, exported.model, exported.recorded
    config, recorded = model.config, metadata.get("config") or {}
    run = _run_of(checkpoint)
    sections = [
        f"# {file.name}",
        f"{config.network} for {config.num_classes} classes, exported from {checkpoint.name}. "
        + _outputs(exported),
        "## Figures",
        _figures(run, metadata, config),
        "## Data",
        _data(recorded),
        "## Preprocessing",
        _preprocessing(config),
        "## Classes",
        _classes(model),
        "## Weights and licence",
        _origin(recorded, config.checkpoint_file_path),
        "## How to repeat it",
        _repetition(run, metadata),
    ]
    card = card_of(file)
    text = "\n\n".join(sections) + "\n"
    write_atomically(card, lambda partial: partial.write_text(text, "utf-8", "backslashreplace"))
    return card


def _outputs(exported: Exported) -> str:
    rounding = f"by at most {exported.difference:.1e} of the largest"
    fused = (
        " Its blocks are fused to convolutions with biases and without batch norms."
        if exported.is_fused
        else ""
    )
    if exported.temperature == 1.0:
        return f"Its outputs differ from the checkpoint's {rounding}.{fused}"
    return (
        f"Its outputs are the checkpoint's divided by the temperature {exported.temperature:.4g}, "
        "which changes the probabilities but not the predicted classes; apart from that, they "
        f"differ {rounding}.{fused}"
    )


def _run_of(checkpoint: Path) -> RunFolder | None:
    try:
        return RunFolder.of_checkpoint(checkpoint)
    except UserError:  # it was moved, or is of another program
        return None


def _figures(run: RunFolder | None, metadata: Mapping[str, Any], config: Config) -> str:
    lines = run.read_metrics() if run is not None else []
    line = next((one for one in lines if one["step"] == metadata.get("step")), {})
    if "top1" not in line:
        return "Not evaluated in training; run `eval.py` to evaluate it."
    present = config.model_dump(mode="json")
    changed = [key for key in keys_affecting(Affects.MODEL) if _differs(key, metadata, present)]
    if changed:
        return f"None: training evaluated with other values of {', '.join(sorted(changed))}."
    how_many = f"{line['top1']:.2f} % of the validation images are right"
    if "correct" in line:
        low, high = interval(line["correct"], line["val_images"])
        how_many = (
            f"{line['correct']} of {line['val_images']} validation images are right: "
            f"{line['top1']:.2f} % (95 % interval {low:.1f} to {high:.1f} %)"
        )
    return (
        f"{how_many}, after epoch {line['epoch']}. If the epoch was chosen on these images, the "
        "figure is slightly optimistic. The accuracy on other kinds of images is unknown."
    )


def _differs(key: str, metadata: Mapping[str, Any], present: Mapping[str, Any]) -> bool:
    recorded = metadata["config"]
    return key in recorded and recorded[key] != present[key]


def _data(recorded: Mapping[str, Any]) -> str:
    if not recorded.get("data_path"):
        return "Not recorded in the file of weights."
    held_out = f"held out of each class, val_split={recorded.get('val_split')}"
    if recorded.get("eval_data_path") or not recorded.get("val_split"):
        path = recorded.get("eval_data_path") or validation_path(recorded["data_path"])
        held_out = f"`{path}`" if path else "none recorded"
    return f"Trained on `{recorded['data_path']}`. Validation images: {held_out}."


def _preprocessing(config: Config) -> str:
    resized = {"square": "both sides", "shorter_side": "the shorter side"}
    how = f"{config.interpolation}, {'with' if config.antialias else 'without'} antialiasing"
    takes = "The file does this itself, and takes uint8 images of any size: "
    return (
        f"{takes if config.onnx_preprocessing else ''}"
        f"RGB; {resized[config.eval_resize_mode]} resized to {config.resized_side} ({how}); the "
        f"central {config.image_size} x {config.image_size} pixels; values divided by 255; mean "
        f"{list(config.mean)} subtracted; divided by {list(config.std)}."
    )


def _classes(model: CheckpointModel) -> str:
    count = model.config.num_classes
    if model.class_to_index is None:
        return f"{count} without names."
    names = class_names(model.class_to_index, count)
    more = f" and {count - _CLASSES_NAMED} more" if count > _CLASSES_NAMED else ""
    return ", ".join(names[:_CLASSES_NAMED]) + more


def _origin(recorded: Mapping[str, Any], checkpoint: str) -> str:
    is_trained_here = bool(recorded.get("data_path"))
    name = recorded.get("checkpoint_file_path", "") if is_trained_here else checkpoint
    what = "Trained from" if is_trained_here else "These are"
    if (weights := find_published(name)) and not os.path.exists(name):
        return (
            f"{what} the published weights {weights.name}, trained on ImageNet ({weights.url}, "
            f"licence {weights.licence})."
        )
    if name:
        return f"{what} the weights in `{name}`; see their licence."
    return "Trained from random weights; the licence is for their owner to choose."


def _repetition(run: RunFolder | None, metadata: Mapping[str, Any]) -> str:
    if run is None:
        return "The run's folder is not known."
    environment = run.read_environment()
    versions = ", ".join(f"{key} {value}" for key, value in environment.items() if key != "hosts")
    ranks = metadata.get("world_size", 1)
    launcher = f"mpirun -n {ranks} " if ranks > 1 else ""
    distribute = " --run_distribute=1" if ranks > 1 else ""
    command = f"{launcher}python3 train.py --config_path={run.config}{distribute}"
    return f"`{command}` up to step {metadata['step']}; {versions or 'versions not recorded'}."
