"""What the package offers: see its own docstring."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.cli.config import PROJECT_ROOT, Config
from src.cli.flags import misplaced_flags, parse_only_flags
from src.cli.recipes import load_config
from src.cli.start import prepare_rank
from src.distributed.communicator import Communicator
from src.distributed.launcher import FACTS_FILE, read_facts
from src.kernels.library import choose_kernels
from src.models.blocks import BLOCKS
from src.models.networks import NETWORKS
from src.models.published_weights import fetch_weights
from src.utils.device import select_device
from src.utils.errors import UserError
from src.utils.log import WARNING
from src.utils.progress import print_status

if TYPE_CHECKING:
    from src.inference.classifier import Classifier
    from src.models.layers import ImageClassifier

__all__ = ["BLOCKS", "NETWORKS", "UserError", "create_network", "fit", "load"]


# Flags of predict.py and train.py that make no sense here.
_NOT_FOR_LOAD = ("checkpoint_file_path", "result_path", "save_figure")
_NOT_FOR_NETWORK = ("checkpoint_file_path", "resume", "teacher")
# Of the flags of a training, those that its classifier takes too.
_DEVICE_FLAGS = ("device_target", "device_id", "kernels", "threads")


def load(checkpoint: str | Path, **flags: Any) -> "Classifier":
    """A trained network, ready to classify.

    Args:
        checkpoint: a file (.ckpt, .safetensors, .pth, .hdf5, .onnx, .mindir), a run folder, or the
            name of published weights.
        flags: flags of predict.py, such as ``top_k=3``; they win over what the file records.

    Raises:
        UserError: if the file cannot be read or does not fit, or for a wrong flag.
    """
    values = parse_only_flags(command_line(flags))
    for message in misplaced_flags(values, "predict"):
        raise UserError(message.removeprefix(WARNING))
    _refuse(values, _NOT_FOR_LOAD, "load() reads the file that it is given and writes none")
    config = load_config({**values, "checkpoint_file_path": str(checkpoint)})
    fetch_weights(str(checkpoint))
    _start_mindspore(config)
    from src.inference.classifier import Classifier
    from src.runs.run_folder import choose_checkpoint

    path = choose_checkpoint(str(checkpoint), print_status)
    return Classifier(path, values, choose_kernels(config))


def fit(data_path: str | Path, **flags: Any) -> "Classifier":
    """Train on images as train.py does, and load the best checkpoint.

    Training runs in processes of its own, whose output is printed here. Their run folder is next to
    those of the command: under ``output_path``.

    Args:
        data_path: a folder of class folders, or what else --data_path takes.
        flags: flags of train.py, such as ``max_epoch=5`` or ``ranks=2``.

    Raises:
        UserError: if training ends with an error, whose text it has.
    """
    with tempfile.TemporaryDirectory() as folder:
        facts = Path(folder) / "facts"
        arguments = command_line({"data_path": data_path, **flags})
        command = [sys.executable, str(PROJECT_ROOT / "train.py"), *arguments]
        _run_and_print(command, {FACTS_FILE: str(facts)})
        run_folder = read_facts(facts).get("run_folder")
    if run_folder is None:
        raise UserError("nothing was trained; leave dry_run out")
    checkpoint = Path(run_folder) / "best.ckpt"
    device = {key: flags[key] for key in _DEVICE_FLAGS if key in flags}
    return load(checkpoint if checkpoint.is_file() else Path(run_folder) / "ckpt_0", **device)


def create_network(network: str, num_classes: int, **flags: Any) -> "ImageClassifier":
    """A network with random weights, a MindSpore Cell: (N, 3, S, S) images -> (N, C) logits.

    Args:
        network: a name in ``NETWORKS`` or an alias.
        flags: flags of train.py, such as ``block="acb"``, ``image_size=64`` or ``seed=1``.

    Raises:
        UserError: for an unknown name, or a wrong flag.
    """
    values = {"network": network, "num_classes": num_classes, "data_path": os.curdir, **flags}
    typed = parse_only_flags(command_line(values))
    _refuse(typed, _NOT_FOR_NETWORK, "create_network() has random weights; load() reads a file")
    config = load_config(typed)
    _start_mindspore(config)
    from src.models import create

    return create.create_network(config)


def _refuse(flags: Mapping[str, str], names: Sequence[str], why: str) -> None:
    """Raise UserError if one of ``names`` is among the flags."""
    for name in names:
        if name in flags:
            raise UserError(f"{name} changes nothing here: {why}")


def _start_mindspore(config: Config) -> None:
    # MindSpore reads what is prepared here while it is imported.
    prepare_rank(Communicator(), config.device_target, config.threads)
    select_device(config.device_target, config.device_id or 0)


def command_line(flags: dict[str, Any]) -> list[str]:
    """--key=value for each of {key: value}; None leaves a key out."""
    return [f"--{key}={_as_typed(value)}" for key, value in flags.items() if value is not None]


def _as_typed(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return str(int(value)) if isinstance(value, bool) else str(value)


def _run_and_print(command: list[str], environment: dict[str, str]) -> None:
    """Run a command, and print its lines as they come. Raises UserError with its error line."""
    error = ""
    with subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        for line in process.stdout or ():
            if line.startswith("error: "):
                error = line.removeprefix("error: ").strip()
            else:
                print(line, end="", flush=True)
    if process.returncode:
        raise UserError(error or f"training ended with status {process.returncode}")
