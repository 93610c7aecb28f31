"""Exports checkpoints for deployment. Each file is loaded back and compared before it counts."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import mindspore
import numpy as np
from mindspore import Tensor, nn

from src.cli.command import Command
from src.cli.config import Affects, Config, keys_affecting
from src.dataset.image_set import ImageSet, class_names
from src.dataset.sources import open_images
from src.dataset.transforms import eval_transform
from src.distributed.communicator import Communicator
from src.inference.backends import MINDIR_CHECKSUM, mindir_sidecar, open_backend
from src.inference.calibration import calibrate, scale_outputs
from src.inference.checkpoint_model import CheckpointModel
from src.inference.evaluation import Evaluator
from src.inference.formats import create_format
from src.inference.metrics import class_table, tops
from src.inference.mindspore_backend import create_backend, load_mindir
from src.inference.model_card import Exported, write_card
from src.inference.onnx import export_quietly
from src.inference.quantization import int8_file, quantize
from src.kernels.library import KernelChoice
from src.models.blocks import find_block
from src.models.create import create_network
from src.models.layers import ImageClassifier, InputNormalizer
from src.models.networks import NetworkSize, torch_name
from src.models.published_weights import place_for_output
from src.models.reparam import fuse
from src.models.weight_files import CHECKSUM, METADATA, Arrays, read_weights, text_checksum
from src.models.weights import assign_weights
from src.runs.checkpoint import save_checkpoint
from src.runs.recorder import Recorder
from src.runs.run_folder import RunFolder, choose_checkpoint
from src.utils.errors import UserError
from src.utils.files import checksum, staged, write_atomically
from src.utils.log import WARNING, Log, create_log
from src.utils.progress import print_status

_TOLERANCE = 1e-4
_PROBES = 4


def export(command: Command) -> None:
    """The command export.py: export the checkpoint that the command line names."""
    config, log = command.config, command.checked(create_log())
    path = choose_checkpoint(config.checkpoint_file_path, print_status)
    if path.suffix in (".onnx", ".mindir"):
        raise UserError(f"'{path}' is an exported file; export.py takes checkpoints and weights")
    temperature = _temperature(path, command, log)
    exported = export_checkpoint(
        path, command.flags, config.file_format, config.result_path, config.fuse, temperature
    )
    for note in exported.model.prediction_notes:
        log(note)
    for title, size in (("checkpoint", exported.original), ("exported", exported.exported)):
        log(
            f"{title}: {size.parameters:,} parameters, {size.multiply_adds / 1e9:.3f} G "
            "multiply-adds per image"
        )
    log(f"file sizes: {_file_size(path)}, {_file_size(exported.path)}")
    if config.file_format == "SAFETENSORS" and exported.is_fused:
        log(
            f"{WARNING}its fused convolutions have biases and no batch norms, so networks of "
            "torchvision do not load it; this program does"
        )
    log(f"exported to {exported.path}: largest relative difference {exported.difference:.1e}")
    card = write_card(exported, path)
    log(f"model card: {card}")
    int8 = int8_file(exported.path)
    if config.quantize == "int8":
        _quantize(exported, command, log)
    elif config.file_format == "ONNX" and int8.is_file():
        log(f"{WARNING}{int8} is left from an earlier export; --quantize=int8 writes it again")


def export_checkpoint(
    path: Path,
    flags: Mapping[str, Any],
    file_format: str,
    target: str = "",
    fuses: bool = True,
    temperature: float = 1.0,
) -> Exported:
    """Write the network of checkpoint ``path`` in a format of ``formats.EXPORT_FORMATS``.

    MINDIR and ONNX take (N, 3, S, S) float32 normalised images, any N.

    Args:
        target: the file to write; by default next to the checkpoint and named after it, or for
            downloaded weights in the current folder.
        fuses: fuse the blocks, if the network has any.
        temperature: what the outputs are divided by.

    Raises:
        UserError: if it cannot be written, or differs from the checkpoint by more than 1e-4; a file
            that was there before stays.
    """
    arrays, recorded = read_weights(path)
    model = CheckpointModel.of(arrays, recorded, flags, path)
    network = _create_float32_network(model)
    assign_weights(network, arrays, path)
    network.set_train(False)
    if temperature != 1.0:
        scale_outputs(network, temperature)
    fuses = fuses and model.has_branches
    written_network = fuse(network) if fuses else network
    metadata = {
        **recorded,
        "config": _config_to_record(model.config, recorded),
        "class_to_index": model.class_to_index,
        "fused": fuses or model.fused,
        "temperature": temperature * recorded.get("temperature", 1.0),
    }
    file = Path(target) if target else _default_file(path, file_format, "_fused" if fuses else "")
    _check_target(file, path, file_format)
    writer, size = create_format(file_format), model.config.image_size
    with staged(file) as partial:
        writer.write(written_network, partial, metadata, size)
        inputs = _probe_inputs(model.config)
        expected = network(Tensor(inputs)).asnumpy()
        found = writer.logits(partial, model, inputs)
        largest = max(np.abs(expected).max(), np.finfo(np.float32).tiny)
        difference = float(np.abs(found - expected).max() / largest)
        if not difference <= _TOLERANCE:
            raise UserError(
                f"the exported file differs from the checkpoint by {difference:.1e}, above "
                f"{_TOLERANCE:g}"
            )
    sizes = network_size(network, size), network_size(written_network, size)
    has_biases = fuses or (model.fused and bool(find_block(model.config.block).kernels))
    return Exported(file, *sizes, difference, temperature, model, recorded, has_biases)


def deploy(
    network: ImageClassifier,
    config: Config,
    communicator: Communicator,
    images: ImageSet,
    recorder: Recorder,
    kernels: KernelChoice,
) -> None:
    """Evaluate the trained network; if it has blocks, write its fused form and evaluate that too.

    The ACNet repository does so after training, with the last weights; deploy=best takes those of
    best.ckpt, and logs the accuracy of each class. Every rank calls it; rank 0 writes fused.ckpt to
    the run folder, and the others receive its weights.

    Raises:
        UserError: if the file cannot be written, or differs from the trained network by more than
            1e-4.
    """
    evaluator = Evaluator(images, config, communicator, recorder.log)
    network.set_train(False)
    checkpoint = recorder.last_checkpoint()
    if config.deploy == "best":
        found = recorder.best_checkpoint()
        best = communicator.broadcast_object(read_weights(found)[0] if found else None)
        if best is None:
            recorder.log(f"{WARNING}there is no best.ckpt, so the last weights are deployed")
        else:
            checkpoint = found
            assign_weights(network, best, checkpoint)
    trained = evaluator(create_backend(network, config, kernels))
    recorder.log(f"trained: {tops(trained.top1, trained.top5)} {checkpoint}")
    if config.deploy == "best":
        names = class_names(images.class_to_index, images.num_classes)
        recorder.log("\n".join(["of each class:", *class_table(trained.by_class(names))]))
    if not find_block(config.block).kernels:
        return
    written = _write_fused(Path(checkpoint)) if checkpoint else None
    file, difference, arrays = cast(
        tuple[Path, float, Arrays], communicator.broadcast_object(written)
    )
    fused_network = create_network(config, kernels.library, fused=True)
    assign_weights(fused_network, arrays, file)
    fused_network.set_train(False)
    fused = evaluator(create_backend(fused_network, config, kernels))
    recorder.log(f"fused: {tops(fused.top1, fused.top5)} {file}")
    change = tops(abs(fused.top1 - trained.top1), abs(fused.top5 - trained.top5))
    recorder.log(f"difference: {change}, outputs {difference:.1e}")


def network_size(network: nn.Cell, image_size: int) -> NetworkSize:
    """NetworkSize for one (3, image_size, image_size) image."""
    multiply_adds = activations = 0

    def count(cell: nn.Cell, _: Any, output: Tensor) -> None:
        nonlocal multiply_adds, activations
        outputs = output.size // output.shape[0]
        activations += outputs
        if not isinstance(cell, nn.BatchNorm2d):
            multiply_adds += outputs * int(np.prod(cell.weight.shape[1:]))

    # Hooks are called in PyNative mode only.
    mindspore.set_context(mode=mindspore.PYNATIVE_MODE)
    counted = (nn.Conv2d, nn.Dense, nn.BatchNorm2d)
    cells = [cell for _, cell in network.cells_and_names() if isinstance(cell, counted)]
    hooks = [cell.register_forward_hook(count) for cell in cells]
    try:
        network(Tensor(np.zeros((1, 3, image_size, image_size), np.float32)))
    finally:
        for hook in hooks:
            hook.remove()
        mindspore.set_context(mode=mindspore.GRAPH_MODE)
    parameters = sum(parameter.size for parameter in network.trainable_params())
    return NetworkSize(parameters, multiply_adds, activations)


def _config_to_record(config: Config, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration in the exported file: how and on what it was trained, as recorded."""
    trained = keys_affecting(Affects.TRAINING, Affects.GRAPH, Affects.IMAGES) | {"seed"}
    kept = {key: value for key, value in recorded.get("config", {}).items() if key in trained}
    return {**config.model_dump(mode="json"), **kept}


