"""The configuration: YAML layers and command-line flags, resolved into one typed, validated, frozen object."""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args

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
    "batch_size": "per_batch_size", "ckpt_save_max": "keep_checkpoint_max", "conti_or_fs": "resume", "c": "resume",
}


# Words of other programs for what is a key here.
SYNONYMS = {
    "model": "network", "net": "network", "learning_rate": "lr", "workers": "num_parallel_workers", "num_workers": "num_parallel_workers",
    "wd": "weight_decay", "batch": "per_batch_size", "data": "data_path", "train_data": "data_path", "val_data": "eval_data_path",
    "output": "output_path", "output_dir": "output_path", "save_dir": "output_path", "checkpoint": "checkpoint_file_path",
    "ckpt": "checkpoint_file_path", "weights": "checkpoint_file_path", "scheduler": "lr_scheduler", "sched": "lr_scheduler",
    "warmup": "warmup_epochs", "smoothing": "label_smooth_factor", "label_smoothing": "label_smooth_factor", "img_size": "image_size",
    "input_size": "image_size", "classes": "num_classes", "device": "device_target", "opt": "optimizer", "print_freq": "log_interval",
    "save_freq": "ckpt_interval", "config": "config_path", "recipe": "config_path", "aug": "augmentations", "aa": "augmentations",
    "amp": "amp_level", "precision": "amp_level", "grad_accum": "accumulation_steps", "validate": "run_eval",
    "distributed": "run_distribute", "nproc": "ranks", "nproc_per_node": "ranks", "world_size": "ranks", "gpus": "ranks",
}
# Flags that launchers add to a command; the launcher of this program says the same through the environment.
IGNORED_FLAGS = ("local_rank",)
# What a flag without a value says; a switch is on.
BARE_FLAGS = {"resume": "auto"}


class Affects(Enum):
    """What a key affects. Each key has exactly one; from it follows which keys must be the same in a resumed run, in a kept graph
    and on every rank, and which evaluation takes from a checkpoint."""

    MODEL = "the network that a checkpoint holds, and how images are prepared for it"
    GRAPH = "the compiled forward and backward pass"
    TRAINING = "what a training computes otherwise"
    IMAGES = "where images are found; ranks may find the same ones at different places"
    BATCH = "how many images are taken at a time"
    RUN = "how a command runs and what it reports, on all ranks alike"
    PROCESS = "one process alone: its places, devices and threads"


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _upper(value: Any) -> Any:
    return value.upper() if isinstance(value, str) else value


def _amp_level(value: Any) -> Any:
    return "auto" if _lower(value) == "auto" else _upper(value)


def _resume(value: Any) -> Any:
    """The ACNet repository's words too: `--conti_or_fs=continue`, or `fs`, from scratch."""
    return {"continue": "auto", "fs": ""}.get(value, value)


def _device_name(value: Any) -> Any:
    return {"cpu": "CPU", "gpu": "GPU", "ascend": "Ascend"}.get(_lower(value), value)


def _as_list(value: Any) -> Any:
    """`30,60,90` on the command line is a list."""
    if isinstance(value, str):
        return value.strip("[]() ").replace(",", " ").split()
    return [value] if isinstance(value, (int, float)) else value


def _as_entries(value: Any) -> Any:
    """`crop, mixup(alpha=0.2, probability=0.5)` is a list of two."""
    if not isinstance(value, str):
        return value
    return [part.strip() for part in re.split(r",(?![^()]*\))", value.strip().strip("[]")) if part.strip()]


Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveReal = Annotated[float, Field(gt=0)]
NonNegativeReal = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Rgb = Annotated[tuple[float, float, float], BeforeValidator(_as_list)]
PositiveRgb = Annotated[tuple[PositiveReal, PositiveReal, PositiveReal], BeforeValidator(_as_list)]
Probabilities = Annotated[tuple[Probability, Probability, Probability], BeforeValidator(_as_list)]
Interval = Annotated[tuple[float, float], BeforeValidator(_as_list)]
Epochs = Annotated[list[PositiveReal], BeforeValidator(_as_list)]
Schedule = Annotated[Literal["cosine_annealing", "step", "exponential", "exponential_decay"], BeforeValidator(_lower)]
Entries = Annotated[list[str], BeforeValidator(_as_entries)]


