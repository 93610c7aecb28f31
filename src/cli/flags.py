"""The command line: flags, aliases from the seeds, and suggestions for mistyped flags."""

import difflib
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any, get_args

from src.cli.config import Config, key_info
from src.utils.errors import UserError, suggestion
from src.utils.log import WARNING
from src.utils.specs import parse_spec

# Other names of keys, from the systems that this program replaces.
ALIASES = {
    "data_dir": "data_path",
    "is_distributed": "run_distribute",
    "backbone": "network",
    "arch": "network",
    "a": "network",
    "block_type": "block",
    "b": "block",
    "pretrained": "checkpoint_file_path",
    "epochs": "max_epoch",
    "batch_size": "per_batch_size",
    "ckpt_save_max": "keep_checkpoint_max",
    "conti_or_fs": "resume",
    "c": "resume",
}
# Names that other programs use for our keys; only used in suggestions.
_SYNONYMS = {
    "model": "network",
    "net": "network",
    "learning_rate": "lr",
    "workers": "num_parallel_workers",
    "num_workers": "num_parallel_workers",
    "wd": "weight_decay",
    "batch": "per_batch_size",
    "data": "data_path",
    "train_data": "data_path",
    "val_data": "eval_data_path",
    "output": "output_path",
    "output_dir": "output_path",
    "save_dir": "output_path",
    "checkpoint": "checkpoint_file_path",
    "ckpt": "checkpoint_file_path",
    "weights": "checkpoint_file_path",
    "scheduler": "lr_scheduler",
    "sched": "lr_scheduler",
    "warmup": "warmup_epochs",
    "smoothing": "label_smooth_factor",
    "label_smoothing": "label_smooth_factor",
    "img_size": "image_size",
    "input_size": "image_size",
    "classes": "num_classes",
    "device": "device_target",
    "opt": "optimizer",
    "criterion": "loss",
    "print_freq": "log_interval",
    "save_freq": "ckpt_interval",
    "config": "config_path",
    "recipe": "config_path",
    "aug": "augmentations",
    "aa": "augmentations",
    "amp": "amp_level",
    "precision": "amp_level",
    "grad_accum": "accumulation_steps",
    "validate": "run_eval",
    "distributed": "run_distribute",
    "nproc": "ranks",
    "nproc_per_node": "ranks",
    "world_size": "ranks",
    "gpus": "ranks",
}
# Keys of earlier versions and of the seeds that were merged into another key. Recipes, flags and
# checkpoints may still contain them; ``current_keys`` translates them.
FORMER_KEYS = {"label_smooth": "label_smooth_factor"}
# Keys, and the key that overrules them if it is set.
OVERRULED_BY = {"crop_pct": "eval_resize", "per_batch_size": "global_batch_size"}
# Flags that launchers add to a command; our launcher passes them in environment variables.
_IGNORED_FLAGS = ("local_rank",)
# Keys, and the augmentations whose own arguments overrule them.
_ARGUMENTS = (
    ("flip_probability", "flip", {"probability"}),
    ("color_jitter", "color_jitter", {"brightness", "contrast", "saturation"}),
)
# Values of bare flags. A bare boolean is true.
_BARE_FLAGS = {"resume": "auto"}


