"""Evaluation: every image counts exactly once, for any number of ranks."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from src.cli.command import Command
from src.cli.config import Affects, Config, keys_affecting
from src.dataset.batches import PADDING_LABEL, EvalBatches, prefetch
from src.dataset.image_set import ImageSet, class_names, overlap_message
from src.dataset.imagefolder import MindSporeEvalBatches
from src.dataset.splits import set_messages, split_fraction
from src.distributed.communicator import Communicator, check_ranks_agree
from src.inference.backends import Backend, OpenedModel, faster_backend_hint, open_backend
from src.inference.checkpoint_model import (
    CheckpointModel,
    first_label_message,
    open_recorded_training_images,
)
from src.inference.metrics import (
    EvalResult,
    EvalSums,
    interval,
    nonfinite_message,
    report_line,
    seeds_line,
    summary_lines,
    write_results,
)
from src.runs.run_folder import find_checkpoints, in_order
from src.utils.errors import PartialFailure, UserError
from src.utils.files import checksum
from src.utils.log import LINE_S, WARNING, Log, create_log, no_log
from src.utils.progress import ProgressBar

_LARGEST_BATCH = 64
_NAMED = 5


def evaluate(command: Command) -> None:
    """The command eval.py: evaluate the checkpoints that the command line names."""
    config, communicator = command.config, command.communicator
    log = command.checked(create_log()) if communicator.is_root else no_log
    paths = find_checkpoints(config.checkpoint_file_path)
    if command.flags.get("eval_data_path") and "data_path" in command.flags:
        log(f"{WARNING}--data_path changes nothing with --eval_data_path")
    if hint := faster_backend_hint(config, command.kernels):
        log(hint)
    results, failures = evaluate_checkpoints(paths, command, log)
    # As in training: of equal accuracies the lower loss is better.
    best = max(results, key=lambda result: (result["top1"], -result["loss"]))
    if len(results) > 1:
        log("best: " + report_line(best))
    log("\n".join(summary_lines(best)))
    log(seeds_line(best))
    if communicator.is_root and config.result_path:
        write_results(config.result_path, results)
        log(f"results in {config.result_path}")
    if failures:
        raise PartialFailure(
            f"{len(failures)} of {len(paths)} checkpoints could not be evaluated, the first: "
            f"{failures[0]}"
        )


class Evaluator:
    """Evaluates backends on a set of images, in batches of one size for one compiled graph.

    Args:
        images: the same ImageSet on every rank; each rank takes its shard.
        log: called with a line of text every ``line_s`` seconds.

    Attributes:
        batches: the rank's shard.
    """

    def __init__(
        self,
        images: ImageSet,
        config: Config,
        communicator: Communicator,
        log: Log = no_log,
        line_s: float = LINE_S,
    ) -> None:
        self._communicator, self._log, self._line_s = communicator, log, line_s
        self._classes = images.num_classes
        shard = max(-(-len(images) // communicator.size), 1)
        batch = min(config.per_batch_size, _LARGEST_BATCH, shard)
        batches = EvalBatches if config.input_pipeline == "own" else MindSporeEvalBatches
        self.batches = batches(images, config, communicator.rank, communicator.size, batch)

    def __call__(self, backend: Backend) -> EvalResult:
        """Evaluate on all ranks' images. Raises UserError if none can be decoded."""
        sums = EvalSums.zero(self._classes)
        messages: list[str] = []
        untimed, started = 0.0, time.perf_counter()
        with self._progress_bar() as progress:
            for number, batch in enumerate(prefetch(self.batches)):
                sums.add(backend(batch.images), batch.labels)
                messages += batch.undecodable
                progress.advance(int(np.count_nonzero(batch.labels != PADDING_LABEL)))
                if number == 0 and len(self.batches) > 1:
                    # The first batch compiles the graph, so leave it out of the rate.
                    untimed, started = sums.correct[2], time.perf_counter()
        seconds = max(time.perf_counter() - started, 1e-9)
        sums.rate = (sums.correct[2] - untimed) / seconds
        total = sums.over_ranks(self._communicator)
        all_messages = self._communicator.all_gather(messages)
        undecodable = tuple(message for one in all_messages for message in one)
        if len(undecodable) == total.correct[2]:
            raise UserError(
                f"none of the {len(undecodable)} images can be decoded: {undecodable[0]}"
            )
        return total.result(undecodable)

    def _progress_bar(self) -> ProgressBar:
        count, bar = len(self.batches.indices), self._communicator.has_terminal
        return ProgressBar("evaluated", count, "image", self._log, self._line_s, bar)


def evaluate_checkpoints(
    paths: Sequence[Path], command: Command, log: Log
) -> tuple[list[dict[str, Any]], list[str]]:
    """Evaluate checkpoint files in the order of their epochs.

    If one of several cannot be evaluated, the others still are.

    Args:
        log: called with a line per checkpoint.

    Returns:
        A {name: value} result per checkpoint, and the files that could not be evaluated.
    """
    communicator = command.communicator
    if communicator.size > 1:
        check_ranks_agree(communicator, {"number of checkpoints": len(paths)})
        sums = {f"checksum of {path.name}": checksum(path) for path in in_order(paths)}
        check_ranks_agree(communicator, sums)
    results: list[dict[str, Any]] = []
    failures: list[str] = []
    opened: OpenedModel | None = None
    data: EvalData | None = None

    def leave_out(path: Path, failure: UserError) -> None:
        if len(paths) == 1:
            raise failure
        failures.append(str(path))
        log(f"{path} is left out: {failure}")

    for path in in_order(paths):
        # Only the checkpoint itself may fail; bad images concern all checkpoints.
        try:
            opened = open_backend(path, command.flags, command.kernels, opened)
        except UserError as failure:
            leave_out(path, failure)
            continue
        if data is None or not data.fits(opened):
            before, data = data, EvalData(opened, communicator, log)
            if before is not None and before.images.fingerprint() != data.images.fingerprint():
                log(
                    f"{WARNING}{path.name} is evaluated on other images than the checkpoint before "
                    "it, so their accuracies cannot be compared"
                )
        data.say_whether_seen(opened, path.name if len(paths) > 1 else "")
        result = data.evaluate(opened)
        if result.nonfinite:
            leave_out(path, UserError(nonfinite_message(result.nonfinite, result.images)))
            continue
        if result.undecodable:
            log(undecodable_message(result))
        results.append(data.values(path, opened, result))
        log(report_line(results[-1]))
    if not results:
        raise UserError(f"none of the {len(paths)} checkpoints can be evaluated")
    return results, failures


