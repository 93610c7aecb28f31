"""Values such as 'adamw(beta2=0.95)': a name from a table, with arguments."""

import ast
import pkgutil
from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, ValidationError

from src.utils.errors import UserError, suggestion

# For the classes that tables name: pydantic dataclasses that take no argument but their own.
STRICT = ConfigDict(extra="forbid")


def make_named(key: str, text: str, table: Mapping[str, str], *context: Any) -> Any:
    """What ``text``, the value of configuration key ``key``, stands for.

    Args:
        table: {name: "MODULE:CLASS"} of classes with a class method ``of(*context, **arguments)``.

    Raises:
        UserError: for an unknown name, with the nearest one, or an argument that the class does not take.
    """
    name, arguments = parse_named(key, text)
    if name not in table:
        raise UserError(f"{key}: unknown '{name}'{suggestion(name, table)}; there are {', '.join(table)}")
    try:
        return pkgutil.resolve_name(table[name]).of(*context, **arguments)
    except ValidationError as failure:
        first = failure.errors()[0]
        argument = str(first["loc"][0]) if first["loc"] else ""
        if first["type"] == "unexpected_keyword_argument":
            raise UserError(f"{key}: {name} takes no argument '{argument}'") from None
        raise UserError(f"{key}: {name}({argument}={first['input']}): {first['msg'][0].lower()}{first['msg'][1:]}") from None


def parse_named(key: str, text: str) -> tuple[str, dict[str, Any]]:
    """'mixup(alpha=0.2)' -> ("mixup", {"alpha": 0.2}). Raises UserError for anything else."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if isinstance(tree, ast.Name):
            return tree.id, {}
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and not tree.args:
            return tree.func.id, {word.arg: ast.literal_eval(word.value) for word in tree.keywords if word.arg}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        pass
    raise UserError(f"{key}: '{text}' is neither a name nor NAME(ARGUMENT=VALUE, ...)")
