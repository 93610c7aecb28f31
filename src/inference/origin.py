"""What a file of weights says of the network that they are for, whoever wrote it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.models.blocks import recognise_block
from src.models.formats import Arrays
from src.models.networks import NETWORKS, aliases
from src.utils.config import Affects, keys_affecting
from src.utils.errors import UserError

# What checkpoints of version 0.2 and before did not record, because there was one way only.
_NOT_RECORDED_BEFORE = {"eval_resize_mode": "square", "crop_pct": 0.875, "interpolation": "bilinear", "antialias": False}
# For files of other programs: the evaluation of torchvision, timm and the ACNet repository.
_PREPROCESSING_ELSEWHERE = {"eval_resize_mode": "shorter_side", "interpolation": "bilinear", "antialias": True}


def recorded_model(arrays: Arrays, metadata: Mapping[str, Any], path: Path | None) -> dict[str, Any]:
    """{key: value} of a file's network and of how images are prepared for it.

    Our checkpoints record them. For a file of another program: the block that the weights' names show, the evaluation that such programs
    have in common, what a config.json of timm's says beside it, and the network whose name its own begins with.

    Args:
        arrays, metadata: what ``read_weights`` gave.
        path: the file; None for exported ones, which record everything.
    """
    own = {key: value for key, value in metadata.get("config", {}).items() if key in keys_affecting(Affects.MODEL)}
    if own:
        return {**_NOT_RECORDED_BEFORE, **own}
    found: dict[str, Any] = {"block": recognise_block(arrays)[0], **_PREPROCESSING_ELSEWHERE}
    if path is not None:
        if network := _named_by(path.stem):
            found["network"] = network
        found |= _timm_keys(path.with_name("config.json"))
    return found


def _named_by(stem: str) -> str | None:
    """The network whose name or alias a file's name begins with, the longest."""
    known = {**{name: name for name in NETWORKS}, **aliases()}
    fitting = [name for name in known if stem.lower().replace("-", "_").startswith(name)]
    return known[max(fitting, key=len)] if fitting else None


def _timm_keys(file: Path) -> dict[str, Any]:
    """What timm writes beside a model.safetensors: architecture and preprocessing, as far as there are such things here."""
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        prepared = {**content, **content.get("pretrained_cfg", {})} if isinstance(content, dict) else {}
    except (OSError, ValueError, TypeError):
        raise UserError(f"{file} is damaged: it must be the JSON that timm writes beside weights") from None
    found: dict[str, Any] = {}
    if network := _named_by(str(prepared.get("architecture", ""))):
        found["network"] = network
    for key in ("mean", "std", "crop_pct"):
        if key in prepared:
            found[key] = prepared[key]
    if prepared.get("interpolation") in ("bilinear", "bicubic"):
        found["interpolation"] = prepared["interpolation"]
    if prepared.get("crop_mode") == "squash":
        found["eval_resize_mode"] = "square"
    size = prepared.get("input_size")
    if isinstance(size, list) and len(size) == 3 and isinstance(size[-1], int):
        found["image_size"] = size[-1]
    return found