class Config(BaseModel):
    """Every key of default_config.yaml, which says what each means; an instance is one resolved run."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    network: Annotated[str, Affects.MODEL]
    block: Annotated[str, Affects.MODEL]
    num_classes: Annotated[NonNegative, Affects.MODEL]
    image_size: Annotated[int, Field(ge=8, le=2048), Affects.MODEL]
    gamma_init: Annotated[PositiveReal | None, Affects.MODEL]
    dropout: Annotated[Share, Affects.MODEL]
    weight_init: Annotated[Literal["kaiming_uniform", "kaiming_normal"], BeforeValidator(_lower), Affects.TRAINING]
    zero_init_residual: Annotated[bool, Affects.TRAINING]
    sync_bn: Annotated[bool, Affects.GRAPH]

    data_path: Annotated[str, Affects.IMAGES]
    eval_data_path: Annotated[str, Affects.IMAGES]
    val_split: Annotated[Literal["auto"] | Share, BeforeValidator(_lower), Affects.IMAGES]
    dataset_format: Annotated[str, BeforeValidator(_lower), Affects.IMAGES]
    bad_samples: Annotated[Literal["error", "replace"], BeforeValidator(_lower), Affects.TRAINING]
    num_parallel_workers: Annotated[int, Field(ge=0, le=256), Affects.PROCESS]

    augmentations: Annotated[Entries, Affects.TRAINING]
    train_crop: Annotated[Literal["random_resized", "padded", "resize"], BeforeValidator(_lower), Affects.TRAINING]
    crop_scale: Annotated[Interval, Affects.TRAINING]
    crop_ratio: Annotated[Interval, Affects.TRAINING]
    crop_padding: Annotated[NonNegative, Affects.TRAINING]
    flip_probability: Annotated[Probability, Affects.TRAINING]
    color_jitter: Annotated[Probabilities, Affects.TRAINING]
    eval_resize: Annotated[NonNegative, Affects.MODEL]
    crop_pct: Annotated[float, Field(gt=0, le=1), Affects.MODEL]
    eval_resize_mode: Annotated[Literal["square", "shorter_side"], BeforeValidator(_lower), Affects.MODEL]
    interpolation: Annotated[Literal["bilinear", "bicubic"], BeforeValidator(_lower), Affects.MODEL]
    antialias: Annotated[bool, Affects.MODEL]
    mean: Annotated[Rgb, Affects.MODEL]
    std: Annotated[PositiveRgb, Affects.MODEL]

    device_target: Annotated[Literal["CPU", "GPU", "Ascend"], BeforeValidator(_device_name), Affects.RUN]
    device_id: Annotated[NonNegative | None, Affects.PROCESS]
    run_distribute: Annotated[bool | None, Affects.RUN]
    ranks: Annotated[Literal["auto"] | NonNegative, BeforeValidator(_lower), Affects.PROCESS]
    threads: Annotated[NonNegative, Affects.RUN]
    stall_timeout_s: Annotated[float, Field(ge=1), Affects.RUN]
    kernels: Annotated[Literal["auto", "onednn", "mindspore"], BeforeValidator(_lower), Affects.RUN]
    amp_level: Annotated[Literal["auto", "O0", "O2", "O3"], BeforeValidator(_amp_level), Affects.GRAPH]
    loss_scale: Annotated[float, Field(ge=1), Affects.TRAINING]
    is_dynamic_loss_scale: Annotated[bool, Affects.TRAINING]
    reducer: Annotated[Literal["auto", "mpi", "device"], BeforeValidator(_lower), Affects.RUN]
    gradient_compression: Annotated[Literal["none", "float16", "bfloat16"], BeforeValidator(_lower), Affects.TRAINING]
    compile_cache: Annotated[bool, Affects.PROCESS]

    seed: Annotated[int, Field(ge=0, lt=2 ** 32), Affects.TRAINING]
    per_batch_size: Annotated[Positive, Affects.BATCH]
    global_batch_size: Annotated[NonNegative, Affects.BATCH]
    fit_batch: Annotated[bool, Affects.BATCH]
    accumulation_steps: Annotated[Positive, Affects.TRAINING]
    max_epoch: Annotated[Positive, Affects.TRAINING]
    max_steps: Annotated[NonNegative, Affects.RUN]
    dry_run: Annotated[bool, Affects.RUN]
    optimizer: Annotated[str, Affects.TRAINING]
    lr: Annotated[PositiveReal, Affects.TRAINING]
    lr_batch_size: Annotated[NonNegative, Affects.TRAINING]
    lr_scheduler: Annotated[Schedule, Affects.TRAINING]
    lr_interval: Annotated[Literal["epoch", "step"], BeforeValidator(_lower), Affects.TRAINING]
    warmup_epochs: Annotated[NonNegativeReal, Affects.TRAINING]
    T_max: Annotated[NonNegativeReal, Affects.TRAINING]
    eta_min: Annotated[NonNegativeReal, Affects.TRAINING]
    lr_epochs: Annotated[Epochs, Affects.TRAINING]
    lr_gamma: Annotated[float, Field(gt=0, le=1), Affects.TRAINING]
    momentum: Annotated[Share, Affects.TRAINING]
    weight_decay: Annotated[NonNegativeReal, Affects.TRAINING]
    decay_norm_and_bias: Annotated[bool, Affects.TRAINING]
    bias_lr_factor: Annotated[PositiveReal, Affects.TRAINING]
    freeze_epochs: Annotated[NonNegative, Affects.TRAINING]
    backbone_lr_factor: Annotated[PositiveReal, Affects.TRAINING]
    early_stopping: Annotated[NonNegative, Affects.TRAINING]
    label_smooth: Annotated[bool, Affects.GRAPH]
    label_smooth_factor: Annotated[Share, Affects.GRAPH]
    label_smooth_over: Annotated[Literal["others", "all"], BeforeValidator(_lower), Affects.GRAPH]

    checkpoint_file_path: Annotated[str, Affects.PROCESS]
    class_names: Annotated[str, Affects.PROCESS]
    allow_head_mismatch: Annotated[bool, Affects.RUN]
    run_eval: Annotated[bool, Affects.RUN]
    eval_interval: Annotated[Positive, Affects.RUN]
    eval_engine: Annotated[Literal["auto", "mindspore", "onnx"], BeforeValidator(_lower), Affects.RUN]
    output_path: Annotated[str, Affects.PROCESS]
    ckpt_interval: Annotated[Positive, Affects.RUN]
    ckpt_interval_steps: Annotated[NonNegative, Affects.RUN]
    keep_checkpoint_max: Annotated[Positive, Affects.PROCESS]
    resume: Annotated[str, BeforeValidator(_resume), Affects.RUN]
    deploy: Annotated[Literal["best"] | bool, BeforeValidator(_lower), Affects.RUN]
    tensorboard: Annotated[bool, Affects.PROCESS]
    log_interval: Annotated[Positive, Affects.PROCESS]
    result_path: Annotated[str, Affects.PROCESS]
    top_k: Annotated[Positive, Affects.PROCESS]
    test_flip: Annotated[bool, Affects.RUN]
    file_format: Annotated[Literal["CKPT", "MINDIR", "ONNX", "SAFETENSORS"], BeforeValidator(_upper), Affects.RUN]
    quantize: Annotated[Literal["none", "int8"], BeforeValidator(_lower), Affects.RUN]
    calibration_images: Annotated[Positive, Affects.RUN]
    fuse: Annotated[bool, Affects.RUN]
    host: Annotated[str, Affects.PROCESS]
    port: Annotated[int, Field(ge=0, le=65535), Affects.PROCESS]
    save_figure: Annotated[str, Affects.PROCESS]

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale={list(self.crop_scale)} must be two rising fractions of the area in (0, 1]")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"crop_ratio={list(self.crop_ratio)} must be two rising positive numbers")
        if self.eval_resize and self.eval_resize < self.image_size:
            raise ValueError(f"eval_resize={self.eval_resize} must not be below image_size={self.image_size}")
        if self.eta_min > self.lr:
            raise ValueError(f"eta_min={self.eta_min:g} must not be above lr={self.lr:g}, from which the learning rate falls to it")
        if any(later <= earlier for earlier, later in zip(self.lr_epochs, self.lr_epochs[1:])):
            raise ValueError(f"lr_epochs={self.lr_epochs} must rise from each to the next")
        return self

    @property
    def resized_side(self) -> int:
        """Side in pixels that evaluation resizes to before the centre crop: eval_resize, or image_size / crop_pct."""
        return self.eval_resize or round(self.image_size / self.crop_pct)

    @property
    def smoothing(self) -> float:
        """Label smoothing in force, as the share e of the target (1 - e) one-hot + e / num_classes, 0 without label_smooth.

        Spread over the other classes alone, a share f leaves 1 - f to the true one: e = f num_classes / (num_classes - 1).
        """
        share = self.label_smooth_factor if self.label_smooth else 0.0
        to_others = self.label_smooth_over == "others" and self.num_classes > 1
        return share * self.num_classes / (self.num_classes - 1) if to_others else share

    @property
    def precision(self) -> str:
        """amp_level in force: "auto" is float32 (O0) on CPU and the model zoo's O3 on devices.

        But on GPU, where MindSpore 2.10 fuses batch norm, addition and ReLU in O3, a sum of branches becomes a cycle in its graph
        (docs/gpu.md), it is O2 for blocks.
        """
        if self.amp_level != "auto":
            return self.amp_level
        if self.device_target == "CPU":
            return "O0"
        return "O2" if self.device_target == "GPU" and self.block != "base" else "O3"

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def keys_affecting(*parts: Affects) -> set[str]:
    """The keys that affect one of ``parts``."""
    return {name for name, field in Config.model_fields.items() if any(part in field.metadata for part in parts)}


def parse_flags(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Split a command line into {key: value as typed} and positional arguments.

    ``--key=value``, ``--key value`` and for switches a bare ``--key`` are taken; ``-`` in a key counts as ``_``.

    Raises:
        UserError: for a flag that is no key of the configuration, with the nearest one, or that lacks its value.
    """
    flags: dict[str, str] = {}
    positional: list[str] = []
    known = (*Config.model_fields, *ALIASES, *IGNORED_FLAGS, "config_path")
    pending = list(arguments)
    while pending:
        word = pending.pop(0)
        if not word.startswith("-") or word == "-":
            positional.append(word)
            continue
        name, has_value, value = word.lstrip("-").partition("=")
        key = name if name in known else name.replace("-", "_")
        if key not in known:
            raise UserError(f"unknown flag '{word.split('=')[0]}'{suggest_key(key)}; --help lists every key")
        key = ALIASES.get(key, key)
        if not has_value:
            takes_next = pending and (not pending[0].startswith("-") or _is_number(pending[0]))
            if not takes_next and not _is_switch(key) and key not in BARE_FLAGS:
                raise UserError(f"{word} needs a value, as in --{key}=VALUE; --help {key} says which")
            value = pending.pop(0) if takes_next else BARE_FLAGS.get(key, "true")
        if key not in IGNORED_FLAGS:
            flags[key] = value
    return flags, positional


