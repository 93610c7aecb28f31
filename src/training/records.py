"""What a run leaves behind: its dated folder, metrics.jsonl and curves.png."""

import json
import os
from datetime import datetime
from pathlib import Path

from src.utils.errors import UserError
from src.utils.files import remove_partials, write_whole


class RunFolder:
    """OUTPUT_PATH/2026-01-31_time_12_00_00/ and the names in it."""

    def __init__(self, path):
        self.path = Path(path)
        self.checkpoints = self.path / "ckpt_0"
        self.best = self.path / "best.ckpt"
        self.latest = self.path / "latest.ckpt"
        self.log = self.path / "log.txt"
        self.metrics = self.path / "metrics.jsonl"
        self.curves = self.path / "curves.png"

    def write_start(self, config, class_to_index):
        """Write config.yaml and class_indexing.json."""
        (self.path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        (self.path / "class_indexing.json").write_text(json.dumps(class_to_index, indent=1), encoding="utf-8")

    def add_metrics(self, **values):
        """Append one line to metrics.jsonl."""
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def point_latest_at(self, checkpoint):
        """Make latest.ckpt a link to ``checkpoint``, a file in this folder; at every moment it is the old or the new one."""
        link = self.path / f".{os.getpid()}.partial.latest"
        link.unlink(missing_ok=True)
        try:
            link.symlink_to(checkpoint.relative_to(self.path))
            os.replace(link, self.latest)
        except OSError as failure:
            raise UserError(f"cannot write '{self.latest}': {failure.strerror}") from None

    def last_checkpoint(self):
        """The file that latest.ckpt stands for, or None."""
        return str(self.latest.resolve()) if self.latest.exists() else None

    def remove_leftovers(self):
        """Remove files that a killed run had begun to write."""
        for folder in (self.path, self.checkpoints):
            remove_partials(folder)

    def drop_metrics_after(self, step):
        """Forget lines of metrics.jsonl beyond ``step``, which a resumed run writes anew."""
        kept = [line for line in self.read_metrics() if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_whole(self.metrics, lambda partial: partial.write_text(text, encoding="utf-8"))

    def read_metrics(self):
        """The lines of metrics.jsonl as dicts."""
        if not self.metrics.exists():
            return []
        # A line without its end was being written when the run was killed.
        lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("}\n")]


def create_run_folder(output_path):
    """Make a new dated folder. Raises UserError where that cannot be written."""
    stamp = datetime.now().strftime("%Y-%m-%d_time_%H_%M_%S")
    try:
        for suffix in ("", *(f"_{number}" for number in range(2, 1000))):
            folder = Path(output_path) / (stamp + suffix)
            try:
                (folder / "ckpt_0").mkdir(parents=True)
                return RunFolder(folder)
            except FileExistsError:
                if not Path(output_path).is_dir():
                    raise
    except OSError as failure:
        raise UserError(f"cannot write to output_path '{output_path}': {failure.strerror}") from None
    raise UserError(f"output_path '{output_path}' has too many runs of this second")


def prune_checkpoints(folder, keep):
    """Remove the oldest .ckpt files of ``folder`` beyond the newest ``keep``."""
    files = sorted((file for file in Path(folder).glob("*.ckpt") if not file.name.startswith(".")),
                   key=lambda file: file.stat().st_mtime_ns)
    for file in files[:-keep]:
        os.unlink(file)


def plot_curves(metrics, path):
    """Draw loss, learning rate and accuracy over epochs into a PNG file.

    Args:
        metrics: dicts as in metrics.jsonl.
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
            right.plot([line["epoch"] for line in evaluated], [line[key] for line in evaluated], color=colour,
                       marker=".", label=f"{key} {evaluated[-1][key]:.2f} %")
    right.set(title="validation accuracy (%)" if evaluated else "not evaluated", xlabel="epoch")
    if evaluated:
        right.legend(loc="lower right")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