def _create_float32_network(model: CheckpointModel) -> ImageClassifier:
    """The network in float32, whatever it was trained in: exported files are for any device."""
    return create_network(model.config.model_copy(update={"amp_level": "O0"}), fused=model.fused)


class CkptFormat:
    """MindSpore checkpoints."""

    def write(
        self, network: nn.Cell, file: Path, metadata: dict[str, Any], image_size: int
    ) -> None:
        save_checkpoint(file, network.get_parameters(), metadata)

    def logits(self, file: Path, model: CheckpointModel, inputs: np.ndarray) -> np.ndarray:
        arrays, metadata = read_weights(file)
        network = _create_float32_network(CheckpointModel.of(arrays, metadata, {}, file))
        assign_weights(network, arrays, file)
        return network.set_train(False)(Tensor(inputs)).asnumpy()


class SafetensorsFormat(CkptFormat):
    """Safetensors with torchvision's names."""

    def write(
        self, network: ImageClassifier, file: Path, metadata: dict[str, Any], image_size: int
    ) -> None:
        from safetensors.numpy import save_file

        arrays = {
            torch_name(p.name, network.network_name): np.ascontiguousarray(p.asnumpy())
            for p in network.get_parameters()
        }
        texts = {METADATA: json.dumps(metadata)}
        texts[CHECKSUM] = text_checksum(arrays, texts[METADATA])
        write_atomically(file, lambda partial: save_file(arrays, partial, texts))