class EvalData:
    """The images that checkpoints of one model are evaluated on."""

    def __init__(self, opened: OpenedModel, communicator: Communicator, log: Log) -> None:
        self._model = opened.model
        config = opened.model.config
        may_differ = keys_affecting(Affects.IMAGES, Affects.PROCESS)
        check_ranks_agree(communicator, config.model_dump(mode="json", exclude=may_differ))
        self.images = opened.model.open_images()
        check_ranks_agree(communicator, self.images.summary("validation"))
        lines = [*opened.model.notes, first_label_message(opened.model, self.images)]
        for line in (*filter(None, lines), *set_messages(self.images, "validation")):
            log(line)
        self._log, self._compared = log, set[tuple[Any, ...]]()
        self._evaluator = Evaluator(self.images, config, communicator, log)

    def fits(self, opened: OpenedModel) -> bool:
        return opened.model == self._model

    def say_whether_seen(self, opened: OpenedModel, name: str) -> None:
        """Log whether training has seen the images, once for checkpoints of the same training.

        Args:
            name: what to call the checkpoint, or "".
        """
        recorded = opened.metadata.get("config", {})
        training = (
            opened.metadata.get("images"),
            *(str(recorded.get(key)) for key in ("data_path", "val_split", "seed")),
        )
        if training in self._compared:
            return
        self._compared.add(training)
        if message := held_out_message(opened.model, opened.metadata, self.images):
            text = message.removeprefix(WARNING)
            prefix = WARNING if text != message else ""
            self._log(f"{prefix}{f'{name}: ' if name else ''}{text}")

    def evaluate(self, opened: OpenedModel) -> EvalResult:
        return self._evaluator(opened.classify)

    def values(self, path: Path, opened: OpenedModel, result: EvalResult) -> dict[str, Any]:
        """{name: value} of a checkpoint's result, as the result file has it."""
        names = class_names(self.images.class_to_index, self.images.num_classes)
        values = {
            "checkpoint": str(path),
            "epoch": opened.metadata.get("epoch"),
            "step": opened.metadata.get("step"),
            "top1": result.top1,
            "top5": result.top5,
            "images": result.images,
            "correct": result.correct,
            "top1_interval": interval(result.correct, result.images),
            "balanced_top1": result.balanced,
            "images_per_second": result.images_per_second,
            "loss": result.loss,
            "class_top1": dict(zip(names, result.class_top1)),
            "classes": result.by_class(names),
            "confusion": result.confusion,
            "calibration_error": result.calibration_error,
            "other_predictions": sum(result.class_images) - sum(result.class_predicted),
        }
        if result.undecodable:
            values["undecodable"] = len(result.undecodable)
        return values


def held_out_message(
    model: CheckpointModel, metadata: Mapping[str, Any], images: ImageSet
) -> str | None:
    """A message on whether training has seen ``images``; None if there is nothing to say.

    Args:
        metadata: what the checkpoint records, among it the fingerprint of the training images.
    """
    config, recorded = model.config, metadata.get("config", {})
    trained = metadata.get("images")
    if trained is not None and images.fingerprint() == trained:
        return (
            f"{WARNING}these look like the images that training used (the same names and sizes); "
            "on unseen images the accuracy may be lower"
        )
    seen = metadata.get("seen_before", 0)
    if seen and images.fingerprint() == metadata.get("validation"):
        return (
            f"{WARNING}the weights that training began with were trained on {seen} of these "
            f"{len(images)} images; the accuracy says little about unseen images"
        )
    if split_fraction(config):
        if trained is None:
            return f"evaluating on {len(images)} images split off from {config.data_path}"
        if model.open_training_images().fingerprint() == trained:
            return (
                f"evaluating on the {len(images)} images of {config.data_path} that training held "
                "out for validation"
            )
        is_recorded = config.data_path == recorded.get("data_path")
        seen = "it has seen some of them" if is_recorded else "it may have seen some of them"
        return (
            f"{WARNING}the {len(images)} images that --val_split takes from {config.data_path} are "
            f"not those that training held out: {seen}"
        )
    fraction = recorded.get("val_split")
    if trained is not None and isinstance(fraction, float) and fraction:
        used, _ = images.split(fraction, recorded["seed"])
        if used.fingerprint() == trained:
            return (
                f"{WARNING}training used these images and held some of them out; "
                f"--val_split={fraction:g} evaluates on those only"
            )
    trained_images = open_recorded_training_images(metadata, model.class_to_index)
    return overlap_message(trained_images, images) if trained_images is not None else None


def undecodable_message(result: EvalResult) -> str:
    """Message for images that cannot be decoded; names the first ones."""
    shown = "; ".join(result.undecodable[:_NAMED])
    more = " ..." if len(result.undecodable) > _NAMED else ""
    return (
        f"{WARNING}{len(result.undecodable)} of {result.images} images cannot be decoded and count "
        f"as wrong: {shown}{more} (the figures of each class leave them out)"
    )