def _is_switch(key: str) -> bool:
    """Whether a bare ``--key`` means something."""
    field = Config.model_fields.get(key)
    return key in IGNORED_FLAGS or field is not None and bool in (field.annotation, *get_args(field.annotation))


def suggest_key(word: str) -> str:
    """`` (did you mean 'x'?)`` for the key that ``word`` is likely to stand for, or an empty string."""
    synonym = difflib.get_close_matches(word.lower(), SYNONYMS, n=1, cutoff=0.8)
    if synonym:
        return f" (did you mean '{SYNONYMS[synonym[0]]}'?)"
    return suggestion(word, (*Config.model_fields, *ALIASES, "config_path"))


def parse_only_flags(arguments: Sequence[str]) -> dict[str, str]:
    """``parse_flags`` for commands without positional arguments. Raises UserError for one."""
    flags, positional = parse_flags(arguments)
    if positional:
        raise UserError(f"'{positional[0]}' is not a flag; write --KEY=VALUE")
    return flags


def load_config(flags: Mapping[str, Any], checkpoint_layer: Mapping[str, Any] | None = None,
                starts_from: Mapping[str, Any] | None = None) -> Config:
    """Resolve the configuration: default_config.yaml, what belongs to the network, what a checkpoint records, the recipe, the flags;
    the last wins.

    With no recipe, data or checkpoint the recipe is the bundled digits'. ACNet's short names (``-a sres18``) stand for
    their recipes; any other network brings of its recipe what belongs to the network itself, as dropout and preprocessing.

    Args:
        flags: {key: value}, as from ``parse_flags``; "config_path" picks the recipe.
        checkpoint_layer: {key: value} recorded in a checkpoint.
        starts_from: the same of weights that a training starts from; recipes are implied as without.

    Raises:
        UserError: for an unreadable file, an unknown key or a value out of range.
    """
    flags = dict(flags)
    recipe = flags.pop("config_path", "")
    if not recipe and "network" not in (checkpoint_layer or {}):
        recipe = _implied_recipe(flags, with_digits=checkpoint_layer is None)
    layer = read_layer(find_recipe(recipe)) if recipe else {}
    if "per_batch_size" in flags and "global_batch_size" not in flags:
        # It decides, which a recipe's global_batch_size would not let it.
        flags["global_batch_size"] = 0
    above = {**(checkpoint_layer or {}), **(starts_from or {}), **layer, **_empty_to_none(flags)}
    return validated({**read_layer(DEFAULT_CONFIG), **network_layer(above.get("network")), **above})


