"""Adds to the mkdocs site: pages for commands and keys, and documents from outside docs/."""

import ast
import re
import sys
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = (
    "train.py",
    "eval.py",
    "export.py",
    "predict.py",
    "serve.py",
    "report.py",
    "scripts/preview_dataset.py",
    "scripts/check_dataset.py",
    "scripts/pack_dataset.py",
    "scripts/launch.py",
)
# Where documents outside docs/ go, and how links to them read.
ELSEWHERE = {
    "README.md": "index.md",
    "benchmarks/README.md": "benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
    "default_config.yaml": "keys.md",
}


def on_files(files, config):
    for command in COMMANDS:
        files.append(
            File.generated(
                config, f"commands/{Path(command).stem}.md", content=command_page(command)
            )
        )
    files.append(File.generated(config, "keys.md", content=keys_page()))
    for source, target in ELSEWHERE.items():
        if source.endswith(".md"):
            text = (ROOT / source).read_text(encoding="utf-8")
            files.append(
                File.generated(config, target, content=with_links(text, Path(source).parent))
            )
    return files


def on_page_markdown(markdown, page, **others):
    """Links of docs/ to documents outside it lead to their pages."""
    return with_links(markdown, Path("docs")) if not page.file.generated_by else markdown


def with_links(text, folder):
    """``text``, a document in ``folder`` of the project, with links as the site has them."""

    def link(found):
        target, _, anchor = found[2].partition("#")
        if not target or ":" in target:
            return found[0]
        place = (ROOT / folder / target).resolve().relative_to(ROOT).as_posix()
        page = ELSEWHERE.get(
            place, place.removeprefix("docs/") if place.startswith("docs/") else None
        )
        # A target that is not on the site becomes plain text.
        return f"[{found[1]}]({page}{'#' + anchor if anchor else ''})" if page else found[1]

    return re.sub(r"\[([^\]]*)\]\(([^)\s]+)\)", link, text)


def command_page(command):
    """What the command's own text says."""
    about = ast.get_docstring(ast.parse((ROOT / command).read_text(encoding="utf-8")))
    first, _, rest = about.partition("\n")
    keys = (
        ""
        if command.startswith("scripts/") and "preview" not in command
        else ("\nEvery [key](../keys.md) is a flag. `--help` lists them, `--help KEY` shows one.\n")
    )
    return f"# {Path(command).name}\n\n{first}\n{rest}\n{keys}"


def keys_page():
    """The keys in the order and groups of default_config.yaml."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from src.cli.config import GROUPS, default_text, key_info, type_text

    lines = [
        "# Keys",
        "",
        "Each key is a flag (`--lr=0.1`), and may stand in a recipe of `configs/`.",
    ]
    for group in GROUPS:
        heading, _, _ = (group.__doc__ or "").partition(".")
        lines += ["", f"## {heading.strip()}", "", "| key | type | default | meaning |"]
        lines.append("| --- | --- | --- | --- |")
        for name, field in group.model_fields.items():
            cells = (f"`{name}`", type_text(field.annotation), f"`{default_text(name)}`")
            text = " | ".join(cell.replace("|", " or ") for cell in cells)
            lines.append(f"| {text} | {key_info(name).help.replace('|', ' or ')} |")
    return "\n".join(lines) + "\n"
