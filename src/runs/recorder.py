"""What a training reports and saves as it goes on."""

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from mindspore import Parameter, nn

from src.runs.curves import plot_curves
from src.runs.events import EventWriter
from src.runs.run_folder import RunFolder
from src.runs.training_state import TrainingState
from src.utils.config import Config
from src.utils.errors import UserError

# Counts of an epoch that are reported if they are not 0, and their names in metrics.jsonl.
COUNTS = {"skipped": "skipped_steps", "replaced": "replaced_images"}
# At least so long between two drawings of the curves while training goes on; one takes about 0.2 s.
DRAW_S = 30.0


class Recorder:
    """Records nothing: the twin of RunRecorder for ranks other than 0, so that the training loop need not ask for its rank.

    Attributes:
        shows_progress: whether a person sees what this process prints.
    """

    shows_progress = False

    def log(self, text: str) -> None:
        """Print a line, and keep it."""

    def start(self, class_to_index: dict[str, int]) -> None:
        """A new training begins."""

    def go_on_from(self, state: TrainingState, class_to_index: dict[str, int]) -> None:
        """A training goes on from ``state``; what was recorded beyond it goes."""

    def add_epoch(self, metrics: dict[str, Any]) -> None:
        """Record the figures of an epoch."""

    def save(self, state: TrainingState, network: nn.Cell, optimizer_state: Sequence[Parameter]) -> None:
        """Save a checkpoint of the training. Raises UserError if it cannot be written."""

    def save_best(self, state: TrainingState, network: nn.Cell, optimizer_state: Sequence[Parameter]) -> None:
        """Save the best network so far. Raises UserError if it cannot be written."""

    def finish(self) -> None:
        """The training has come to its end."""

    def log_place(self) -> None:
        """Say where everything lies."""

    def last_checkpoint(self) -> str | None:
        """The file of the newest checkpoint, or None."""
        return None

    def best_checkpoint(self) -> str | None:
        """The file of the best network on the validation images, or None."""
        return None


class LogOnly(Recorder):
    """Prints and keeps nothing, for a dry run."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log

    def log(self, text: str) -> None:
        self._log(text)


class RunRecorder(Recorder):
    """Records into a run folder.

    Args:
        log: called with a line of text.
        environment: what the run computes with, for the record.
    """

    shows_progress = True

    def __init__(self, folder: RunFolder, config: Config, log: Callable[[str], None], environment: Mapping[str, Any]) -> None:
        self.folder, self._config, self._log, self._environment = folder, config, log, environment
        self._lock = folder.lock()
        self._drawn = time.monotonic()
        self._events: EventWriter | None = None

    def log(self, text: str) -> None:
        self._log(text)

    def start(self, class_to_index: dict[str, int]) -> None:
        self._begin(class_to_index, 0)

    def go_on_from(self, state: TrainingState, class_to_index: dict[str, int]) -> None:
        self.folder.remove_leftovers()
        # An epoch that is not finished is reported anew when it is.
        self.folder.keep_metrics(lambda line: line["step"] <= state.step and (state.finished_epoch or line["epoch"] < state.epoch))
        self._begin(class_to_index, state.epoch + state.finished_epoch)

    def add_epoch(self, metrics: dict[str, Any]) -> None:
        text = (f"epoch {metrics['epoch']}/{self._config.max_epoch} loss {metrics['loss']:.4f} "
                f"{metrics['images_per_second']:.1f} images/s")
        if "top1" in metrics:
            text += f" acc={metrics['top1']:.2f}%(TOP1) acc={metrics['top5']:.2f}%(TOP5)"
        self._log(text + "".join(f", {metrics[name]} {name.replace('_', ' ')}" for name in COUNTS.values() if name in metrics))
        self.folder.add_metrics(**metrics)
        if self._events is not None:
            self._events.add_epoch(metrics)
        if time.monotonic() - self._drawn >= DRAW_S:
            # A picture is not worth the training; the last one, in ``finish``, must be there.
            with suppress(UserError):
                self._draw()
            self._drawn = time.monotonic()

    def save(self, state: TrainingState, network: nn.Cell, optimizer_state: Sequence[Parameter]) -> None:
        steps = state.step - (state.epoch - 1) * state.steps_per_epoch
        path = self.folder.checkpoints / f"{self._config.network}-{state.epoch}_{steps}.ckpt"
        state.write(path, network, optimizer_state)
        self.folder.point_latest_at(path)
        self.folder.prune_checkpoints(self._config.keep_checkpoint_max)

    def save_best(self, state: TrainingState, network: nn.Cell, optimizer_state: Sequence[Parameter]) -> None:
        state.write(self.folder.best, network, optimizer_state)

    def finish(self) -> None:
        self._draw()

    def log_place(self) -> None:
        if self._config.deploy == "best":
            deployed = self.folder.fused if self.folder.fused.exists() else self.folder.best
            self._log(f"next: python3 predict.py --checkpoint_file_path={shlex.quote(str(deployed))} PHOTO_OR_FOLDER")
        self._log(f"results in {self.folder.path} (checkpoints in {self.folder.checkpoints}/)")

    def last_checkpoint(self) -> str | None:
        return self.folder.last_checkpoint()

    def best_checkpoint(self) -> str | None:
        return str(self.folder.best) if self.folder.best.exists() else None

    def _begin(self, class_to_index: dict[str, int], epoch: int) -> None:
        self.folder.write_start(self._config, class_to_index, self._environment)
        if self._config.tensorboard:
            self._events = EventWriter(self.folder.path / "tensorboard", epoch)

    def _draw(self) -> None:
        plot_curves(self.folder.read_metrics(), self.folder.curves)
