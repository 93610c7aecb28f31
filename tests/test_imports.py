"""Importing has no side effects, and modules import only from lower layers."""

import ast
import subprocess
import sys

from conftest import ROOT

# A folder (or group of modules in cli) may import only from those with lower numbers.
LAYERS = {
    "utils": 0,
    "cli.config": 1,
    "kernels": 2,
    "models": 3,
    "distributed": 3,
    "cli.recipes": 4,
    "cli.command": 4,
    "dataset": 5,
    "runs": 5,
    "inference": 6,
    "training": 7,
    "cli": 8,
}


def room(module):
    """The key in LAYERS of a module: its folder, or in cli the group of modules."""
    parts = module.split(".")
    if parts[1] != "cli":
        return parts[1]
    if parts[2] in ("config", "flags"):
        return "cli.config"
    return f"cli.{parts[2]}" if parts[2] in ("recipes", "command") else "cli"


def test_imports_point_one_way():
    for file in (ROOT / "src").rglob("*.py"):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        if module == "src.__init__":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("src."):
                own, imported = room(module), room(node.module)
                assert imported == own or LAYERS[imported] < LAYERS[own], (
                    f"{file} imports {node.module}"
                )


def test_no_circle_of_imports():
    """Imports inside functions and for type checkers count too."""
    arrows = {}
    for file in (ROOT / "src").rglob("*.py"):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        imported = (
            node.module or ""
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.ImportFrom)
        )
        arrows[name] = {module for module in imported if module.startswith("src.")}

    def reached(module, path):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        for other in arrows.get(module, ()):
            if other not in free:
                reached(other, [*path, module])
        free.add(module)

    free = set()
    for module in arrows:
        reached(module, [])


def test_importing_everything_has_no_effect_but_definitions():
    code = """
import os, sys, importlib, pathlib
sys.path.insert(0, '.')
before = dict(os.environ), os.sched_getaffinity(0)
for file in sorted(pathlib.Path('src').rglob('*.py')):
    importlib.import_module('.'.join(file.with_suffix('').parts))
for name in ('train', 'eval', 'export'):
    importlib.import_module(name)
prefixes = ('ONEDNN', 'OMPI', 'CUDA', 'MS_')
different = {k for k in os.environ if os.environ[k] != before[0].get(k)}
changed = {k for k in different if k.startswith(prefixes)}
assert not changed and os.sched_getaffinity(0) == before[1], changed
assert 'mpi4py.MPI' not in sys.modules
"""
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert finished.returncode == 0 and not finished.stdout, finished.stderr
