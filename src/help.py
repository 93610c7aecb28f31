"""What ``--help`` and ``--list`` print. The text of a key is its comment in default_config.yaml, its type is its field of Config."""

import re
import shutil
import textwrap
from dataclasses import dataclass
from typing import Annotated, Literal, get_args, get_origin

from src.models.blocks import BLOCKS
from src.models.networks import NETWORKS
from src.utils.config import ALIASES, DEFAULT_CONFIG, RECIPES, Affects, Config, suggest_key
from src.utils.errors import UserError

_LINE = re.compile(r"(?P<key>\w+): *(?P<default>'[^']*'|\[[^\]]*\]|[^#]*?) *(?:# (?P<text>.*))?$")
_WIDTH = 100
_COMMANDS = ("train", "eval", "predict", "export", "serve", "report", "preview_dataset")
# The commands that a text begins with, as in "eval, predict: ...".
_NAMED = re.compile(rf"(?:(?:{'|'.join(_COMMANDS)})(?:, |: ))+")
# Groups of keys that some commands look at.
_GROUPS_OF = {"Data": ("eval", "export", "report", "preview_dataset"), "Augmentation in training": ("preview_dataset",)}


@dataclass(frozen=True)
class KeyHelp:
    """A key of the configuration: the heading that it stands under, its default as written, and what it means."""

    key: str
    group: str
    default: str
    text: str

    @property
    def kind(self) -> str:
        """Its type, or the words that it takes."""
        return _kind(Config.model_fields[self.key].annotation)


def keys_help() -> list[KeyHelp]:
    """All keys, in the order of default_config.yaml."""
    found, group = [], ""
    # Above the first blank line stands what the file is.
    for line in DEFAULT_CONFIG.read_text(encoding="utf-8").partition("\n\n")[2].splitlines():
        heading = re.fullmatch(r"# (\w[^.]*?)(\. .*|: .*)?", line)
        if match := _LINE.match(line):
            found.append(KeyHelp(match["key"], group, match["default"], match["text"] or ""))
        elif heading:
            group = heading[1]
    return found


def help_text(about: str, key: str = "", command: str = "train") -> str:
    """What ``--help`` prints: what ``command`` is ``about``, then its keys in groups; with ``key`` that key alone.

    Raises:
        UserError: for a key that there is not.
    """
    if key:
        name = key.lstrip("-").replace("-", "_")
        name = ALIASES.get(name, name)
        found = next((of_key for of_key in keys_help() if of_key.key == name), None)
        if found is None:
            raise UserError(f"there is no key '{key}'{suggest_key(name)}; --help lists every key")
        others = ", ".join(f"--{alias}" for alias, meant in ALIASES.items() if meant == name)
        lines = [f"--{name}={found.kind}", *_wrapped(found.text, _WIDTH), f"    default: {found.default}"]
        return "\n".join([*lines, f"    also: {others}"] if others else lines)
    of_command = [of_key for of_key in keys_help() if _concerns(of_key, command)]
    width = min(max(shutil.get_terminal_size().columns, 60), 140)
    lines, group = [about.strip(), "", "Every key is a flag (--lr=0.1); --config_path=RECIPE picks a recipe, and flags win over it.",
                    "--help KEY shows one key, --list the networks and recipes."], ""
    if len(of_command) < len(Config.model_fields):
        lines.append("Keys of training are not listed: python3 train.py --help does.")
    for of_key in of_command:
        if of_key.group != group:
            group = of_key.group
            lines += ["", group]
        lines += [f"  --{of_key.key}={of_key.kind}  [{of_key.default}]", *_wrapped(of_key.text, width)]
    return "\n".join(lines)


def _concerns(of_key: KeyHelp, command: str) -> bool:
    """By the commands that its text begins with, if it names any, else by its group and by what it affects."""
    if command == "train" or command not in _COMMANDS:
        return True
    named = _NAMED.match(of_key.text)
    if named:
        return command in re.findall(r"\w+", named[0])
    if of_key.group in _GROUPS_OF:
        return command in _GROUPS_OF[of_key.group]
    return not {Affects.TRAINING, Affects.GRAPH} & set(Config.model_fields[of_key.key].metadata)


def list_text() -> str:
    """What ``--list`` prints: networks, blocks and recipes."""
    lines = ["Networks (--network=NAME): image size, million parameters, million multiply-adds an image, other names"]
    for name, network in NETWORKS.items():
        size = f"{network.size.parameters / 1e6:6.2f} {network.size.multiply_adds / 1e6:5.0f}" if network.size else " " * 12
        lines.append(f"  {name:18} {network.image_size:4} {size}  {', '.join(network.aliases)}".rstrip())
    lines += ["", "Blocks (--block=NAME), in place of square convolutions", "  " + ", ".join(BLOCKS)]
    lines += ["", "Recipes (--config_path=NAME)"]
    for file in sorted(RECIPES.glob("*.yaml")):
        first = re.match(r"# (.*?)([.;:] |\.?$)", file.read_text(encoding="utf-8"), re.M)
        if file.name != "network_recipes.yaml":
            lines.append(f"  {file.stem:28} {first[1] if first else ''}".rstrip())
    return "\n".join(lines)


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent="      ", subsequent_indent="      ")


def _kind(annotation: object) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(arguments[0])
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin in (list, tuple):
        return "LIST"
    if arguments:
        kinds = [_kind(argument) for argument in arguments if argument is not type(None)]
        return "|".join(dict.fromkeys(kinds)) + ("|null" if type(None) in arguments else "")
    return {bool: "0|1", int: "INT", float: "NUMBER", str: "TEXT"}.get(annotation, "TEXT")  # type: ignore[call-overload]
