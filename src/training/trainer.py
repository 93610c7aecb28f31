"""The training loop. It knows steps only; epochs are where it reports, evaluates and saves."""

import math
import signal
import time
import zlib
from collections.abc import Sequence
from itertools import islice
from typing import Any

from mindspore import Parameter, nn

from src.dataset.batches import Batch, TrainBatches, prefetch
from src.dataset.image_set import ImageSet
from src.inference.engines import NetworkEngine
from src.inference.evaluation import Evaluator, nonfinite_line, undecodable_line
from src.parallel.communicator import Communicator
from src.parallel.stopping import StopRequest
from src.runs.recorder import COUNTS, Recorder
from src.runs.resume import ResumePoint, check_batches
from src.runs.training_state import TrainingState, restore_arrays
from src.training.graph_cache import GraphCache
from src.training.progress import Progress
from src.training.rank_times import RankTimes, slowest_line
from src.training.schedule import learning_rate
from src.training.step import StepResult, create_train_step
from src.utils.config import Config
from src.utils.device import available_cores
from src.utils.errors import Stopped, UserError

# The first steps compile the graph and fill caches; rates leave them out.
_WARMUP_STEPS = 2


class Trainer:
    """Trains ``network`` on ``train_images``. Every rank constructs one with the same arguments but for the recorder.

    Args:
        eval_images: an ImageSet to evaluate on while training, or None.
        recorder: takes what there is to report and to save.
        resumed: the ResumePoint to go on from, or None.
        graph_cache: the GraphCache to take the compiled training step from, or None.
        kernels: what ``network`` computes with, for the record.
    """

    def __init__(self, network: nn.Cell, config: Config, communicator: Communicator, train_images: ImageSet,
                 eval_images: ImageSet | None, recorder: Recorder, resumed: ResumePoint | None = None,
                 graph_cache: GraphCache | None = None, kernels: str = "mindspore") -> None:
        self.kernels = kernels
        self.network, self.config, self.communicator, self.recorder = network, config, communicator, recorder
        self.batches = TrainBatches(train_images, config, communicator.rank, communicator.size)
        self.steps_per_epoch = self.batches.steps_per_epoch
        self.last_step = self.steps_per_epoch * config.max_epoch
        if config.max_steps:
            self.last_step = min(self.last_step, config.max_steps)
        self.step = create_train_step(network, config, communicator, graph_cache)
        self.evaluator = Evaluator(eval_images, config, communicator, recorder.log) if eval_images is not None else None
        self.engine = NetworkEngine(network, config)
        self.class_to_index, self._labels = train_images.class_to_index, zlib.crc32(train_images.labels.data)
        self.threads = communicator.gather(available_cores())
        self.first_step, self.best_top1, self._finished_epoch, self._is_unsaved = 0, -1.0, True, False
        # The loss on the validation images then, by which equal accuracies differ, and evaluations in a row that were no better.
        self._best_loss, self._since_best = math.inf, 0
        # Over the steps of the epoch: losses (means over ranks), steps skipped for overflow, images replaced.
        self._sums = _no_sums()
        if resumed is None:
            recorder.start(self.class_to_index)
        else:
            self._go_on_from(resumed)
        self._rates, self._times = _Rates(self.batches.global_batch), RankTimes()

    def run(self, stop_request: StopRequest | None = None) -> float:
        """Train to the end; returns images/s over all ranks, the first steps left out.

        Raises:
            Stopped: after a signal that ``stop_request`` noted on any rank, when the step is done and saved.
            UserError: if the loss or a gradient is no longer finite.
        """
        self.step.reducer.broadcast([*self.network.get_parameters(), *self.step.optimizer.state_parameters])
        if self._ends_epoch(self.first_step) and not self._finished_epoch:
            self._finish_epoch(self.first_step)
        elif self._is_unsaved:
            self._save_if_due(self.first_step)
        passes = self.config.accumulation_steps
        batches = prefetch(self.batches, self.first_step * passes, self.last_step * passes)
        # A run of one or two steps has nothing else to time.
        first_timed = min(self.first_step + _WARMUP_STEPS, self.last_step - 1)
        with Progress(self.batches.global_batch, self.recorder.log, self.config.log_interval, self.recorder.shows_progress) as progress:
            for step in range(self.first_step, self.last_step):
                if step == self.first_step or step % self.steps_per_epoch == 0:
                    self._begin_epoch(step, progress)
                started = time.perf_counter()
                forward = list(islice(batches, passes))
                fetched = time.perf_counter()
                lr = learning_rate(step, self.steps_per_epoch, self.config)
                result = self.step(forward, lr, step)
                computed = time.perf_counter()
                loss, stop = self._share_result(result, forward, stop_request)
                if step >= first_timed:
                    ended, reduction = time.perf_counter(), result.seconds["allreduce"]
                    self._rates.add_step(ended - started)
                    self._times = self._times.plus(fetched - started, computed - fetched - reduction, ended - computed + reduction)
                self._check_finite(result, loss, step, lr)
                progress.update(step, loss, lr)
                if stop:
                    progress.end_epoch()
                    self._stop(step + 1, stop)
                if self._ends_epoch(step + 1):
                    progress.end_epoch()
                    self._finish_epoch(step + 1)
                    if self._stops_early:
                        self.recorder.log(f"nothing better in {self._since_best} evaluations: the training ends here")
                        break
                elif self._saves_at(step + 1):
                    self.recorder.save(*self._state(step + 1))
        self.recorder.finish()
        return self._rates.total()

    def _share_result(self, result: StepResult, forward: Sequence[Batch], stop_request: StopRequest | None) -> tuple[float, int]:
        """(mean loss over ranks, number of the signal that any rank received or 0); adds the step to the epoch's sums."""
        received = stop_request.signal if stop_request is not None else 0
        loss, stop, replaced = self.communicator.sum([result.loss, received > 0, sum(batch.substituted for batch in forward)])
        loss = float(loss) / self.communicator.size
        self._finished_epoch = False
        self._sums["replaced"] += int(replaced)
        self._sums["skipped" if result.skipped else "loss"] += 1 if result.skipped else loss
        return loss, max(self.communicator.gather(received)) if stop else 0

    def _check_finite(self, result: StepResult, loss: float, step: int, lr: float) -> None:
        parameter = result.nonfinite_parameter
        if result.skipped or (math.isfinite(loss) and parameter is None):
            return
        culprit = f"the gradient of {parameter} is not finite" if parameter else "the gradients are finite"
        last = self.communicator.from_root(self.recorder.last_checkpoint())
        kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        raise UserError(f"the loss is {loss:g} at step {step + 1} (epoch {self._epoch_of(step + 1)}) with learning rate "
                        f"{lr:.6g}, {culprit}; {kept}; try a lower --lr or a longer --warmup_epochs")

    def _stop(self, step: int, number: int) -> None:
        self.recorder.save(*self._state(step))
        text = (f"stopped by {signal.Signals(number).name} after step {step}, which is saved; go on with "
                f"the same command and --resume=auto --output_path={self.config.output_path}")
        self.recorder.log(text)
        self.communicator.barrier()
        raise Stopped(number, text)

    def _finish_epoch(self, step: int) -> None:
        """Report the epoch that ended with ``step``, evaluate and save as configured."""
        epoch, last = self._epoch_of(step), step == self.last_step
        counted = step - (epoch - 1) * self.steps_per_epoch - self._sums["skipped"]
        metrics: dict[str, Any] = {
            "epoch": epoch, "step": step, "loss": round(self._sums["loss"] / max(counted, 1), 6),
            "lr": learning_rate(step - 1, self.steps_per_epoch, self.config), "images_per_second": round(self._rates.since_last(), 2)}
        metrics.update({name: self._sums[key] for key, name in COUNTS.items() if self._sums[key]})
        if step % self.steps_per_epoch == 0:
            self._sums, self._finished_epoch = _no_sums(), True
        if self.evaluator is not None and (last or epoch % self.config.eval_interval == 0):
            accuracy = self.evaluator(self.engine)
            metrics.update(top1=round(accuracy.top1, 4), top5=round(accuracy.top5, 4), val_loss=round(accuracy.loss, 6),
                           class_top1=accuracy.class_top1)
            if accuracy.undecodable:
                self.recorder.log(undecodable_line(accuracy))
            if accuracy.nonfinite:
                self.recorder.log(nonfinite_line(accuracy.nonfinite, accuracy.images))
        times = self.communicator.gather(self._times)
        metrics["rank_seconds"] = [[round(seconds, 3) for seconds in of_rank] for of_rank in times]
        self._times = RankTimes()
        self.recorder.add_epoch(metrics)
        if slow := slowest_line(times, self.communicator.hosts):
            self.recorder.log(slow)
        if "top1" in metrics and (metrics["top1"], -metrics["val_loss"]) > (self.best_top1, -self._best_loss):
            self.best_top1, self._best_loss, self._since_best = metrics["top1"], metrics["val_loss"], 0
            self.recorder.save_best(*self._state(step))
        elif "top1" in metrics:
            self._since_best += 1
        self._save_if_due(step)
        self.communicator.barrier()

    def _save_if_due(self, step: int) -> None:
        if step == self.last_step or self._stops_early or self._epoch_of(step) % self.config.ckpt_interval == 0 or self._saves_at(step):
            self.recorder.save(*self._state(step))

    def _state(self, step: int) -> tuple[TrainingState, nn.Cell, list[Parameter]]:
        """What the recorder saves."""
        state = TrainingState(
            step=step, epoch=self._epoch_of(step), finished_epoch=self._finished_epoch, epoch_sums=self._sums,
            best_top1=self.best_top1, best_loss=self._best_loss, since_best=self._since_best,
            steps_per_epoch=self.steps_per_epoch, world_size=self.communicator.size,
            threads=self.threads, kernels=self.kernels, labels=self._labels, class_to_index=self.class_to_index,
            config=self.config.model_dump(mode="json"),
            optimizer=self.step.optimizer.counters(), loss_scale=self.step.loss_scale.state())
        return state, self.network, self.step.optimizer.state_parameters

    def _go_on_from(self, resumed: ResumePoint) -> None:
        state = resumed.state
        check_batches(resumed, self.steps_per_epoch, self._labels)
        restore_arrays(resumed.arrays, resumed.path, self.network, self.step.optimizer.state_parameters)
        self.step.optimizer.restore_counters(state.optimizer)
        self.step.loss_scale.restore(state.loss_scale)
        self.first_step, self.best_top1 = state.step, state.best_top1
        self._best_loss, self._since_best = state.best_loss, state.since_best
        if self._stops_early:
            self.last_step = self.first_step
        self._sums, self._finished_epoch = dict(state.epoch_sums), state.finished_epoch
        self._is_unsaved = resumed.is_best
        self.recorder.go_on_from(state, self.class_to_index)

    def _begin_epoch(self, step: int, progress: Progress) -> None:
        epoch = step // self.steps_per_epoch + 1
        self.step.optimizer.freezes_backbone = epoch <= self.config.freeze_epochs
        first = (epoch - 1) * self.steps_per_epoch
        steps = min(self.steps_per_epoch, self.last_step - first)
        progress.begin_epoch(f"epoch {epoch}/{self.config.max_epoch}", first, steps, step)

    @property
    def _stops_early(self) -> bool:
        return 0 < self.config.early_stopping <= self._since_best

    def _epoch_of(self, step: int) -> int:
        """The epoch, from 1, that the step before ``step`` belongs to."""
        return -(-step // self.steps_per_epoch)

    def _ends_epoch(self, step: int) -> bool:
        return step % self.steps_per_epoch == 0 or step == self.last_step

    def _saves_at(self, step: int) -> bool:
        return self.config.ckpt_interval_steps > 0 and step % self.config.ckpt_interval_steps == 0


class _Rates:
    """Images per second over the steps that are timed."""

    def __init__(self, images_per_step: int) -> None:
        self._images = images_per_step
        self._seconds: list[float] = []
        self._reported = 0

    def add_step(self, seconds: float) -> None:
        self._seconds.append(seconds)

    def total(self) -> float:
        return self._rate(self._seconds)

    def since_last(self) -> float:
        """The rate over the steps since the last call."""
        recent, self._reported = self._seconds[self._reported:], len(self._seconds)
        return self._rate(recent)

    def _rate(self, seconds: Sequence[float]) -> float:
        return len(seconds) * self._images / sum(seconds) if seconds else 0.0


def _no_sums() -> dict[str, float]:
    return {"loss": 0.0, "skipped": 0, "replaced": 0}
