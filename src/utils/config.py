"""The configuration: YAML layers and command-line flags, resolved into one typed, validated, frozen object."""

import os
from pathlib import Path
from types import NoneType
from typing import Annotated, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from src.utils.errors import UserError, suggestion

PROJECT_ROOT = Path(__file__).resolve().parents[2]
DEFAULT_CONFIG = PROJECT_ROOT / "default_config.yaml"
RECIPES = PROJECT_ROOT / "configs"
DIGITS = "digits"

# Other names of keys, from the systems that this program replaces.
ALIASES = {
    "data_dir": "data_path", "is_distributed": "run_distribute", "backbone": "network", "arch": "network", "a": "network",
    "block_type": "block", "b": "block", "pretrained": "checkpoint_file_path", "epochs": "max_epoch",
    "batch_size": "per_batch_size",
}


def _lower(value):
    return value.lower() if isinstance(value, str) else value


def _as_list(value):
    """`30,60,90` on the command line is a list."""
    if isinstance(value, str):
        return [part for part in value.strip("[]() ").replace(",", " ").split()]
    return [value] if isinstance(value, (int, float)) else value


Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
Rgb = Annotated[tuple[float, float, float], BeforeValidator(_as_list)]
Interval = Annotated[tuple[float, float], BeforeValidator(_as_list)]


