"""The end of a training with deploy=1: the network converted for deployment, and both forms evaluated."""

from pathlib import Path
from typing import cast

from mindspore import nn

from src.dataset.image_set import ImageSet
from src.inference.engines import network_engine
from src.inference.evaluation import Evaluator, class_table, tops
from src.inference.export import export_checkpoint
from src.kernels.library import choose_kernels
from src.models.blocks import find_block
from src.models.build import create_network
from src.models.formats import Arrays, read_weights
from src.models.weights import assign_weights
from src.parallel.communicator import Communicator
from src.runs.recorder import Recorder
from src.runs.run_folder import RunFolder
from src.utils.config import Config


def deploy(network: nn.Cell, config: Config, communicator: Communicator, images: ImageSet, recorder: Recorder) -> None:
    """Evaluate the trained ``network``; if it has blocks, write its fused form and evaluate what was written.

    As the ACNet repository does at the end of a training, with the last weights; with deploy=best those of best.ckpt, and the table of
    the classes. Every rank calls it; rank 0 writes fused.ckpt into the run folder, and the others take the weights from it.

    Raises:
        UserError: if the file cannot be written, or differs from the trained network by more than 1e-4.
    """
    evaluator = Evaluator(images, config, communicator, recorder.log)
    network.set_train(False)
    checkpoint = recorder.last_checkpoint()
    if config.deploy == "best":
        checkpoint = recorder.best_checkpoint()
        best = read_weights(checkpoint)[0] if checkpoint else None
        assign_weights(network, cast(Arrays, communicator.from_root(best)), checkpoint)
    trained = evaluator(network_engine(network, config))
    recorder.log(f"trained: {tops(trained.top1, trained.top5)} {checkpoint}")
    if config.deploy == "best":
        recorder.log("\n".join(["of each class:", *class_table(trained, images)]))
    if not find_block(config.block).kernels:
        return
    written = _write_fused(Path(checkpoint)) if checkpoint else None
    file, difference, arrays = cast(tuple[Path, float, Arrays], communicator.from_root(written))
    fused_network = create_network(config, fused=True, kernels=choose_kernels(config).library)
    assign_weights(fused_network, arrays, file)
    fused = evaluator(network_engine(fused_network.set_train(False), config))
    recorder.log(f"fused: {tops(fused.top1, fused.top5)} {file}")
    recorder.log(f"difference: {tops(abs(fused.top1 - trained.top1), abs(fused.top5 - trained.top5))}, outputs {difference:.1e}")


def _write_fused(checkpoint: Path) -> tuple[Path, float, Arrays]:
    """The file written, how far its outputs are from those of ``checkpoint``, and what it holds."""
    folder = checkpoint.parent if checkpoint.name == "best.ckpt" else checkpoint.parent.parent
    exported = export_checkpoint(checkpoint, {}, "CKPT", target=str(RunFolder(folder).fused))
    return exported.path, exported.difference, read_weights(exported.path)[0]
