"""Helpers for scripts/setup.sh and the Dockerfile that need only Python and its pip.

Each command prints its result, one entry per line:

    python3 scripts/dependencies.py wanted --all | [EXTRA ...]
        the requirements in pyproject.toml
    python3 scripts/dependencies.py hashed REPORT CONSTRAINTS
        what the report of a pip dry run would install, with the hashes in CONSTRAINTS
    python3 scripts/dependencies.py lock REPORT...
        new constraints: the versions in the reports, with the package index's hashes
    python3 scripts/dependencies.py headers
        the requirements of which only headers are used
    python3 scripts/dependencies.py serving
        the requirements of a server of an ONNX file
    python3 scripts/dependencies.py versions CONSTRAINTS
        the constraints without their hashes
    python3 scripts/dependencies.py pinned NAME CONSTRAINTS
        that package with its hashes, in pip's format
"""

import json
import os
import re
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pip._vendor import tomli
from pip._vendor.packaging.utils import (
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)
from pip._vendor.packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
INDEX = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/")
# Installed by a command of their own without hashes: its builds differ by accelerator, and only
# tests use it.
UNHASHED = ("torch",)


def wanted(*extras):
    project = tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    yield from project["dependencies"]
    for extra in project["optional-dependencies"] if extras == ("--all",) else extras:
        yield from project["optional-dependencies"][extra]


def headers():
    yield from settings()["headers"]


def serving():
    left_out = settings()["not_for_serving"]
    for requirement in wanted("serve", "onnx"):
        if re.match(r"[\w-]+", requirement)[0] not in left_out:
            yield requirement


def settings():
    return tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["acnet"]


def versions(constraints):
    for name, version in read_constraints(Path(constraints).read_text(encoding="utf-8")):
        yield f"{name}=={version}"


def pinned(name, constraints):
    known = read_constraints(Path(constraints).read_text(encoding="utf-8"))
    found = [with_hashes(*pin, digests) for pin, digests in known.items() if pin[0] == name]
    yield (
        found[0]
        if found
        else sys.exit(
            f"error: {constraints} has no {name}; UPDATE=1 bash scripts/setup.sh writes it"
        )
    )


def with_hashes(name, version, digests):
    return " ".join([f"{name}=={version}", *(f"--hash=sha256:{digest}" for digest in digests)])


def hashed(report, constraints):
    known = read_constraints(Path(constraints).read_text(encoding="utf-8"))
    for name, version in to_install(report):
        if (name, version) not in known:
            sys.exit(
                f"error: {constraints} has no hashes for {name}=={version}; UPDATE=1 bash "
                "scripts/setup.sh writes them"
            )
        yield with_hashes(name, version, known[name, version])


def lock(*reports):
    pinned = sorted({pin for report in reports for pin in to_install(report)})
    with ThreadPoolExecutor(8) as pool:
        for (name, version), digests in zip(
            pinned, pool.map(lambda pin: index_hashes(*pin), pinned)
        ):
            yield f"{name}=={version}" + "".join(
                f" \\\n    --hash=sha256:{digest}" for digest in digests
            )


def to_install(report):
    """(name, version) of the packages in a pip report, except those in UNHASHED."""
    found = json.loads(Path(report).read_text(encoding="utf-8"))["install"]
    named = [
        (canonicalize_name(item["metadata"]["name"]), item["metadata"]["version"]) for item in found
    ]
    return [(name, version) for name, version in named if name not in UNHASHED]


def read_constraints(text):
    """{(name, version): hashes}."""
    entries = re.findall(r"^([\w.-]+)==(\S+)((?:\s+\\?\s*--hash=sha256:\w+)*)", text, re.M)
    return {
        (canonicalize_name(name), version): re.findall(r"sha256:(\w+)", digests)
        for name, version, digests in entries
    }


def index_hashes(name, version):
    """SHA-256 of the files of a release that Linux with this Python may install."""
    request = urllib.request.Request(
        f"{INDEX}/{canonicalize_name(name)}/",
        headers={"Accept": "application/vnd.pypi.simple.v1+json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        files = json.load(answer)["files"]
    return sorted(
        file["hashes"]["sha256"] for file in files if installs(file["filename"], name, version)
    )


def installs(file, name, version):
    """Whether ``file`` is of this release and pip would take it on Linux with glibc.

    For any processor.
    """
    try:
        if not file.endswith(".whl"):
            return parse_sdist_filename(file) == (canonicalize_name(name), Version(version))
        of, release, _, tags = parse_wheel_filename(file)
    except ValueError:  # names of long ago
        return False
    this = f"cp3{sys.version_info[1]}"
    return (of, release) == (canonicalize_name(name), Version(version)) and any(
        (tag.interpreter in (this, "py3") or tag.abi == "abi3")
        and (tag.platform == "any" or re.fullmatch(r"manylinux.*(x86_64|aarch64)", tag.platform))
        for tag in tags
    )


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    for line in {
        "wanted": wanted,
        "hashed": hashed,
        "lock": lock,
        "headers": headers,
        "serving": serving,
        "versions": versions,
        "pinned": pinned,
    }[command](*arguments):
        print(line)
