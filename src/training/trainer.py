"""The training loop. It counts steps only; after each epoch it reports, evaluates and saves."""

import math
import signal
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from mindspore import Parameter, nn

from src.cli.config import Config
from src.dataset.batches import Batch, TrainBatches, prefetch, training_size
from src.dataset.imagefolder import MindSporeTrainBatches
from src.dataset.splits import TrainingData
from src.distributed.communicator import Communicator
from src.distributed.stopping import GracefulStop
from src.inference.evaluation import EvalResult, Evaluator, undecodable_message
from src.inference.metrics import nonfinite_message
from src.inference.mindspore_backend import MindSporeBackend
from src.kernels.library import KernelChoice
from src.models.layers import ImageClassifier
from src.models.weight_files import Arrays
from src.runs.checkpoint import TrainingState, restore_arrays
from src.runs.recorder import Recorder
from src.training.create_step import create_train_step
from src.training.distillation import Teacher
from src.training.graph_cache import user_graph_cache
from src.training.schedules import create_schedule
from src.training.step import StepResult
from src.training.timing import RankTimes, StepRates, slow_input_message, slowest_rank_message
from src.training.weight_average import WeightAverage
from src.utils.errors import TrainingInterrupted, UserError
from src.utils.log import WARNING
from src.utils.machine import available_cores, software_versions
from src.utils.progress import TrainingProgress

# The first steps of a size of images compile the graph and fill caches; rates exclude them.
_WARMUP_STEPS = 2


@dataclass(frozen=True)
class EpochSums:
    """Sums over the steps of an epoch.

    Attributes:
        loss: losses, each the mean over ranks.
        skipped: steps that were skipped because gradients overflowed.
        replaced: images that were replaced because they cannot be decoded.
    """

    loss: float = 0.0
    skipped: int = 0
    replaced: int = 0

    def metrics(self, steps: int) -> dict[str, Any]:
        """The epoch's metrics over ``steps`` steps; counts that are 0 are left out."""
        counts = {"skipped_steps": self.skipped, "replaced_images": self.replaced}
        loss = round(self.loss / max(steps - self.skipped, 1), 6)
        return {"loss": loss, **{name: count for name, count in counts.items() if count}}


@dataclass(frozen=True)
class BestSoFar:
    """The best evaluation of a run.

    Attributes:
        top1: accuracy in percent; -1 before the first evaluation.
        loss: validation loss at the best epoch; of equal accuracies the lower loss is better.
        evaluations_since: evaluations since then, none of which was better.
    """

    top1: float = -1.0
    loss: float = math.inf
    evaluations_since: int = 0

    def after(self, top1: float, loss: float) -> "BestSoFar":
        """The best after one more evaluation."""
        if top1 > self.top1 or (top1 == self.top1 and loss < self.loss):
            return BestSoFar(top1, loss)
        return replace(self, evaluations_since=self.evaluations_since + 1)


