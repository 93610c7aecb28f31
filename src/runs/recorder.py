"""Reports, saves and plots what happens during training."""

import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mindspore import Parameter, nn

from src.cli.config import Config
from src.runs.checkpoint import TrainingState
from src.runs.run_folder import RunFolder, checkpoint_name, has_top5
from src.utils.errors import UserError
from src.utils.files import write_atomically
from src.utils.log import Log, no_log

# Minimum seconds between two drawings of the curves during training; one takes about 0.2 s.
DRAW_S = 30.0
# With fewer validation images, a percentage alone looks more precise than it is.
_FEW_IMAGES = 300
_COUNTS = ("skipped_steps", "replaced_images")


class Recorder:
    """Records nothing: for ranks other than 0, so that the training loop need not check its rank.

    Attributes:
        log: writes a line.
        shows_bar: whether training shows a progress bar.
    """

    log: Log = staticmethod(no_log)
    shows_bar = False

    def start(self, class_to_index: dict[str, int]) -> None:
        """A new run begins."""

    def resume(self, state: TrainingState, class_to_index: dict[str, int]) -> None:
        """A run resumes from ``state``; later records are discarded."""

    def add_epoch(self, metrics: dict[str, Any]) -> None:
        """Record the metrics of an epoch."""

    def save(
        self, state: TrainingState, network: nn.Cell, optimizer_state: Sequence[Parameter]
    ) -> None:
        """Save a checkpoint. Raises UserError if it cannot be written."""

    def save_best(
        self, state: TrainingState, network: nn.Cell, optimizer_state: Sequence[Parameter]
    ) -> None:
        """Save the best network so far. Raises UserError if it cannot be written."""

    def finish(self) -> None:
        """Training has ended."""

    def log_results(self) -> None:
        """Log the run folder, and the next command."""

    def last_checkpoint(self) -> str | None:
        """The file of the newest checkpoint, or None."""
        return None

    def best_checkpoint(self) -> str | None:
        """The file of the best network on the validation images, or None."""
        return None


class LogOnly(Recorder):
    """Logs and writes nothing, for a dry run."""

    def __init__(self, log: Log) -> None:
        self.log = log


class RunRecorder(Recorder):
    """Records to a run folder.

    Args:
        environment: hosts, device, kernels and versions, as environment.json records them.
    """

    shows_bar = True

    def __init__(
        self, folder: RunFolder, config: Config, log: Log, environment: Mapping[str, Any]
    ) -> None:
        self.folder, self._config, self._environment = folder, config, environment
        self.log = log
        self._lock = folder.lock()
        self._last_drawn = time.monotonic()
        self._events: EventWriter | None = None

    def start(self, class_to_index: dict[str, int]) -> None:
        self._write_start(class_to_index, first_epoch=0)

    def resume(self, state: TrainingState, class_to_index: dict[str, int]) -> None:
        self.folder.remove_leftovers()

        def is_final(line: dict[str, Any]) -> bool:
            # An epoch that is not finished is reported again when it is.
            is_past = state.finished_epoch or line["epoch"] < state.epoch
            return line["step"] <= state.step and is_past

        self.folder.keep_metrics(is_final)
        self._write_start(class_to_index, first_epoch=state.epoch + state.finished_epoch)

    def add_epoch(self, metrics: dict[str, Any]) -> None:
        text = f"epoch {metrics['epoch']}/{self._config.max_epoch} loss {metrics['loss']:.4f}"
        # 0 as long as every step is one of the first, whose time does not count.
        if metrics["images_per_second"]:
            text += f" {metrics['images_per_second']:.1f} images/s"
        if "top1" in metrics:
            text += f" acc={metrics['top1']:.2f}%(TOP1)"
            if has_top5(metrics):
                text += f" acc={metrics['top5']:.2f}%(TOP5)"
            if metrics["val_images"] < _FEW_IMAGES:
                text += f" ({metrics['correct']} of {metrics['val_images']} images)"
        for name in _COUNTS:
            if name in metrics:
                text += f", {metrics[name]} {name.replace('_', ' ')}"
        self.log(text)
        self.folder.add_metrics(**metrics)
        if self._events is not None:
            self._events.add_epoch(metrics)
        if time.monotonic() - self._last_drawn >= DRAW_S:
            # A failed drawing must not end the run; the last one, in ``finish``, must succeed.
            with suppress(UserError):
                self._draw()
            self._last_drawn = time.monotonic()

    def save(
        self, state: TrainingState, network: nn.Cell, optimizer_state: Sequence[Parameter]
    ) -> None:
        name = checkpoint_name(self._config.network, *state.position)
        path = self.folder.checkpoints / name
        state.write(path, network, optimizer_state)
        self.folder.point_latest_at(path)
        self.folder.prune_checkpoints(self._config.keep_checkpoint_max)

    def save_best(
        self, state: TrainingState, network: nn.Cell, optimizer_state: Sequence[Parameter]
    ) -> None:
        state.write(self.folder.best, network, optimizer_state)

    def finish(self) -> None:
        self._draw()

    def log_results(self) -> None:
        folder = self.folder
        if self._config.deploy == "best":
            checkpoint = folder.fused if folder.fused.exists() else folder.best
            path = shlex.quote(str(checkpoint))
            self.log(f"next: python3 predict.py --checkpoint_file_path={path} PHOTO_OR_FOLDER")
        self.log(f"results in {folder.path} (checkpoints in {folder.checkpoints}/)")

    def last_checkpoint(self) -> str | None:
        return self.folder.last_checkpoint()

    def best_checkpoint(self) -> str | None:
        return str(self.folder.best) if self.folder.best.exists() else None

    def _write_start(self, class_to_index: dict[str, int], first_epoch: int) -> None:
        # Repeating a run from its config.yaml starts a new run, so it must not resume.
        recorded = self._config.model_copy(update={"resume": ""})
        self.folder.write_start(recorded, class_to_index, self._environment)
        if self._config.tensorboard:
            self._events = EventWriter(self.folder.path / "tensorboard", first_epoch)

    def _draw(self) -> None:
        plot_curves(self.folder.read_metrics(), self.folder.curves)