class MindirFormat:
    """MindIR, with the metadata in a file next to it."""

    def write(
        self, network: nn.Cell, file: Path, metadata: dict[str, Any], image_size: int
    ) -> None:
        inputs = Tensor(shape=[None, 3, image_size, image_size], dtype=mindspore.float32)
        write_atomically(file, lambda partial: export_quietly(network, inputs, partial, "MINDIR"))
        text = json.dumps({**metadata, MINDIR_CHECKSUM: checksum(file)})
        write_atomically(mindir_sidecar(file), lambda p: p.write_text(text, encoding="utf-8"))

    def logits(self, file: Path, model: CheckpointModel, inputs: np.ndarray) -> np.ndarray:
        return load_mindir(file)(Tensor(inputs)).asnumpy()


def _temperature(path: Path, command: Command, log: Log) -> float:
    """The key ``temperature`` as a number; "auto" is fitted on the validation images."""
    wanted = command.config.temperature
    if isinstance(wanted, float):
        return wanted
    found = calibrate(open_backend(path, command.flags, command.kernels), log)
    log(
        f"temperature {found.temperature:.3f} from {found.images} validation images, on which "
        f"probabilities were off by {found.before:.1f} percentage points on average and are now "
        f"by {found.after:.1f}"
    )
    return found.temperature


def _quantize(exported: Exported, command: Command, log: Log) -> None:
    count = command.config.calibration_images
    quantized = quantize(exported.path, command.flags, count, command.kernels, log)
    for title, result, file in (
        ("float32", quantized.float32, exported.path),
        ("int8", quantized.int8, quantized.path),
    ):
        log(
            f"{title}: {tops(result.top1, result.top5)}, {result.images_per_second:.1f} images/s, "
            f"{file.stat().st_size / 1e6:.2f} MB, {file}"
        )


def _write_fused(checkpoint: Path) -> tuple[Path, float, Arrays]:
    """(the file written, its difference from ``checkpoint``, its content)."""
    fused = RunFolder.of_checkpoint(checkpoint).fused
    exported = export_checkpoint(checkpoint, {}, "CKPT", target=str(fused))
    return exported.path, exported.difference, read_weights(exported.path)[0]


def _default_file(path: Path, file_format: str, suffix: str) -> Path:
    if not suffix and file_format == "CKPT":
        suffix = "_exported"
    path = place_for_output(path)
    return path.with_name(f"{path.stem}{suffix}.{file_format.lower()}")


def _check_target(file: Path, path: Path, file_format: str) -> None:
    if file.resolve() == path.resolve():
        raise UserError(f"'{file}' is the checkpoint itself; choose another --result_path")
    # MindSpore appends a missing ending, and would write another file than the user named.
    ending = f".{file_format.lower()}"
    if file_format != "SAFETENSORS" and file.suffix.lower() != ending:
        raise UserError(
            f"--result_path={file} must end in {ending}, or it cannot be recognised later"
        )


def _file_size(file: Path) -> str:
    return f"{file} {file.stat().st_size / 1e6:.2f} MB"


def _probe_inputs(config: Config) -> np.ndarray:
    """Random inputs and real images, (N, 3, S, S) float32, normalised."""
    size = config.image_size
    random = np.random.default_rng(0).normal(size=(_PROBES, 3, size, size)).astype(np.float32)
    digits = open_images("digits", "val")
    indices = range(0, len(digits), len(digits) // _PROBES)
    images = np.stack([eval_transform(digits.load(index), config) for index in indices])
    normalized = InputNormalizer(config.mean, config.std)(Tensor(images)).asnumpy()
    return np.concatenate([random, normalized])
