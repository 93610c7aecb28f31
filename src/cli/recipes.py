"""Resolves defaults, checkpoints, recipes and flags into one configuration."""

import os
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import yaml

from src.cli.config import DEFAULT_CONFIG, DIGITS, RECIPES, Config, default_yaml, validated
from src.cli.flags import ALIASES, OVERRULED_BY, current_keys, empty_to_none, known_keys
from src.models.networks import network_image_size, network_settings, recipe_of_alias
from src.utils.errors import UserError, suggestion


class _DoubleKey(Exception):
    """A key that a recipe has twice."""


class _RecipeLoader(yaml.SafeLoader):
    """Refuses duplicate keys, and reads numbers as the command line does.

    YAML 1.1 reads 010 as 8 and 1:30 as 90, and takes the last of two equal keys.
    """

    # Numbers stay text, which the configuration reads as it reads flags.
    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own form
        first: [
            (tag, pattern)
            for tag, pattern in resolvers
            if tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        names = [key.value for key, _ in node.value]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise _DoubleKey(f"has '{twice}' twice")
        return node


def load_config(
    flags: Mapping[str, Any],
    checkpoint_layer: Mapping[str, Any] | None = None,
    pretrained_layer: Mapping[str, Any] | None = None,
) -> Config:
    """Resolve the configuration from its layers; the last one wins.

    1. the defaults, 2. the network's own settings, 3. what a checkpoint or pretrained weights
    record, 4. the recipe, 5. the flags.

    Without a recipe, a data path or a checkpoint, the recipe of the bundled digits is used. ACNet's
    short names (``-a sres18``) stand for their recipes.

    Args:
        flags: {key: value}, as from ``parse_flags``; "config_path" names the recipe.
        checkpoint_layer: {key: value} recorded in a checkpoint.
        pretrained_layer: {key: value} recorded with the weights that training starts from; unlike a
            checkpoint they do not change which recipe is implied.

    Raises:
        UserError: for an unreadable file, an unknown key or a value out of range.
    """
    flags = dict(flags)
    recipe = flags.pop("config_path", "")
    if not recipe and "network" not in (checkpoint_layer or {}):
        recipe = _implied_recipe(flags, with_digits=checkpoint_layer is None)
    layers = [
        checkpoint_layer or {},
        pretrained_layer or {},
        read_recipe(find_recipe(recipe)) if recipe else {},
        empty_to_none(flags),
    ]
    network = next((layer["network"] for layer in reversed(layers) if "network" in layer), "")
    config = validated(reduce(merge_layers, layers, network_settings(network)))
    has_weights = checkpoint_layer is not None or pretrained_layer is not None
    # Until the settings of those weights are read, the image size is unknown.
    is_known = has_weights or not config.checkpoint_file_path
    if is_known and 0 < config.eval_resize < config.image_size:
        raise UserError(
            f"eval_resize={config.eval_resize} must not be below image_size={config.image_size}"
        )
    return config


def merge_layers(below: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """The {key: value} of ``below`` with those of ``layer`` on top.

    A key of ``layer`` also wins over another key of ``below`` that would overrule it. With another
    image_size, eval_resize keeps its ratio to it.
    """
    below = current_keys(below)
    overruling = {
        other: 0 for key, other in OVERRULED_BY.items() if key in layer and other not in layer
    }
    return current_keys({**below, **_scaled_resize(below, layer), **overruling, **layer})


def _scaled_resize(below: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, int]:
    """{"eval_resize": pixels} if ``layer`` changes the image_size that it was chosen for."""
    before = below.get("image_size")
    if before is None and below.get("network"):
        before = network_image_size(below["network"])
    # Recipes and flags have numbers as text.
    values = [str(v) for v in (below.get("eval_resize"), before, layer.get("image_size"))]
    if not all(value.isdigit() and int(value) for value in values):
        return {}
    resize, size_before, size = map(int, values)
    return {"eval_resize": round(resize * size / size_before)}


def check_default_config() -> None:
    """Raise UserError if default_config.yaml was edited: it is generated, and nobody reads it."""
    if DEFAULT_CONFIG.is_file() and DEFAULT_CONFIG.read_text(encoding="utf-8") != default_yaml():
        raise UserError(
            "default_config.yaml was changed, but it only shows the defaults; put your values into "
            "a recipe (--config_path=FILE), and restore the file with "
            "'python3 -m src.cli.config > default_config.yaml'"
        )


def read_recipe(path: str | Path) -> dict[str, Any]:
    """{key: value} of a YAML file, on top of the recipe that its ``extends`` names.

    Raises:
        UserError: for an unreadable file, an unknown key, or recipes that extend each other.
    """
    return _read_with_base(Path(path), ())


def find_recipe(recipe: str, extending: Path | None = None) -> Path:
    """The file of a recipe given by name or path.

    A path is relative to the current folder, or to that of this program.

    Args:
        extending: the file that names the recipe; a path is relative to its folder first.

    Raises:
        UserError: if there is no such file.
    """
    folders = [*([extending.parent] if extending else []), Path(), DEFAULT_CONFIG.parent]
    for path in (RECIPES / f"{recipe}.yaml", *(folder / recipe for folder in folders)):
        if os.path.isfile(path):
            return path
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    near = suggestion(Path(recipe).stem, names)
    raise UserError(f"no configuration file '{recipe}'{near}; recipes by name: {', '.join(names)}")


def _read_with_base(path: Path, extending: tuple[Path, ...]) -> dict[str, Any]:
    layer = _read_yaml(path)
    extended = layer.pop("extends", None)
    for key in layer:
        if key not in known_keys():
            near = suggestion(key, (*known_keys(), "extends"))
            raise UserError(f"{path}: unknown key '{key}'{near}")
    own: dict[str, Any] = {}
    for key, value in layer.items():
        name = ALIASES.get(key, key)
        if name in own:
            raise UserError(f"{path} has '{name}' twice, once under another name; keep one")
        own[name] = value
    if extended is None:
        return own
    base = find_recipe(str(extended), path)
    if base.resolve() in (file.resolve() for file in (path, *extending)):
        raise UserError(f"{path}: 'extends: {extended}' leads back to this recipe")
    return merge_layers(_read_with_base(base, (path, *extending)), own)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        layer = yaml.load(path.read_text(encoding="utf-8"), _RecipeLoader)
    except (OSError, UnicodeDecodeError) as failure:
        reason = getattr(failure, "strerror", None) or failure
        raise UserError(f"cannot read the configuration {path}: {reason}") from None
    except _DoubleKey as failure:
        raise UserError(f"{path} {failure}") from None
    except (yaml.YAMLError, RecursionError) as failure:
        mark = getattr(failure, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise UserError(f"{path} is not valid YAML{line}") from None
    if not isinstance(layer, dict):
        raise UserError(f"{path} must contain 'key: value' lines")
    return layer


def _implied_recipe(flags: dict[str, Any], with_digits: bool) -> str:
    """The recipe that flags without config_path imply.

    An alias that stands for a recipe is removed from ``flags``.
    """
    recipe = recipe_of_alias(flags.get("network"))
    if recipe is not None:
        del flags["network"]
        return recipe
    return DIGITS if with_digits and not flags.get("data_path") else ""
