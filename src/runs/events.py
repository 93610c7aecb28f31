"""The figures of epochs as event files, which TensorBoard shows. tensorboardX, which writes them, is an optional extra."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.utils.errors import UserError


class EventWriter:
    """Writes into ``folder``; epochs from ``epoch`` on of an earlier run there count no more."""

    def __init__(self, folder: Path, epoch: int = 0) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise UserError("tensorboard=1 needs one more package: run 'bash scripts/setup.sh --tensorboard'") from None
        self._writer = SummaryWriter(str(folder), purge_step=epoch or None)

    def add_epoch(self, metrics: Mapping[str, Any]) -> None:
        """The numbers of one line of metrics.jsonl, over epochs."""
        for key, value in metrics.items():
            if isinstance(value, (int, float)) and key != "epoch":
                self._writer.add_scalar(key, value, metrics["epoch"])
        self._writer.flush()