def plot_curves(metrics: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw loss, learning rate and accuracy over epochs into a PNG file.

    Args:
        metrics: the lines of metrics.jsonl.

    Raises:
        UserError: if the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    epochs = [line["epoch"] for line in metrics]
    left.plot(epochs, [line["loss"] for line in metrics], "tab:blue", marker=".", label="training")
    compared = [line for line in metrics if "val_loss" in line]
    if compared:
        of_epochs, losses = zip(*((line["epoch"], line["val_loss"]) for line in compared))
        left.plot(of_epochs, losses, "tab:orange", marker=".", label="validation")
        left.legend()
    left.set(title="loss", xlabel="epoch")
    middle.plot(epochs, [line["lr"] for line in metrics], color="tab:gray", marker=".")
    middle.set(title="learning rate at the end of the epoch", xlabel="epoch", ylim=(0, None))
    evaluated = [line for line in metrics if "top1" in line]
    for key, colour in (("top1", "tab:green"), ("top5", "tab:olive")):
        known = [line for line in evaluated if key == "top1" or has_top5(line)]
        if known:
            right.plot(
                [line["epoch"] for line in known],
                [line[key] for line in known],
                color=colour,
                marker=".",
                label=f"{key} {known[-1][key]:.2f} %",
            )
    right.set(title="validation accuracy (%)" if evaluated else "not evaluated", xlabel="epoch")
    if evaluated:
        right.legend(loc="lower right")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    write_atomically(path, lambda partial: figure.savefig(partial, dpi=110))


class EventWriter:
    """Writes TensorBoard events to ``folder``; drops an earlier run's from ``epoch`` on."""

    def __init__(self, folder: Path, epoch: int = 0) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise UserError(
                "tensorboard=1 needs one more package: run 'bash scripts/setup.sh --tensorboard'"
            ) from None
        self._writer = SummaryWriter(str(folder), purge_step=epoch or None)

    def add_epoch(self, metrics: Mapping[str, Any]) -> None:
        """The numbers of one line of metrics.jsonl, over epochs."""
        for key, value in metrics.items():
            if isinstance(value, (int, float)) and key != "epoch":
                self._writer.add_scalar(key, value, metrics["epoch"])
        self._writer.flush()
