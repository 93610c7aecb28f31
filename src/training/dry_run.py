"""A dry run: three steps of the last epoch are timed, to estimate the cost of the whole run."""

import math
import time

from src.cli.config import Config
from src.distributed.communicator import Communicator
from src.inference.evaluation import Evaluator
from src.training.trainer import Trainer
from src.utils.machine import available_bytes, peak_bytes

_STEPS = 3
_UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def estimate(trainer: Trainer, config: Config, communicator: Communicator) -> list[str]:
    """Run some steps and two batches of an evaluation on every rank.

    Changes the weights; do not train the network afterwards.

    Returns:
        Lines on the input, memory, the time per step, and the time of the whole run.
    """
    # Of the last epoch, for which progressive_size makes the largest images.
    last = trainer.last_step - 1
    first_of_epoch = last - last % trainer.steps_per_epoch
    steps = [max(last - back, first_of_epoch) for back in reversed(range(_STEPS))]
    seconds = [_step_seconds(trainer, step, config, communicator) for step in steps]
    reading = min(read for read, _ in seconds)
    first, later = seconds[0][1], min((step for _, step in seconds[1:]), default=seconds[0][1])
    # A CPU computes and reads images on the same cores.
    later = later + reading if config.device_target == "CPU" else max(later, reading)
    evaluation = 0.0
    if trainer.evaluator is not None:
        evaluation = _evaluation_seconds(trainer.evaluator, trainer, communicator)
    peak = max(communicator.all_gather(peak_bytes() / 2**30))
    free = min(communicator.all_gather(available_bytes() / 2**30))
    epochs = math.ceil(trainer.last_step / trainer.steps_per_epoch)
    evaluations = math.ceil(epochs / config.eval_interval) if trainer.evaluator else 0
    total = first + (trainer.last_step - 1) * later + evaluations * evaluation
    rate = trainer.batches.global_batch_size / later
    per_evaluation = f"; {evaluation:.1f} s per evaluation" if trainer.evaluator else ""
    return [
        f"input: {trainer.batches.global_batch_size / reading:.1f} images/s if nothing else runs; "
        f"it takes {100 * reading / later:.0f} % of a step",
        f"memory: {peak:.2f} GiB in the largest of {communicator.size} ranks, {free:.1f} GiB are "
        "still free",
        f"time: {first:.1f} s for the first step, which compiles, then {later:.3f} s per step, "
        f"{rate:.1f} images/s{per_evaluation}",
        f"the whole run: about {duration_text(total)} for {epochs} epochs of "
        f"{trainer.steps_per_epoch} steps and {evaluations} evaluations, plus checkpoints; nothing "
        "was written",
    ]


def duration_text(seconds: float) -> str:
    """Seconds as "3 h 20 min"."""
    rest = max(round(seconds), 1)
    largest = next(index for index, (length, _) in enumerate(_UNITS) if rest >= length)
    parts = []
    for length, unit in _UNITS[largest : largest + 2]:
        if rest // length:
            parts.append(f"{rest // length} {unit}")
        rest %= length
    return " ".join(parts)


def _step_seconds(
    trainer: Trainer, step: int, config: Config, communicator: Communicator
) -> tuple[float, float]:
    """Seconds for the images of a step, and for the step with them, in the slowest rank."""
    micro_steps = config.accumulation_steps
    communicator.barrier()
    started = time.perf_counter()
    micro_batches = [trainer.batches[step * micro_steps + index] for index in range(micro_steps)]
    reading = max(communicator.all_gather(time.perf_counter() - started))
    started = time.perf_counter()
    trainer.step(trainer.with_teacher_targets(micro_batches), config.lr, step)
    return reading, max(communicator.all_gather(time.perf_counter() - started))


def _evaluation_seconds(
    evaluator: Evaluator, trainer: Trainer, communicator: Communicator
) -> float:
    """Extrapolated from one batch; a first one, which compiles the graph, is not timed."""
    for _ in range(2):
        started = time.perf_counter()
        trainer.backend(evaluator.batches[0].images)
        seconds = time.perf_counter() - started
    return max(communicator.all_gather(seconds * len(evaluator.batches)))
