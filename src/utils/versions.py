"""What computes: this program and the libraries below it."""

import hashlib
import platform
import sys
from importlib import metadata
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_LIBRARIES = ("mindspore", "numpy")


def software() -> dict[str, str]:
    """{what: version} of the program, by the content of its files, of Python, and of the libraries that round numbers."""
    return {"program": _digest(), "python": platform.python_version(), **{name: _version(name) for name in _LIBRARIES}}


def _digest() -> str:
    found = hashlib.sha256()
    for file in sorted([*_ROOT.glob("src/**/*.py"), _ROOT / "default_config.yaml", Path(sys.argv[0])]):
        if file.is_file():
            found.update(file.name.encode() + file.read_bytes())
    return found.hexdigest()[:12]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"
