"""Which figures of the documents are older than the code that they measure:

    python3 benchmarks/old_figures.py [--all]

A figure names its commit: as "commit 1a2b3c4" in the text next to it, or in a JSON file of raw
results. It is old if what computes has changed since then (the folders in MEASURED, or a benchmark
that the same section names). Prints a line for each old one, with --all for each, and the tables of
the documents that name no commit.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ("dataset", "distributed", "kernels", "models", "training")
DOCUMENTS = ("README.md", "docs/*.md", "benchmarks/README.md")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true")
    shows_all = parser.parse_args().all
    for place, commit, scripts in [*in_documents(), *in_results()]:
        if commit is None:
            print(f"{place}: a table that names no commit")
            continue
        changed = changed_since(commit, scripts)
        if changed or shows_all:
            since = ", ".join(f"{count} in {path}" for path, count in changed.items())
            print(f"{place}: commit {commit}, changes since then: {since or 'none'}")


def in_documents():
    """(place, commit or None, benchmarks) of each section that has figures."""
    for pattern in DOCUMENTS:
        for file in sorted(ROOT.glob(pattern)):
            text = file.read_text()
            for section in re.split(r"^(?=#)", text, flags=re.M):
                title = section.splitlines()[0] if section else ""
                place = f"{file.relative_to(ROOT)}, '{title.lstrip('# ')}'"
                scripts = sorted(set(re.findall(r"benchmarks/\w+\.py", section)))
                commits = re.findall(r"\bcommit ([0-9a-f]{7,40})\b", section)
                ours = [commit for commit in commits if is_ours(commit)]
                yield from ((place, commit, scripts) for commit in ours)
                # A table of figures is measured; others describe keys and files.
                if not ours and scripts and re.search(r"^\|.*\d.*\|", section, re.M):
                    yield place, None, scripts


def in_results():
    """(file, commit, []) of each JSON file of raw results."""
    for file in sorted(ROOT.glob("docs/*/*.json")):
        found = json.loads(file.read_text())
        if isinstance(found, dict) and is_ours(found.get("commit", "")):
            yield str(file.relative_to(ROOT)), found["commit"], []


def is_ours(commit):
    return bool(commit) and git("cat-file", "-e", f"{commit}^{{commit}}").returncode == 0


def changed_since(commit, scripts):
    """{path: number of commits that changed it since ``commit``}."""
    counts = {}
    for path in (*(f"src/{name}" for name in MEASURED), *scripts):
        listed = git("rev-list", "--count", f"{commit}..HEAD", "--", path).stdout.strip()
        if listed not in ("", "0"):
            counts[path] = int(listed)
    return counts


def git(*words):
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)


if __name__ == "__main__":
    sys.exit(main())
