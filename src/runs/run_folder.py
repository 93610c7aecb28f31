"""A run's dated folder, the files in it, and which checkpoint a path stands for.

Imports nothing of MindSpore.
"""

import fcntl
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from src.cli.config import Config
from src.cli.recipes import read_recipe
from src.models.published_weights import local_weights
from src.utils.errors import UserError
from src.utils.files import remove_partials, write_atomically

_ATTEMPTS = 100
# How the names of files end that export.py and training make of a checkpoint.
_EXPORTED = ("_exported", "_fused", "fused")
# The position of a checkpoint whose name does not tell it.
NO_POSITION = (0, 0)


class RunFolder:
    """OUTPUT_PATH/2026-01-31_time_12_00_00/ and the names of the files in it."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "ckpt_0"
        self.best = self.path / "best.ckpt"
        self.fused = self.path / "fused.ckpt"
        self.latest = self.path / "latest.ckpt"
        self.superseded = self.path / "superseded"
        self.log = self.path / "log.txt"
        self.metrics = self.path / "metrics.jsonl"
        self.curves = self.path / "curves.png"
        self.report = self.path / "report.html"
        self.config = self.path / "config.yaml"

    @classmethod
    def of_checkpoint(cls, path: Path) -> "RunFolder":
        """The run folder that a checkpoint is in, as best.ckpt or in ckpt_0/.

        Raises:
            UserError: if the checkpoint was moved or copied out of its run folder.
        """
        # latest.ckpt is a link into ckpt_0/.
        path = path.resolve()
        folder = cls(path.parent.parent if path.parent.name == "ckpt_0" else path.parent)
        is_inside = path.parent == folder.checkpoints.resolve() or path.name == folder.best.name
        if not is_inside or not folder.config.is_file():
            raise UserError(
                f"'{path}' is not in its run folder, which a resumed run continues to write; move "
                f"it back, or start a new run from its weights with --checkpoint_file_path={path}"
            )
        return folder

    def lock(self) -> int:
        """Keep other runs from writing here until this process ends. Returns the lock's handle.

        Raises:
            UserError: if another run is writing here.
        """
        handle = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another run is writing to '{self.path}'; wait until it ends, or start a new run "
                "without --resume"
            ) from None
        except OSError:
            pass  # a file system without locks
        return handle

    def write_start(
        self, config: Config, class_to_index: dict[str, int], environment: Mapping[str, Any]
    ) -> None:
        """Write config.yaml, class_indexing.json and environment.json."""
        texts = {
            "config.yaml": config.to_yaml(),
            "class_indexing.json": json.dumps(class_to_index, indent=1),
            "environment.json": json.dumps(environment, indent=1),
        }
        for name, text in texts.items():
            write_atomically(
                self.path / name, partial(Path.write_text, data=text, encoding="utf-8")
            )

    def add_metrics(self, **values: Any) -> None:
        """Append a line to metrics.jsonl. Raises UserError if it cannot be written."""
        try:
            with open(self.metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as failure:
            raise UserError(f"cannot write '{self.metrics}': {failure.strerror}") from None

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        if not self.metrics.exists():
            return []
        # A run can be killed while it writes a line.
        lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("}\n")]

    def read_config(self) -> dict[str, Any]:
        """The keys of config.yaml. Raises UserError if this is not a run folder."""
        return read_recipe(self.config)

    def read_environment(self) -> dict[str, Any]:
        """The content of environment.json; {} for a run of a version that wrote none."""
        file = self.path / "environment.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def keep_metrics(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Keep the lines of metrics.jsonl for which ``keep`` is true; a resumed run adds others."""
        text = "".join(json.dumps(line) + "\n" for line in self.read_metrics() if keep(line))
        write_atomically(self.metrics, lambda partial: partial.write_text(text, encoding="utf-8"))

    def point_latest_at(self, checkpoint: Path) -> None:
        """Make latest.ckpt a link to ``checkpoint``; at any moment it is the old or the new one."""
        link = self.path / f".{os.getpid()}.partial.latest"
        link.unlink(missing_ok=True)
        try:
            link.symlink_to(checkpoint.resolve().relative_to(self.path.resolve()))
            os.replace(link, self.latest)
        except OSError as failure:
            raise UserError(f"cannot write '{self.latest}': {failure.strerror}") from None

    def last_checkpoint(self) -> str | None:
        """The file that latest.ckpt links to, or None."""
        return str(self.latest.resolve()) if self.latest.exists() else None

    def saved_checkpoints(self) -> list[Path]:
        """The checkpoints in ckpt_0 with an epoch and steps in their names, in that order."""
        files = [f for f in self.checkpoints.glob("*.ckpt") if not f.name.startswith(".")]
        return [file for file in in_order(files) if checkpoint_position(file) != NO_POSITION]

    def prune_checkpoints(self, keep: int) -> None:
        """Delete all but the last ``keep`` checkpoints in ckpt_0, whatever the times of the files.

        Files with other names are not the run's, and stay.
        """
        for file in self.saved_checkpoints()[:-keep]:
            os.unlink(file)

    def set_aside(self, files: Sequence[Path]) -> Path:
        """Move checkpoints to a folder where no command looks for them; returns the folder.

        Raises:
            UserError: if they cannot be moved.
        """
        try:
            self.superseded.mkdir(exist_ok=True)
            for file in files:
                os.replace(file, self.superseded / file.name)
        except OSError as failure:
            raise UserError(f"cannot write '{self.superseded}': {failure.strerror}") from None
        return self.superseded

    def remove_leftovers(self) -> None:
        """Remove files that a killed run had begun to write."""
        for folder in (self.path, self.checkpoints):
            remove_partials(folder)