def network_layer(network: Any) -> dict[str, Any]:
    """{key: value} of what belongs to the network of that name or alias by its recipe; {} for one without a recipe."""
    recipes = network_recipes()
    recipe = recipes["settings"].get(network, recipes["whole"].get(network))
    own = keys_affecting(Affects.MODEL) - {"network", "block", "num_classes"}
    return {key: value for key, value in read_layer(find_recipe(recipe)).items() if key in own} if recipe else {}


def validated(values: Mapping[str, Any]) -> Config:
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
        # A key that takes one of two kinds has an error for each.
        kinds = [error["msg"][0].lower() + error["msg"][1:] for error in failure.errors()
                 if error["loc"][:1] == first["loc"][:1] and all(isinstance(part, str) for part in error["loc"])]
        reason = (" or ".join(kinds) if len(kinds) > 1 else first["msg"]).removeprefix("Value error, ")
        given = f"{key}={first['input']}: " if key else ""
        raise UserError(f"{given}{reason[0].lower() + reason[1:]}") from None


def read_layer(path: str | Path) -> dict[str, Any]:
    """{key: value} of a YAML file of known keys, over those of the recipe that it names as ``extends``.

    Raises:
        UserError: for an unreadable file, an unknown key, or recipes that extend each other in a circle.
    """
    return _with_extended(Path(path), ())


