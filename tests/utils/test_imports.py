"""Importing does nothing, and imports point one way."""

import ast
import subprocess
import sys

from conftest import ROOT

LAYERS = {"utils": 0, "kernels": 1, "models": 2, "dataset": 2, "parallel": 2, "runs": 3, "inference": 4, "training": 5, "help": 6,
          "completion": 6, "command": 7}


def test_imports_point_one_way():
    for file in (ROOT / "src").rglob("*.py"):
        layer = file.relative_to(ROOT / "src").parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("src."):
                imported = node.module.split(".")[1]
                assert imported == layer or LAYERS[imported] < LAYERS[layer], f"{file} imports {node.module}"


def test_no_circle_of_imports():
    """Imports inside functions and for type checkers count too."""
    arrows = {}
    for file in (ROOT / "src").rglob("*.py"):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        imported = (node.module or "" for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom))
        arrows[name] = {module for module in imported if module.startswith("src.")}

    def reached(module, path):
        assert module not in path, " -> ".join([*path[path.index(module):], module])
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
changed = {k for k in os.environ if os.environ[k] != before[0].get(k) and k.startswith(('ONEDNN', 'OMPI', 'CUDA', 'MS_'))}
assert not changed and os.sched_getaffinity(0) == before[1], changed
assert 'mpi4py.MPI' not in sys.modules
"""
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0 and not finished.stdout, finished.stderr
