"""Prints ``--help`` and ``--list``, and writes the script of bash's TAB completion.

`python3 -m src.cli.help` prints that script; scripts/setup.sh saves it, and `acnet completion`
prints it too. shtab and argcomplete complete a program by its own name, but here the program is
python3 and the command its argument.
"""

import re
import shutil
import textwrap
from typing import Annotated, Literal, get_args, get_origin

from src.cli.config import COMMANDS, GROUPS, RECIPES, Config, default_text, key_info, type_text
from src.cli.flags import ALIASES, FORMER_KEYS, suggest_key
from src.models.blocks import BLOCKS
from src.models.networks import NETWORKS
from src.models.published_weights import published_weights
from src.utils.errors import UserError

_WIDTH = 100
# Commands that only the installed package has (acnet_mindspore/command.py).
_PACKAGE_COMMANDS = ("preview", "check", "pack", "launch", "setup", "completion")
_COMPLETION = """\
_acnet_complete() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD - 1]}}
    local key="" known=" {commands} " script
    COMPREPLY=()
    if [ "${{COMP_WORDS[0]}}" = acnet ] && [ "$COMP_CWORD" = 1 ]; then
        COMPREPLY=($(compgen -W "{package_commands}" -- "$word"))
        return
    fi
    [ "${{COMP_WORDS[0]}}" != acnet ] || known=" {package_commands} "
    for script in "${{COMP_WORDS[@]:1:3}}"; do
        case "$known" in *" ${{script##*/}} "*) key=found ;; esac
    done
    [ "$key" = found ] || return
    # Bash takes = for a word of its own.
    if [ "$word" = "=" ]; then
        key=$before word=""
    elif [ "$before" = "=" ]; then
        key=${{COMP_WORDS[COMP_CWORD - 2]}}
    else
        compopt -o nospace 2>/dev/null
        [ "${{word:0:1}}" != "-" ] || COMPREPLY=($(compgen -W "{keys}" -- "$word"))
        return
    fi
    case "$key" in
{values}
    esac
}}
complete -o default -F _acnet_complete python3 python acnet
"""


def help_text(about: str, command: str) -> str:
    """The text of ``--help``: what the command does, then its keys in groups."""
    width = min(max(shutil.get_terminal_size().columns, 60), 140)
    lines = [
        about.strip(),
        "",
        "Every key is a flag (--lr=0.1). --config_path=RECIPE picks a recipe; flags override it.",
        "--help KEY shows one key, --list the networks and recipes.",
    ]
    # train lists every key; an unknown command does too.
    lists_all = command == "train" or command not in COMMANDS
    if not lists_all:
        lines.append("Training keys are not listed here: python3 train.py --help lists them.")
    for group in GROUPS:
        names = [
            name for name in group.model_fields if lists_all or command in key_info(name).commands
        ]
        if names:
            lines += ["", re.split(r"[.:]", group.__doc__ or "")[0]]
        for name in names:
            kind = type_text(Config.model_fields[name].annotation)
            lines.append(f"  --{name}={kind}  [{default_text(name)}]")
            lines += _wrapped(key_info(name).help, width)
    return "\n".join(lines)


def key_help_text(key: str) -> str:
    """The text of ``--help KEY``. Raises UserError for an unknown key."""
    name = key.lstrip("-").replace("-", "_")
    name = {**ALIASES, **FORMER_KEYS}.get(name, name)
    if name not in Config.model_fields:
        raise UserError(f"unknown key '{key}'{suggest_key(name)}; --help lists every key")
    lines = [f"--{name}={type_text(Config.model_fields[name].annotation)}"]
    lines += _wrapped(key_info(name).help, _WIDTH)
    lines.append(f"    default: {default_text(name)}")
    others = ", ".join(f"--{alias}" for alias, meant in ALIASES.items() if meant == name)
    return "\n".join([*lines, f"    also: {others}"] if others else lines)


def list_text() -> str:
    """The text of ``--list``: networks, blocks, published weights and recipes."""
    lines = [
        "Networks (--network=NAME): image size, million parameters, million multiply-adds per "
        "image, other names"
    ]
    for name, network in NETWORKS.items():
        size = " " * 12
        if network.size:
            parameters, multiply_adds = network.size.parameters, network.size.multiply_adds
            size = f"{parameters / 1e6:6.2f} {multiply_adds / 1e6:5.0f}"
        others = ", ".join(network.aliases)
        lines.append(f"  {name:18} {network.image_size:4} {size}  {others}".rstrip())
    lines += ["", "Blocks (--block=NAME), instead of square convolutions", f"  {', '.join(BLOCKS)}"]
    lines += ["", "Published weights (--pretrained=NAME): MB, ImageNet top-1, licence, address"]
    for weights in published_weights().values():
        lines.append(
            f"  {weights.name:28} {weights.megabytes:4} {weights.top1:.2f} {weights.licence:12} "
            f"{weights.url}"
        )
    lines += ["", "Recipes (--config_path=NAME)"]
    for file in sorted(RECIPES.glob("*.yaml")):
        first = re.match(r"# (.*?)([.;:] |\.?$)", file.read_text(encoding="utf-8"), re.M)
        lines.append(f"  {file.stem:28} {first[1] if first else ''}".rstrip())
    return "\n".join(lines)


def completion_script() -> str:
    """The script that bash reads."""
    values = {key: _choices(field.annotation) for key, field in Config.model_fields.items()}
    values |= {
        "network": [*NETWORKS],
        "block": [*BLOCKS],
        "config_path": sorted(file.stem for file in RECIPES.glob("*.yaml")),
    }
    keys = [*(f"--{key}=" for key in (*Config.model_fields, "config_path")), "--help", "--list"]
    lines = [
        f'        --{key}) COMPREPLY=($(compgen -W "{" ".join(choices)}" -- "$word")) ;;'
        for key, choices in values.items()
        if choices
    ]
    commands = [command for command in COMMANDS if not command.endswith("_dataset")]
    return _COMPLETION.format(
        commands=" ".join(f"{command}.py" for command in commands),
        package_commands=" ".join([*commands, *_PACKAGE_COMMANDS]),
        keys=" ".join(keys),
        values="\n".join(lines),
    )


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent="      ", subsequent_indent="      ")


def _choices(annotation: object) -> list[str]:
    """The values that a key of this type takes; [] for any number or text."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is bool:
        return ["0", "1"]
    if origin is Literal:
        return [str(argument) for argument in arguments]
    if origin is Annotated:
        return _choices(arguments[0])
    if origin in (list, tuple):
        return []
    return [choice for argument in arguments for choice in _choices(argument)]


if __name__ == "__main__":
    print(completion_script(), end="")