def _with_extended(path: Path, extending: tuple[Path, ...]) -> dict[str, Any]:
    layer = _read_yaml(path)
    extended = layer.pop("extends", None)
    for key in layer:
        if key not in Config.model_fields and key not in ALIASES:
            raise UserError(f"{path}: unknown key '{key}'{suggestion(key, (*Config.model_fields, *ALIASES, 'extends'))}")
    own = {ALIASES.get(key, key): value for key, value in layer.items()}
    if extended is None:
        return own
    base = find_recipe(str(extended), beside=path)
    if base.resolve() in (found.resolve() for found in (path, *extending)):
        raise UserError(f"{path}: 'extends: {extended}' leads back to this recipe")
    return {**_with_extended(base, (path, *extending)), **own}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        layer = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as failure:
        raise UserError(f"cannot read the configuration {path}: {getattr(failure, 'strerror', None) or failure}") from None
    except (yaml.YAMLError, RecursionError) as failure:
        mark = getattr(failure, "problem_mark", None)
        raise UserError(f"{path} is not valid YAML" + (f" at line {mark.line + 1}" if mark else "")) from None
    if not isinstance(layer, dict):
        raise UserError(f"{path} must hold 'key: value' lines")
    return layer


def _implied_recipe(flags: dict[str, Any], with_digits: bool) -> str:
    """The recipe that flags without config_path mean; a short name that stands for one is taken out of ``flags``."""
    by_network = network_recipes()["whole"]
    if flags.get("network") in by_network:
        return by_network[flags.pop("network")]
    return DIGITS if with_digits and not flags.get("data_path") else ""


def network_recipes() -> dict[str, dict[str, str]]:
    """Which recipe comes with a network's name: {"whole": {name: recipe}, "settings": {name: recipe}}."""
    return _read_yaml(RECIPES / "network_recipes.yaml")


def find_recipe(recipe: str, beside: Path = DEFAULT_CONFIG) -> Path:
    """The file of a recipe given by name or path, a path relative to ``beside`` too. Raises UserError if there is none."""
    for path in (RECIPES / f"{recipe}.yaml", beside.parent / recipe, Path(recipe)):
        if os.path.isfile(path):
            return path
    names = sorted(path.stem for path in RECIPES.glob("*.yaml") if path.stem != "network_recipes")
    raise UserError(f"no configuration file '{recipe}'{suggestion(Path(recipe).stem, names)}; "
                    f"recipes by name: {', '.join(names)}")


def _empty_to_none(flags: Mapping[str, Any]) -> dict[str, Any]:
    """`--device_id=` and `--device_id=null` reset a key that may be unset."""
    nullable = {name for name, field in Config.model_fields.items() if NoneType in get_args(field.annotation)}
    return {key: None if key in nullable and str(value).lower() in ("", "null", "none", "auto") else value
            for key, value in flags.items()}


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