class Config(BaseModel):
    """Every key of default_config.yaml, which says what each means; an instance is one resolved run."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    network: str
    block: Literal["base", "acb"]
    num_classes: NonNegative
    image_size: Annotated[int, Field(ge=8, le=2048)]
    gamma_init: Annotated[float, Field(gt=0)] | None
    dropout: Annotated[float, Field(ge=0, lt=1)]
    sync_bn: bool

    data_path: str
    eval_data_path: str
    dataset_format: Annotated[Literal["auto", "folder", "list", "cifar10"], BeforeValidator(_lower)]
    bad_samples: Annotated[Literal["error", "replace"], BeforeValidator(_lower)]
    num_parallel_workers: NonNegative

    train_crop: Annotated[Literal["random_resized", "padded", "resize"], BeforeValidator(_lower)]
    crop_scale: Interval
    crop_ratio: Interval
    crop_padding: NonNegative
    flip_probability: Probability
    color_jitter: Annotated[tuple[Probability, Probability, Probability], BeforeValidator(_as_list)]
    eval_resize: NonNegative
    mean: Rgb
    std: Annotated[tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]],
                   BeforeValidator(_as_list)]

    device_target: Annotated[Literal["CPU", "GPU", "Ascend"], BeforeValidator(
        lambda value: {"cpu": "CPU", "gpu": "GPU", "ascend": "Ascend"}.get(_lower(value), value))]
    device_id: NonNegative | None
    run_distribute: bool | None
    stall_timeout_s: Annotated[float, Field(ge=1)]
    amp_level: Annotated[Literal["O0", "O2", "O3"], BeforeValidator(
        lambda value: value.upper() if isinstance(value, str) else value)]
    loss_scale: Annotated[float, Field(ge=1)]
    is_dynamic_loss_scale: bool
    compile_cache: bool
    gradient_compression: Annotated[Literal["none", "float16", "bfloat16"], BeforeValidator(_lower)]

    seed: Annotated[int, Field(ge=0, lt=2 ** 32)]
    per_batch_size: Positive
    global_batch_size: NonNegative
    accumulation_steps: Positive
    max_epoch: Positive
    max_steps: NonNegative
    lr: Annotated[float, Field(gt=0)]
    lr_scheduler: Annotated[Literal["cosine_annealing", "step", "exponential"], BeforeValidator(_lower)]
    warmup_epochs: Annotated[float, Field(ge=0)]
    T_max: Annotated[float, Field(ge=0)]
    eta_min: Annotated[float, Field(ge=0)]
    lr_epochs: Annotated[list[Annotated[float, Field(gt=0)]], BeforeValidator(_as_list)]
    lr_gamma: Annotated[float, Field(gt=0, le=1)]
    momentum: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: Annotated[float, Field(ge=0)]
    decay_norm_and_bias: bool
    bias_lr_factor: Annotated[float, Field(gt=0)]
    label_smooth: bool
    label_smooth_factor: Annotated[float, Field(ge=0, lt=1)]

    checkpoint_file_path: str
    allow_head_mismatch: bool
    run_eval: bool
    eval_interval: Positive
    eval_engine: Annotated[Literal["auto", "mindspore", "onnx"], BeforeValidator(_lower)]
    output_path: str
    ckpt_interval: Positive
    ckpt_interval_steps: NonNegative
    keep_checkpoint_max: Positive
    resume: str
    log_interval: Positive
    result_path: str
    file_format: Annotated[Literal["CKPT", "MINDIR", "ONNX", "SAFETENSORS"], BeforeValidator(
        lambda value: value.upper() if isinstance(value, str) else value)]
    fuse: bool
    save_figure: str

    @model_validator(mode="after")
    def _consistent(self):
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale={list(self.crop_scale)} must be two rising fractions of the area in (0, 1]")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"crop_ratio={list(self.crop_ratio)} must be two rising positive numbers")
        if self.eval_resize and self.eval_resize < self.image_size:
            raise ValueError(f"eval_resize={self.eval_resize} must not be below image_size={self.image_size}")
        return self

    @property
    def resized_side(self):
        """Side in pixels that evaluation resizes to before the centre crop: eval_resize, or 256/224 of image_size."""
        return self.eval_resize or round(self.image_size * 256 / 224)

    @property
    def smoothing(self):
        """Label smoothing in force: label_smooth_factor if label_smooth is on."""
        return self.label_smooth_factor if self.label_smooth else 0.0

    def to_yaml(self):
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def global_batch(self, world_size):
        """Images in one optimizer step over all ranks."""
        return self.rank_batch(world_size) * world_size * self.accumulation_steps

    def rank_batch(self, world_size):
        """Images in one forward pass of one rank: per_batch_size, or the rank's share of global_batch_size.

        Raises:
            UserError: where global_batch_size cannot be shared out evenly.
        """
        if not self.global_batch_size:
            return self.per_batch_size
        share, rest = divmod(self.global_batch_size, world_size * self.accumulation_steps)
        if rest or not share:
            raise UserError(f"global_batch_size={self.global_batch_size} does not divide by {world_size} ranks x "
                            f"accumulation_steps={self.accumulation_steps}")
        return share


def parse_flags(arguments):
    """Split a command line into {key: value as typed} and positional arguments.

    ``--key=value``, ``--key value`` and a bare ``--key`` (true) are taken; ``-`` in a key counts as ``_``.

    Raises:
        UserError: for a flag that is no key of the configuration, with the nearest one.
    """
    flags, positional = {}, []
    known = (*Config.model_fields, *ALIASES, "config_path")
    pending = list(arguments)
    while pending:
        word = pending.pop(0)
        if not word.startswith("-") or word == "-":
            positional.append(word)
            continue
        name, has_value, value = word.lstrip("-").partition("=")
        key = name if name in known else name.replace("-", "_")
        if key not in known:
            raise UserError(f"unknown flag '{word.split('=')[0]}'{suggestion(key, known)}; default_config.yaml lists every key")
        key = ALIASES.get(key, key)
        if not has_value:
            takes_next = pending and (not pending[0].startswith("-") or _is_number(pending[0]))
            value = pending.pop(0) if takes_next else "true"
        flags[key] = value
    return flags, positional


def parse_only_flags(arguments):
    """``parse_flags`` for commands without positional arguments. Raises UserError for one."""
    flags, positional = parse_flags(arguments)
    if positional:
        raise UserError(f"'{positional[0]}' is not a flag; write --KEY=VALUE")
    return flags


def load_config(flags, checkpoint_layer=None):
    """Resolve the configuration: default_config.yaml, what a checkpoint records, the recipe, the flags; the last wins.

    With no recipe, data or checkpoint the recipe is the bundled digits'. ACNet's short names (``-a sres18``) stand for
    their recipes.

    Args:
        flags: {key: value}, as from ``parse_flags``; "config_path" picks the recipe.
        checkpoint_layer: {key: value} recorded in a checkpoint.

    Raises:
        UserError: for an unreadable file, an unknown key or a value out of range.
    """
    flags = dict(flags)
    recipe = flags.pop("config_path", "")
    if not recipe and "network" not in (checkpoint_layer or {}):
        recipe = _implied_recipe(flags, with_digits=checkpoint_layer is None)
    layer = read_layer(_recipe_file(recipe)) if recipe else {}
    values = {**read_layer(DEFAULT_CONFIG), **(checkpoint_layer or {}), **layer, **_empty_to_none(flags)}
    return validated(values)


def validated(values):
    """A Config of {key: value}. Raises UserError that names the first wrong key."""
    try:
        return Config(**values)
    except ValidationError as failure:
        first = failure.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else ""
        if first["type"] == "extra_forbidden":
            raise UserError(f"unknown key '{key}'{suggestion(key, Config.model_fields)}") from None
        if first["type"] == "missing" and len(first["loc"]) == 1:
            raise UserError(f"the configuration has no value for '{key}'; default_config.yaml is damaged") from None
        reason = first["msg"].removeprefix("Value error, ")
        given = f"{key}={first['input']}: " if key else ""
        raise UserError(f"{given}{reason[0].lower() + reason[1:]}") from None


def read_layer(path):
    """{key: value} of a YAML file of known keys. Raises UserError for anything else."""
    try:
        layer = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as failure:
        raise UserError(f"cannot read the configuration {path}: {getattr(failure, 'strerror', None) or failure}") from None
    except (yaml.YAMLError, RecursionError) as failure:
        where = getattr(failure, "problem_mark", None)
        raise UserError(f"{path} is not valid YAML" + (f" at line {where.line + 1}" if where else "")) from None
    if not isinstance(layer, dict):
        raise UserError(f"{path} must hold 'key: value' lines")
    for key in layer:
        if key not in Config.model_fields and key not in ALIASES:
            raise UserError(f"{path}: unknown key '{key}'{suggestion(key, (*Config.model_fields, *ALIASES))}")
    return {ALIASES.get(key, key): value for key, value in layer.items()}


def _implied_recipe(flags, with_digits):
    """The recipe that flags without config_path mean; a short name that stands for one is taken out of ``flags``."""
    by_network = yaml.safe_load((RECIPES / "network_recipes.yaml").read_text(encoding="utf-8"))
    if flags.get("network") in by_network:
        return by_network[flags.pop("network")]
    return DIGITS if with_digits and not flags.get("data_path") else ""


def _recipe_file(recipe):
    by_name = RECIPES / f"{recipe}.yaml"
    if by_name.is_file():
        return by_name
    if not os.path.isfile(recipe):
        names = sorted(path.stem for path in RECIPES.glob("*.yaml") if path.stem != "network_recipes")
        raise UserError(f"no configuration file '{recipe}'{suggestion(Path(recipe).stem, names)}; "
                        f"recipes by name: {', '.join(names)}")
    return recipe


def _empty_to_none(flags):
    """`--device_id=` and `--device_id=null` reset a key that may be unset."""
    nullable = {name for name, field in Config.model_fields.items() if NoneType in get_args(field.annotation)}
    return {key: None if key in nullable and str(value).lower() in ("", "null", "none", "auto") else value for key, value in flags.items()}


def _is_number(word):
    try:
        float(word)
    except ValueError:
        return False
    return True
