"""Completion of keys and their values by bash's TAB, behind `python3 train.py` and the other commands: set-up writes what this prints.

shtab and argcomplete complete a program by its own name; here python3 is the program, and the command its first argument.
"""

from typing import Annotated, Literal, get_args, get_origin

from src.models.blocks import BLOCKS
from src.models.networks import NETWORKS
from src.utils.config import RECIPES, Config

COMMANDS = ("train.py", "eval.py", "export.py", "predict.py", "report.py", "serve.py")
_SCRIPT = """\
_acnet_complete() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD - 1]}} key="" known=" {commands} " script
    COMPREPLY=()
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
complete -o default -F _acnet_complete python3 python
"""


def script() -> str:
    """The script that bash reads."""
    values = {key: words for key in Config.model_fields if (words := _words(Config.model_fields[key].annotation))}
    values |= {"network": [*NETWORKS], "block": [*BLOCKS],
               "config_path": sorted(file.stem for file in RECIPES.glob("*.yaml") if file.stem != "network_recipes")}
    keys = " ".join([*(f"--{key}=" for key in (*Config.model_fields, "config_path")), "--help", "--list"])
    lines = "\n".join(f'        --{key}) COMPREPLY=($(compgen -W "{" ".join(words)}" -- "$word")) ;;' for key, words in values.items())
    return _SCRIPT.format(commands=" ".join(COMMANDS), keys=keys, values=lines)


def _words(annotation: object) -> list[str]:
    """The words that a key of this type takes; [] for any number or text."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is bool:
        return ["0", "1"]
    if origin is Literal:
        return [str(argument) for argument in arguments]
    if origin is Annotated:
        return _words(arguments[0])
    if origin in (list, tuple):
        return []
    return [word for argument in arguments for word in _words(argument)]


if __name__ == "__main__":
    print(script(), end="")
