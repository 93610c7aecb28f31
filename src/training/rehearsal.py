"""A training tried for three steps, to say what the whole of it would take."""

import time
from collections.abc import Sequence

from src.inference.evaluation import Evaluator
from src.parallel.communicator import Communicator
from src.training.trainer import Trainer
from src.utils.config import Config
from src.utils.memory import available_bytes, peak_bytes

_STEPS = 3


def rehearse(trainer: Trainer, config: Config, communicator: Communicator) -> list[str]:
    """Run the first steps on every rank and one batch of an evaluation; lines on memory, time of a step and of the whole run.

    The network is of no use for a training afterwards.
    """
    seconds = [_seconds_of_step(trainer, number, config, communicator) for number in range(min(_STEPS, trainer.last_step))]
    first, later = seconds[0], min(seconds[1:], default=seconds[0])
    evaluation = _seconds_of_evaluation(trainer.evaluator, trainer, communicator) if trainer.evaluator else 0.0
    peaks = communicator.gather(peak_bytes() / 2 ** 30)
    free = communicator.gather(available_bytes() / 2 ** 30)
    epochs = -(-trainer.last_step // trainer.steps_per_epoch)
    evaluations = -(-epochs // config.eval_interval) if trainer.evaluator else 0
    whole = first + (trainer.last_step - 1) * later + evaluations * evaluation
    return [f"memory: {max(peaks):.2f} GiB in the largest of {communicator.size} ranks, {min(free):.1f} GiB are still free",
            f"time: {first:.1f} s for the first step, which compiles, then {later:.3f} s a step, "
            f"{trainer.batches.global_batch / later:.1f} images/s"
            + (f"; {evaluation:.1f} s an evaluation" if trainer.evaluator else ""),
            f"the whole run: about {_spoken(whole)} for {epochs} epochs of {trainer.steps_per_epoch} steps and {evaluations} evaluations, "
            "and what its checkpoints take; nothing was written"]


def _seconds_of_step(trainer: Trainer, number: int, config: Config, communicator: Communicator) -> float:
    passes = config.accumulation_steps
    batches = [trainer.batches[number * passes + part] for part in range(passes)]
    communicator.barrier()
    started = time.perf_counter()
    trainer.step(batches, config.lr, number)
    return max(communicator.gather(time.perf_counter() - started))


def _seconds_of_evaluation(evaluator: Evaluator, trainer: Trainer, communicator: Communicator) -> float:
    """By the second of two batches, the first of which compiles."""
    batch = evaluator.batches[0]
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        trainer.engine(batch.images)
        seconds.append(time.perf_counter() - started)
    return max(communicator.gather(seconds[-1] * len(evaluator.batches)))


def _spoken(seconds: float) -> str:
    """Seconds as "3 h 20 min"."""
    parts: Sequence[tuple[int, str]] = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
    whole = max(round(seconds), 1)
    place = next(number for number, (length, _) in enumerate(parts) if whole >= length)
    words = []
    for length, unit in parts[place:place + 2]:
        words.append(f"{whole // length} {unit}")
        whole %= length
    return " ".join(word for word in words if not word.startswith("0 "))
