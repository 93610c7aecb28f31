"""Caches compiled graphs, so that a second run of the same network starts without compiling.

MindSpore has such a cache, but it hardly checks whether an entry still fits, and it writes entries
in place. Here each graph has its own folder, named after a digest of everything that the graph may
depend on. A folder is complete or absent, and its graph is checked before use.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import mindspore
from mindspore import Tensor, nn

from src.cli.config import PROJECT_ROOT, Affects, Config, keys_affecting
from src.utils.files import user_cache

_CHECKSUMS = "checksums.json"
_PARTIAL = ".partial."
_KEPT = 64
_ABANDONED_S = 24 * 3600


class GraphCache:
    """The compiled graphs of one user.

    A process can compile only one graph with it, because MindSpore reads the folder's path once.

    Args:
        folder: where to keep them. Without permission to write there, nothing is kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = Path(folder)

    def compile(
        self, cell: nn.Cell, inputs: Sequence[Tensor], config: Config, layers: str = ""
    ) -> bool:
        """Compile ``cell`` for ``inputs``, or load the graph from the cache.

        A graph with cells from outside this program is always compiled: nothing tells whether
        their code has changed.

        Args:
            layers: description of the layer factory of ``cell``, which is part of the key.

        Returns:
            Whether the graph came from the cache.
        """
        if not _is_of_this_program(cell):
            cell.compile(*inputs)
            return False
        kept = self._folder / _digest(cell, inputs, config, layers)
        if _is_whole(kept):
            _mark_as_used(kept)
            with _mindspore_keeps_graphs_in(kept):
                cell.compile(*inputs)
            return True
        growing = kept.with_name(f"{kept.name}{_PARTIAL}{os.getpid()}")
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            growing.mkdir()
        except OSError:
            cell.compile(*inputs)
            return False
        with _mindspore_keeps_graphs_in(growing):
            cell.compile(*inputs)
        _complete(growing, kept)
        self._prune()
        return False

    def _prune(self) -> None:
        """Remove all but the recently used graphs, and the partial ones of killed processes."""
        used = {folder: _last_used(folder) for folder in self._folder.iterdir()}
        abandoned = [
            folder
            for folder in used
            if _PARTIAL in folder.name and used[folder] < time.time() - _ABANDONED_S
        ]
        whole = sorted(
            (folder for folder in used if _PARTIAL not in folder.name),
            key=lambda folder: used[folder],
            reverse=True,
        )
        for folder in whole[_KEPT:] + abandoned:
            shutil.rmtree(folder, ignore_errors=True)


def user_graph_cache(config: Config) -> GraphCache | None:
    """The GraphCache in the user's cache.

    None if compile_cache is off, the device is not a CPU, or the user has no home.
    """
    cache = user_cache()
    if not config.compile_cache or config.device_target != "CPU" or cache is None:
        return None
    return GraphCache(cache / "graphs")


def _is_of_this_program(cell: nn.Cell) -> bool:
    """Whether the digest covers the code of all cells."""
    modules = {type(part).__module__.partition(".")[0] for _, part in cell.cells_and_names()}
    return modules <= {"src", "mindspore"}


def _digest(cell: nn.Cell, inputs: Sequence[Tensor], config: Config, layers: str) -> str:
    """Digest of what a graph may depend on.

    The software, the cell and its parameters, the configuration, the types of the inputs and
    MindSpore's environment variables.
    """
    parts = {
        "software": [mindspore.__version__, platform.python_version(), platform.machine()],
        "sources": _digest_of_files(sorted((PROJECT_ROOT / "src").rglob("*.py"))),
        "cell": _without_addresses(repr(cell)),
        "parameters": [
            (p.name, p.shape, str(p.dtype), p.requires_grad) for p in cell.get_parameters()
        ],
        "layers": _without_addresses(layers),
        "config": config.model_dump(
            mode="json", include=keys_affecting(Affects.MODEL, Affects.GRAPH)
        ),
        "inputs": [(tensor.shape, str(tensor.dtype)) for tensor in inputs],
        "environment": sorted(
            (name, value) for name, value in os.environ.items() if name.startswith("MS_")
        ),
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def _digest_of_files(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


@contextmanager
def _mindspore_keeps_graphs_in(folder: Path) -> Iterator[None]:
    """Let MindSpore take the graph in ``folder`` without further checks, or write it there."""
    changes = {
        "MS_COMPILER_CACHE_ENABLE": "1",
        "MS_COMPILER_CACHE_PATH": str(folder),
        "MS_DEV_FORCE_USE_COMPILE_CACHE": "1",
    }
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _complete(growing: Path, kept: Path) -> None:
    """Record checksums of a graph's files and rename its folder, unless another process was first.

    A whole graph is never removed: another process may be reading it.
    """
    try:
        (growing / _CHECKSUMS).write_text(json.dumps(_checksums(growing)))
        if kept.exists() and not _is_whole(kept):
            os.rename(kept, f"{growing}.damaged")
        os.rename(growing, kept)
    except OSError:
        pass
    for leftover in (growing, Path(f"{growing}.damaged")):
        shutil.rmtree(leftover, ignore_errors=True)


def _last_used(folder: Path) -> float:
    """Seconds since the epoch; now for one that another process has just renamed."""
    try:
        return folder.stat().st_mtime
    except OSError:
        return time.time()


def _mark_as_used(folder: Path) -> None:
    with suppress(OSError):
        os.utime(folder)


def _is_whole(folder: Path) -> bool:
    """Whether ``folder`` holds a graph whose files match their checksums."""
    try:
        recorded = json.loads((folder / _CHECKSUMS).read_text())
        return bool(recorded) and recorded == _checksums(folder)
    except (OSError, ValueError):
        return False


def _checksums(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != _CHECKSUMS
    }