class Trainer:
    """Trains ``network`` on the training images. Every rank creates one.

    Args:
        recorder: logs, saves and plots.
        kernels: the kernels that ``network`` computes with; checkpoints record their name.

    Attributes:
        class_to_index, labels_checksum: class map and checksum of the labels of the training
            images.
        fingerprints: checksums of the training images and of the validation images. Without
            validation images, the second is that of the resumed run's last evaluation, or None.
        threads: number of cores of each rank.
        has_pretrained_classifier: whether the initial weights include a classifier for these
            classes, so that evaluating them is meaningful.
        teacher: the network to distil from, or None.
        seen_before: number of validation images that the initial weights were trained on.
    """

    has_pretrained_classifier = False
    teacher: Teacher | None = None
    seen_before = 0

    def __init__(
        self,
        network: ImageClassifier,
        config: Config,
        communicator: Communicator,
        data: TrainingData,
        recorder: Recorder,
        kernels: KernelChoice,
    ) -> None:
        self.network, self.config, self.communicator = network, config, communicator
        self.data, self.recorder, self.kernels = data, recorder, kernels
        batches = TrainBatches if config.input_pipeline == "own" else MindSporeTrainBatches
        self.batches = batches(data.train, config, communicator.rank, communicator.size)
        self.steps_per_epoch = self.batches.steps_per_epoch
        self.last_step = self.steps_per_epoch * config.max_epoch
        if config.max_steps:
            self.last_step = min(self.last_step, config.max_steps)
        self.schedule = create_schedule(config)
        graph_cache = None if config.dry_run else user_graph_cache(config)
        self.step = create_train_step(network, config, communicator, graph_cache)
        self.average = WeightAverage(network, config.ema_decay) if config.ema_decay else None
        self.backend = MindSporeBackend(network, config)
        self.evaluator: Evaluator | None = None
        if data.validation is not None:
            self.evaluator = Evaluator(data.validation, config, communicator, recorder.log)
        self.class_to_index = data.train.class_to_index
        self.labels_checksum = zlib.crc32(data.train.labels.data)
        self.fingerprints = (
            data.train.fingerprint(),
            data.validation.fingerprint() if data.validation is not None else None,
        )
        self.threads = communicator.all_gather(available_cores())
        self._software = software_versions()
        self.first_step, self.best, self.sums = 0, BestSoFar(), EpochSums()
        # Whether the epoch of the last step was evaluated and recorded, and whether its checkpoint
        # is still missing.
        self._epoch_is_finished, self._is_unsaved = True, False
        self._first_top1, self._timed_from = 0.0, 0
        self._last_top1: float | None = None
        self._rates, self._times = StepRates(self.batches.global_batch_size), RankTimes()

    def restore(self, state: TrainingState, arrays: Arrays, path: Path, is_unsaved: bool) -> None:
        """Continue after ``state``.

        Args:
            path: the checkpoint that ``state`` and ``arrays`` come from.
            is_unsaved: whether the epoch's own checkpoint is still to be written.
        """
        restore_arrays(arrays, path, self.network, self._state_parameters)
        self.step.optimizer.restore_counters(state.optimizer)
        self.step.grad_scaler.restore(state.loss_scale)
        self.first_step = state.step
        self.best = BestSoFar(state.best_top1, state.best_loss, state.since_best)
        self.sums = EpochSums(**state.epoch_sums)
        self._epoch_is_finished, self._is_unsaved = state.finished_epoch, is_unsaved
        self._first_top1, self.seen_before = state.first_top1, state.seen_before
        if self._stops_early:
            self.last_step = self.first_step
        if self.data.validation is None:
            # Keep the images of the best result on record until they are evaluated again.
            self.fingerprints = self.fingerprints[0], state.validation
        self.recorder.resume(state, self.class_to_index)

    def fit(self, stop: GracefulStop | None = None) -> float:
        """Train to the end. Returns images/s over all ranks, without the first steps.

        Raises:
            TrainingInterrupted: after a signal on any rank, once the step is done and saved.
            UserError: if the loss or a gradient is no longer finite.
        """
        self.step.broadcast([*self.network.get_parameters(), *self._averages])
        if self.average is not None and self.first_step == 0:
            self.average.start()
        before = self._evaluate() if self.has_pretrained_classifier else None
        if before is not None:
            self._first_top1 = before.top1
            self.recorder.log(f"before training: {before.text}")
        self._finish_interrupted_epoch()
        micro_steps = self.config.accumulation_steps
        batches = prefetch(
            self.batches, self.first_step * micro_steps, self.last_step * micro_steps
        )
        self._timed_from = self.first_step + _WARMUP_STEPS
        with self._progress() as progress:
            for step in range(self.first_step, self.last_step):
                if step == self.first_step or step % self.steps_per_epoch == 0:
                    self._begin_epoch(step, progress)
                lr = self.schedule(step, self.steps_per_epoch)
                loss, stop_signal = self._train_step(batches, lr, step, stop)
                if self.average is not None:
                    self.average.update(step + 1)
                progress.update(step, loss, lr)
                if stop_signal:
                    progress.end_epoch()
                    self._stop(step + 1, stop_signal)
                if self._ends_epoch(step + 1):
                    progress.end_epoch()
                    self._finish_epoch(step + 1)
                    if self._stops_early:
                        break
                elif self._saves_at(step + 1):
                    self.recorder.save(*self._state(step + 1))
        self.recorder.finish()
        if self.average is not None:
            self.average.move_to_network()
        return self._rates.total()

    def _train_step(
        self, batches: Iterator[Batch], lr: float, step: int, stop: GracefulStop | None
    ) -> tuple[float, int]:
        """Train on the next batch.

        Returns:
            (mean loss over ranks, number of the signal that any rank received, or 0).

        Raises:
            UserError: if the loss or a gradient is not finite.
        """
        started = time.perf_counter()
        micro_batches = list(islice(batches, self.config.accumulation_steps))
        fetched = time.perf_counter()
        result = self.step(self.with_teacher_targets(micro_batches), lr, step)
        computed = time.perf_counter()
        # All ranks must learn of a signal in the same step.
        loss, stop_signal = self._share_result(result, micro_batches, stop)
        shared = time.perf_counter()
        # A run of one or two steps has no others to time.
        if step >= min(self._timed_from, self.last_step - 1):
            reduction = result.seconds["allreduce"]
            self._rates.add_step(shared - started)
            self._times = self._times.plus(
                input=fetched - started,
                compute=computed - fetched - reduction,
                waiting=shared - computed + reduction,
            )
        self._check_finite(result, loss, step, lr)
        return loss, stop_signal

    def with_teacher_targets(self, micro_batches: list[Batch]) -> list[Batch]:
        """The micro-batches with the teacher's predictions mixed into their targets."""
        return micro_batches if self.teacher is None else list(map(self.teacher, micro_batches))

    def accuracy_drop_warning(self) -> str | None:
        """A warning if training ended below the accuracy of the weights that it began with."""
        takes_best = self.config.deploy == "best" and self.best.top1 >= 0
        ended = self.best.top1 if takes_best else self._last_top1
        if ended is None or ended >= self._first_top1:
            return None
        return (
            f"{WARNING}training ended with {ended:.2f} % top-1, below the {self._first_top1:.2f} % "
            "that it began with; try a lower --lr"
        )

    def _progress(self) -> TrainingProgress:
        return TrainingProgress(
            self.batches.global_batch_size,
            self.recorder.log,
            self.config.log_interval,
            bar=self.recorder.shows_bar and self.communicator.has_terminal,
        )

    def _share_result(
        self, result: StepResult, micro_batches: Sequence[Batch], stop: GracefulStop | None
    ) -> tuple[float, int]:
        """Add the step to the epoch's sums.

        Returns:
            (mean loss over ranks, number of the signal that any rank received, or 0).
        """
        received = stop.signal if stop is not None else 0
        substituted = sum(batch.substituted for batch in micro_batches)
        total_loss, any_signal, replaced = self.communicator.all_reduce_sum(
            [result.loss, received > 0, substituted]
        )
        loss = float(total_loss) / self.communicator.size
        self._epoch_is_finished = False
        self.sums = EpochSums(
            self.sums.loss + (0.0 if result.skipped else loss),
            self.sums.skipped + result.skipped,
            self.sums.replaced + int(replaced),
        )
        return loss, max(self.communicator.all_gather(received)) if any_signal else 0

    def _check_finite(self, result: StepResult, loss: float, step: int, lr: float) -> None:
        parameter = result.nonfinite_parameter
        if result.skipped or (math.isfinite(loss) and parameter is None):
            return
        what = "although the gradients are finite"
        if parameter:
            what = f"and the gradient of {parameter} is not finite"
        last = self.communicator.broadcast_object(self.recorder.last_checkpoint())
        saved = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        raise UserError(
            f"the loss is {loss:g} at step {step + 1} (epoch {self._epoch_of(step + 1)}) with "
            f"learning rate {lr:.6g}, {what}; {saved}; try a lower --lr or a longer --warmup_epochs"
        )

    def _stop(self, step: int, number: int) -> None:
        self.recorder.save(*self._state(step))
        text = (
            f"stopped by {signal.Signals(number).name} after step {step}, which is saved; continue "
            f"with the same command and --resume=auto --output_path={self.config.output_path}"
        )
        self.recorder.log(text)
        self.communicator.barrier()
        raise TrainingInterrupted(number, text)

    def _begin_epoch(self, step: int, progress: TrainingProgress) -> None:
        epoch = step // self.steps_per_epoch + 1
        self.step.optimizer.backbone_frozen = epoch <= self.config.freeze_epochs
        size, before = (training_size(self.config, index) for index in (epoch - 1, epoch - 2))
        if self.config.progressive_size and (size != before or step == self.first_step):
            self.recorder.log(f"training on {size}-pixel images from epoch {epoch}")
            self._timed_from = step + _WARMUP_STEPS
        first = (epoch - 1) * self.steps_per_epoch
        steps = min(self.steps_per_epoch, self.last_step - first)
        progress.begin_epoch(f"epoch {epoch}/{self.config.max_epoch}", first, steps, step)

    def _finish_interrupted_epoch(self) -> None:
        """Do what an interrupted run did not get to between its last step and the next epoch."""
        if self._ends_epoch(self.first_step) and not self._epoch_is_finished:
            self._finish_epoch(self.first_step)
            if self._stops_early:
                self.last_step = self.first_step
        elif self._is_unsaved:
            self._save_if_due(self.first_step)

    def _finish_epoch(self, step: int) -> None:
        """Report the epoch that ended with ``step``; evaluate and save as configured."""
        metrics = self._epoch_metrics(step)
        if step % self.steps_per_epoch == 0:
            self.sums, self._epoch_is_finished = EpochSums(), True
        is_due = self._evaluates_after(step)
        result = self._evaluate() if is_due or step == self.last_step else None
        times = self.communicator.all_gather(self._times)
        self._times = RankTimes()
        metrics |= {} if result is None else _validation_metrics(result)
        metrics["rank_seconds"] = [[round(seconds, 3) for seconds in rank] for rank in times]
        self.recorder.add_epoch(metrics)
        messages = slowest_rank_message(times, self.communicator.hosts), slow_input_message(times)
        for message in filter(None, messages):
            self.recorder.log(message)
        if result is not None:
            self._last_top1 = result.top1
            self._keep_best(step, metrics, is_due)
        self._save_if_due(step)
        if self._stops_early:
            self.recorder.log(
                f"no improvement in {self.best.evaluations_since} evaluations: stopping early"
            )
        self.communicator.barrier()

    def _epoch_metrics(self, step: int) -> dict[str, Any]:
        """{name: value} of the epoch that ended with ``step``, without its evaluation."""
        epoch = self._epoch_of(step)
        return {
            "epoch": epoch,
            "step": step,
            **self.sums.metrics(step - (epoch - 1) * self.steps_per_epoch),
            "lr": self.schedule(step - 1, self.steps_per_epoch),
            "images_per_second": round(self._rates.since_last(), 2),
        }

    def _keep_best(self, step: int, metrics: Mapping[str, Any], is_due: bool) -> None:
        """Save best.ckpt after ``step`` if its evaluation is the best so far.

        Args:
            is_due: whether the run would evaluate here without --max_steps.
        """
        best = self.best.after(metrics["top1"], metrics["val_loss"])
        is_best = best.evaluations_since == 0
        if is_due:
            self.best = best
        elif is_best and self.best.top1 >= 0:
            # A run without this stop would not know it, and a resumed run is the same run.
            self.recorder.log(
                "best.ckpt is unchanged: this evaluation happens only because of "
                f"--max_steps={step}"
            )
            return
        if is_best:
            self.recorder.save_best(*self._state(step))

    def _evaluate(self) -> EvalResult | None:
        if self.evaluator is None:
            return None
        self.step.synchronize()
        with self.average.in_network() if self.average is not None else nullcontext():
            result = self.evaluator(self.backend)
        if result.undecodable:
            self.recorder.log(undecodable_message(result))
        if result.nonfinite:
            self.recorder.log(nonfinite_message(result.nonfinite, result.images))
        return result

    def _save_if_due(self, step: int) -> None:
        is_last = step == self.last_step or self._stops_early
        every_interval = self._epoch_of(step) % self.config.ckpt_interval == 0
        if is_last or every_interval or self._saves_at(step):
            self.recorder.save(*self._state(step))

    def _state(self, step: int) -> tuple[TrainingState, nn.Cell, list[Parameter]]:
        """What the recorder saves. Every rank calls it."""
        self.step.synchronize()
        state = TrainingState(
            step=step,
            epoch=self._epoch_of(step),
            finished_epoch=self._epoch_is_finished,
            epoch_sums=asdict(self.sums),
            best_top1=self.best.top1,
            best_loss=self.best.loss,
            since_best=self.best.evaluations_since,
            steps_per_epoch=self.steps_per_epoch,
            world_size=self.communicator.size,
            threads=self.threads,
            kernels=self.kernels.name,
            labels=self.labels_checksum,
            class_to_index=self.class_to_index,
            config=self.config.model_dump(mode="json"),
            optimizer=self.step.optimizer.counters(),
            loss_scale=self.step.grad_scaler.state(),
            images=self.fingerprints[0],
            validation=self.fingerprints[1],
            teacher=self.teacher.checksum if self.teacher is not None else None,
            first_top1=self._first_top1,
            seen_before=self.seen_before,
            software=self._software,
        )
        return state, self.network, self._state_parameters

    @property
    def _state_parameters(self) -> list[Parameter]:
        """What a resumed run needs besides the network: optimizer state and averaged weights."""
        return [*self.step.optimizer.state_parameters, *self._averages]

    @property
    def _averages(self) -> list[Parameter]:
        return self.average.parameters if self.average is not None else []

    @property
    def _stops_early(self) -> bool:
        return 0 < self.config.early_stopping <= self.best.evaluations_since

    @property
    def finished_reason(self) -> str | None:
        """Why a resumed run has no steps to do; None if it has."""
        if self.first_step < self.last_step:
            return None
        if self.first_step == self.steps_per_epoch * self.config.max_epoch:
            return f"it has done its {self.config.max_epoch} epochs"
        if self._stops_early:
            count = self.config.early_stopping
            return f"it stopped early, after {count} evaluations without improvement"
        return f"it has done {self.first_step} steps of --max_steps={self.config.max_steps}"

    def _epoch_of(self, step: int) -> int:
        """The epoch, from 1, that the step before ``step`` belongs to."""
        return math.ceil(step / self.steps_per_epoch)

    def _evaluates_after(self, step: int) -> bool:
        """Whether the run evaluates after ``step`` wherever --max_steps stops it."""
        epoch, rest = divmod(step, self.steps_per_epoch)
        is_last = epoch == self.config.max_epoch
        return rest == 0 and (is_last or epoch % self.config.eval_interval == 0)

    def _ends_epoch(self, step: int) -> bool:
        return step % self.steps_per_epoch == 0 or step == self.last_step

    def _saves_at(self, step: int) -> bool:
        interval = self.config.ckpt_interval_steps
        return interval > 0 and step % interval == 0


def _validation_metrics(result: EvalResult) -> dict[str, Any]:
    """{name: value} of an evaluation, as metrics.jsonl has them."""
    return {
        "top1": round(result.top1, 4),
        "top5": round(result.top5, 4),
        "correct": result.correct,
        "val_images": result.images,
        "val_loss": round(result.loss, 6),
        "class_top1": result.class_top1,
    }
