"""Measure how much there is to read:

    python3 benchmarks/structure.py [--root=FOLDER]

Counts in the sources of ROOT, a checkout of any version: late imports, modules, long lines, boolean
parameters, statements. Then trains one step of the bundled digits, and follows it from main to the
first saved checkpoint: the functions on the way, and the files that receive the configuration
(its own methods receive nothing).
"""

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 100
# Rooms from bottom to top, under their present and former names. The keys of the configuration are
# in cli, but stand below everything that reads them.
KEYS = ("src/cli/config.py", "src/cli/flags.py", "src/config.py")
FLOORS = (
    ("utils",),
    ("kernels",),
    ("models", "dataset", "parallel", "distributed"),
    ("runs",),
    ("inference",),
    ("training",),
    ("cli", "command.py", "help.py"),
    ("train.py",),
)
# The story of a training run is told in these; the others are what it uses.
STORY = ("train.py", "command.py", "cli", "training", "runs")

TRACE = """
import json, os, runpy, sys
root, target = sys.argv[1:3]
sys.path.insert(0, root)
os.chdir(root)
sys.argv = ["train.py", "--max_epoch=1", "--max_steps=1", "--run_eval=0", "--compile_cache=0",
            "--kernels=mindspore", f"--output_path={target}/out"]
functions, config_files, config_floors, state = {}, [], [], {"steps": 0, "done": False}

def is_config(value):
    return type(value).__name__ == "Config"

def follow(frame, event, argument):
    code = frame.f_code
    if event != "call" or not code.co_filename.startswith(root + os.sep) or state["done"]:
        return
    file = os.path.relpath(code.co_filename, root)
    if file.startswith("src") or file == "train.py":
        functions[file, code.co_firstlineno, code.co_name] = None
        arguments = code.co_varnames[:code.co_argcount + code.co_kwonlyargcount]
        passed = any(is_config(frame.f_locals.get(n)) for n in arguments if n != "self")
        if passed and not state["steps"]:
            config_files.append(file)
        if code.co_name == "__call__" and type(frame.f_locals.get("self")).__name__ == "TrainStep":
            state["steps"] += 1
        if code.co_name == "save_checkpoint":
            state["done"] = True

def finish():
    json.dump({"functions": list(functions), "config": config_files}, open(target + "/trace", "w"))

import atexit
atexit.register(finish)
sys.setprofile(follow)
runpy.run_path(os.path.join(root, "train.py"), run_name="__main__")
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT)
    root = parser.parse_args().root.resolve()
    modules = sorted([*root.glob("*.py"), *root.glob("src/**/*.py")])
    trees = {module: ast.parse(module.read_text()) for module in modules}
    others = [
        *root.glob("tests/**/*.py"),
        *root.glob("benchmarks/*.py"),
        *root.glob("scripts/*.py"),
    ]
    sources = [*root.glob("src/kernels/source/*")]
    rows = {
        "imports of project modules inside functions": sum(map(late_imports, trees.values())),
        "modules of src/ and the entry scripts": len(modules),
        f"lines over {WIDTH} columns: src/ and entry scripts": sum(map(long_lines, modules)),
        f"lines over {WIDTH} columns: tests, benchmarks, scripts": sum(map(long_lines, others)),
        f"lines over {WIDTH} columns: C++": sum(map(long_lines, sources)),
        "boolean parameters of functions": sum(map(boolean_parameters, trees.values())),
        "statements of src/": sum(
            statements(tree)
            for module, tree in trees.items()
            if module.is_relative_to(root / "src")
        ),
        **follow_training(root, trees),
    }
    for name, value in rows.items():
        print(f"{name:64} {value}")


def late_imports(tree):
    """Imports of project modules inside functions."""
    functions = (
        n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))
    )
    inside = {node for function in functions for node in ast.walk(function)}
    imports = (node for node in inside if isinstance(node, ast.ImportFrom))
    return sum((node.module or "").startswith("src.") for node in imports)


def long_lines(file):
    return sum(len(line) > WIDTH for line in file.read_text().splitlines())


def boolean_parameters(tree):
    """Parameters of functions that are annotated as bool."""
    count = 0
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            annotations = (ast.unparse(a.annotation) for a in arguments if a.annotation)
            count += sum(annotation == "bool" for annotation in annotations)
    return count


def statements(tree):
    """Statements other than docstrings."""
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.stmt))
    return sum(
        not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in nodes
    )


def follow_training(root, trees):
    """Train one step, and follow it from main to the first checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-c", TRACE, str(root), folder],
            check=True,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "XDG_CACHE_HOME": folder},
        )
        trace = json.loads((Path(folder) / "trace").read_text())
    story = [f for f in trace["functions"] if room(f[0]) in STORY]
    lines = sum(function_lines(trees[root / file], line) for file, line, _ in story)
    floors = [floor(file) for file in trace["config"]]
    climbs = sum(later > earlier for earlier, later in zip(floors, floors[1:]))
    return {
        "story from main to a saved checkpoint: files": len({file for file, _, _ in story}),
        "story from main to a saved checkpoint: lines of functions": lines,
        "files that receive the configuration before the first step": len(set(trace["config"])),
        "calls with the configuration that go back up a floor": climbs,
    }


def room(file):
    parts = Path(file).parts
    return parts[0] if parts[0] != "src" else parts[1]


def floor(file):
    if file in KEYS:
        return 0
    return next(index for index, rooms in enumerate(FLOORS) if room(file) in rooms)


def function_lines(tree, line):
    """Lines of the function that begins at ``line``, without blank lines and its docstring."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
            if line in (first, node.lineno):
                rows = {
                    row
                    for n in ast.walk(node)
                    if hasattr(n, "lineno")
                    for row in range(n.lineno, n.end_lineno + 1)
                    if n is not node
                }
                doc = node.body[0] if isinstance(node.body, list) else None
                if isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant):
                    rows -= set(range(doc.lineno, doc.end_lineno + 1))
                return len(rows | {node.lineno})
    return 0


if __name__ == "__main__":
    main()
