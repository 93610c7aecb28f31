"""Loss, learning rate and accuracy over epochs as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from src.utils.errors import UserError
from src.utils.files import write_whole


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
    left.plot(epochs, [line["loss"] for line in metrics], color="tab:blue", marker=".")
    left.set(title="training loss", xlabel="epoch")
    middle.plot(epochs, [line["lr"] for line in metrics], color="tab:gray", marker=".")
    middle.set(title="learning rate at the end of the epoch", xlabel="epoch", ylim=(0, None))
    evaluated = [line for line in metrics if "top1" in line]
    for key, colour in (("top1", "tab:green"), ("top5", "tab:olive")):
        if evaluated:
            right.plot(
                [line["epoch"] for line in evaluated],
                [line[key] for line in evaluated],
                color=colour,
                marker=".",
                label=f"{key} {evaluated[-1][key]:.2f} %",
            )
    right.set(title="validation accuracy (%)" if evaluated else "not evaluated", xlabel="epoch")
    if evaluated:
        right.legend(loc="lower right")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    write_whole(path, lambda partial: figure.savefig(partial, dpi=110))


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