def parse_flags(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Split a command line into {key: value as typed} and positional arguments.

    Accepts ``--key=value``, ``--key value`` and, for booleans, a bare ``--key``. In a key ``-``
    counts as ``_``.

    Raises:
        UserError: for an unknown flag, with the nearest key, or a missing value.
    """
    flags: dict[str, str] = {}
    positional: list[str] = []
    known = (*known_keys(), *_IGNORED_FLAGS, "config_path")
    pending = list(arguments)
    while pending:
        argument = pending.pop(0)
        if not argument.startswith("-") or argument == "-":
            positional.append(argument)
            continue
        name, has_value, value = argument.lstrip("-").partition("=")
        key = name if name in known else name.replace("-", "_")
        if key not in known:
            flag = argument.split("=")[0]
            raise UserError(f"unknown flag '{flag}'{suggest_key(key)}; --help lists every key")
        key = ALIASES.get(key, key)
        if not has_value:
            takes_next = pending and (not pending[0].startswith("-") or _is_number(pending[0]))
            if not takes_next and not _is_boolean(key) and key not in _BARE_FLAGS:
                raise UserError(
                    f"{argument} needs a value, as in --{key}=VALUE; --help {key} describes it"
                )
            value = pending.pop(0) if takes_next else _BARE_FLAGS.get(key, "true")
        if key not in _IGNORED_FLAGS:
            flags[key] = value
    return flags, positional


def parse_only_flags(arguments: Sequence[str]) -> dict[str, str]:
    """``parse_flags`` for commands without positional arguments. Raises UserError for one."""
    flags, positional = parse_flags(arguments)
    if positional:
        raise UserError(f"'{positional[0]}' is not a flag; write --KEY=VALUE")
    return flags


def known_keys() -> tuple[str, ...]:
    """All keys, their aliases and former keys."""
    return (*Config.model_fields, *ALIASES, *FORMER_KEYS)


def suggest_key(name: str) -> str:
    """`` (did you mean 'x'?)`` for the key that ``name`` probably stands for, or ""."""
    synonym = difflib.get_close_matches(name.lower(), _SYNONYMS, n=1, cutoff=0.8)
    if synonym:
        return f" (did you mean '{_SYNONYMS[synonym[0]]}'?)"
    return suggestion(name, (*Config.model_fields, *ALIASES, "config_path"))


def current_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """{key: value} with former keys translated.

    label_smooth=0 is label_smooth_factor=0. label_smooth=1 leaves the factor as it is; if that is
    0, it becomes the default.
    """
    values = dict(values)
    if "label_smooth" in values:
        text = str(values.pop("label_smooth")).lower()
        if text not in ("0", "1", "false", "true", "no", "yes", "off", "on"):
            raise UserError(f"label_smooth={text}: must be 0 or 1; or use label_smooth_factor")
        if text in ("0", "false", "no", "off"):
            values["label_smooth_factor"] = 0
        elif str(values.get("label_smooth_factor")) in ("0", "0.0"):
            del values["label_smooth_factor"]
    return values


def empty_to_none(flags: Mapping[str, Any]) -> dict[str, Any]:
    """`--device_id=` and `--device_id=null` reset a key that may be null."""
    nullable = {
        name
        for name, field in Config.model_fields.items()
        if NoneType in get_args(field.annotation)
    }
    return {
        key: None
        if key in nullable and str(value).lower() in ("", "null", "none", "auto")
        else value
        for key, value in flags.items()
    }


def misplaced_flags(flags: Mapping[str, Any], command: str) -> list[str]:
    """A warning for each flag that belongs to other commands than ``command``."""
    return [
        f"{WARNING}--{name} changes nothing here; it is a flag of "
        + ", ".join(f"{other}.py" for other in key_info(name).commands)
        for name in flags
        if name in Config.model_fields and command not in key_info(name).commands
    ]


def flags_without_effect(flags: Mapping[str, Any], config: Config, ranks: int) -> list[str]:
    """A warning for each flag that changes nothing in a training run of ``config`` on ``ranks``."""
    without = {
        name: f"without --{_as_flag(missing)}"
        for name in flags
        if name in Config.model_fields and (missing := _missing_setting(name, config))
    }
    return [
        f"{WARNING}--{name} changes nothing {reason}"
        for name, reason in {**without, **_overruled(flags, config, ranks)}.items()
    ]


def _overruled(flags: Mapping[str, Any], config: Config, ranks: int) -> dict[str, str]:
    """{flag: why} of the flags that another flag or key overrules, or the number of ranks."""
    reasons = {}
    if "gradient_compression" in flags and config.gradient_compression != "none" and ranks == 1:
        reasons["gradient_compression"] = "on a single rank"
    if "momentum" in flags and "momentum" in parse_spec("optimizer", config.optimizer)[1]:
        reasons["momentum"] = f"with --optimizer={config.optimizer}"
    if "run_eval" in flags and config.val_split and not config.run_eval:
        reasons["run_eval"] = "with --val_split, which evaluates"
    for name, other in OVERRULED_BY.items():
        if name in flags and other in flags and getattr(config, other):
            reasons[name] = f"with --{other}"
    for name, augmentation, arguments in _ARGUMENTS:
        for spec in config.augmentations:
            found, given = parse_spec("augmentations", spec)
            if name in flags and found == augmentation and arguments <= given.keys():
                reasons[name] = f"with --augmentations={spec}"
    return reasons


def _missing_setting(name: str, config: Config) -> str:
    """The setting without which a key changes nothing in ``config``, or ""."""
    needs = key_info(name).needs
    if not needs or not _is_set(needs, config):
        return needs
    # The setting that it needs may itself need another one.
    other = needs.partition("=")[0]
    return _missing_setting(other, config) if other in Config.model_fields else ""


def _as_flag(needs: str) -> str:
    """The flag of a KeyInfo's ``needs``, which may name a property."""
    properties = {"evaluates": "run_eval=1", "scales_loss": "amp_level=O2 on GPU or Ascend"}
    return properties.get(needs, needs)


def _is_set(needs: str, config: Config) -> bool:
    """Whether ``config`` has the setting that a KeyInfo's ``needs`` describes."""
    name, _, values = needs.partition("=")
    value = getattr(config, name)
    if not values:
        return bool(value)
    specs = value if isinstance(value, list) else [value]
    return any(spec.partition("(")[0].strip() in values.split("|") for spec in specs)


def _is_boolean(key: str) -> bool:
    """Whether a bare ``--key`` has a meaning."""
    if key in _IGNORED_FLAGS or key in FORMER_KEYS:
        return True
    field = Config.model_fields.get(key)
    return field is not None and bool in (field.annotation, *get_args(field.annotation))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