def dated_run_folder(output_path: str) -> RunFolder:
    """A RunFolder named after this moment that does not exist yet."""
    stamp = datetime.now().strftime("%Y-%m-%d_time_%H_%M_%S")
    suffixes = ("", *(f"_{number}" for number in range(2, 1000)))
    paths = (Path(output_path) / f"{stamp}{suffix}" for suffix in suffixes)
    free = next((path for path in paths if not os.path.lexists(path)), None)
    return RunFolder(free or Path(output_path) / stamp)


def create_run_folder(planned: RunFolder) -> RunFolder:
    """Create ``planned``, or another folder if a run of the same second has taken it.

    Raises:
        UserError: if it cannot be created.
    """
    output_path, folder = planned.path.parent, planned
    try:
        for _ in range(_ATTEMPTS):
            try:
                folder.checkpoints.mkdir(parents=True)
                return folder
            except FileExistsError:
                if not output_path.is_dir():
                    raise
                folder = dated_run_folder(str(output_path))
    except OSError as failure:
        reason = failure.strerror
        raise UserError(f"cannot write to output_path '{output_path}': {reason}") from None
    raise UserError(f"output_path '{output_path}' has too many runs that started in this second")


def run_date(folder: Path) -> tuple[str, int]:
    """(date and time, number within that second) from the name of a run folder.

    ("", 0) for another name.
    """
    found = re.match(r"(\d{4}-\d\d-\d\d_time_\d\d_\d\d_\d\d)(?:_(\d+)$)?", folder.name)
    return (found[1], int(found[2] or 0)) if found else ("", 0)


def has_top5(line: Mapping[str, Any]) -> bool:
    """Whether a line of metrics.jsonl has a meaningful top-5 accuracy: more than five classes."""
    classes = line.get("class_top1")
    return "top5" in line and (classes is None or len(classes) > 5)


def checkpoint_name(network: str, epoch: int, steps: int) -> str:
    """NETWORK-EPOCH_STEPS.ckpt, as the model zoo names checkpoints."""
    return f"{network}-{epoch}_{steps}.ckpt"


def checkpoint_position(file: Path) -> tuple[int, int]:
    """(epoch, steps in it) from the name of a checkpoint; NO_POSITION for another name."""
    found = re.search(r"-(\d+)_(\d+)$", file.stem)
    return (int(found[1]), int(found[2])) if found else NO_POSITION


def in_order(paths: Sequence[Path]) -> list[Path]:
    """Checkpoints in the order of epochs and steps in their names; others first."""
    return sorted(paths, key=lambda path: (checkpoint_position(path), str(path)))


def find_checkpoints(path: str) -> list[Path]:
    """The checkpoint files that ``path``, a file or a folder, names.

    Raises:
        UserError: if there is none.
    """
    if not path:
        raise UserError("no checkpoint given: pass --checkpoint_file_path=FILE_OR_FOLDER")
    location = Path(local_weights(path))
    if location.is_dir():
        files = sorted(f for f in location.glob("*.ckpt") if not f.name.startswith("."))
        if not files:
            raise UserError(f"there is no .ckpt file in the folder '{path}'")
        return files
    if not location.exists():
        raise UserError(f"checkpoint '{path}' does not exist")
    return [location]


def choose_checkpoint(path: str, log: Callable[[str], None]) -> Path:
    """The checkpoint that ``path`` stands for: a file; in a folder best.ckpt, or the latest.

    Args:
        log: reports the choice in a folder.

    Raises:
        UserError: if there is none.
    """
    files = find_checkpoints(path)
    if not Path(path).is_dir():
        return files[0]
    named = {file.name: file for file in files}
    trained = [file for file in files if not file.stem.endswith(_EXPORTED)] or files
    chosen = named.get("best.ckpt") or named.get("latest.ckpt") or in_order(trained)[-1]
    log(f"using {chosen}, one of {len(files)} checkpoints there")
    return chosen
