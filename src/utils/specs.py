"""Specs such as 'adamw(beta2=0.95)': a name from a table, with arguments."""

import ast
import pkgutil
from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, ValidationError

from src.utils.errors import UserError, suggestion

# For the classes in tables: pydantic dataclasses that take no arguments but their own.
FORBID_EXTRA = ConfigDict(extra="forbid")


def create_from_spec(key: str, text: str, table: Mapping[str, Any], *context: Any) -> Any:
    """Create what ``text``, the value of configuration key ``key``, describes.

    Args:
        table: {name: class} or {name: "MODULE:CLASS"}. Each class has a class method
            ``of(*context, **arguments)`` that raises pydantic's ValidationError.

    Raises:
        UserError: for an unknown name, with the nearest one, or a wrong argument.
    """
    name = check_spec(key, text, table)
    _, arguments = parse_spec(key, text)
    entry = table[name]
    kind = pkgutil.resolve_name(entry) if isinstance(entry, str) else entry
    try:
        return kind.of(*context, **arguments)
    except ValidationError as failure:
        first = failure.errors()[0]
        # Of an error inside a tuple, the place in the tuple follows.
        argument = str(first["loc"][0]) if first["loc"] else ""
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            raise UserError(f"{key}: {name} takes no argument '{argument}'") from None
        reason = first["msg"][0].lower() + first["msg"][1:]
        raise UserError(f"{key}: {name}({argument}={first['input']}): {reason}") from None


def check_spec(key: str, text: str, table: Mapping[str, Any]) -> str:
    """The name in a spec. Raises UserError if it is not in the table."""
    name, _ = parse_spec(key, text)
    if name not in table:
        raise UserError(
            f"{key}: unknown '{name}'{suggestion(name, table)}; available: {', '.join(table)}"
        )
    return name


def parse_spec(key: str, text: str) -> tuple[str, dict[str, Any]]:
    """'mixup(alpha=0.2)' -> ("mixup", {"alpha": 0.2}). Raises UserError for anything else."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if isinstance(tree, ast.Name):
            return tree.id, {}
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and not tree.args:
            return tree.func.id, {
                keyword.arg: ast.literal_eval(keyword.value)
                for keyword in tree.keywords
                if keyword.arg
            }
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        pass
    raise UserError(f"{key}: '{text}' is neither a name nor NAME(ARGUMENT=VALUE, ...)")
