"""The training loop. It knows steps only; epochs are where it reports, evaluates and saves."""

import itertools
import math
import signal
import time
import zlib

from mindspore import Tensor

from src.dataset.batches import TrainBatches, iterate
from src.training.checkpoint import save_checkpoint
from src.training.evaluation import Evaluator, undecodable_line
from src.training.inference import NetworkEngine
from src.training.progress import Progress
from src.training.records import plot_curves, prune_checkpoints
from src.training.resume import check_batches
from src.training.schedule import learning_rate
from src.training.step import create_train_step
from src.utils.errors import Stopped, UserError

# The first steps compile the graph and fill caches; rates leave them out.
_WARMUP_STEPS = 2
# Counts of an epoch that are reported where they are not 0, and their names in metrics.jsonl.
_COUNTS = {"skipped": "skipped_steps", "replaced": "replaced_images"}


class Trainer:
    """Trains ``network`` on ``train_images`` and leaves its results in ``run_folder``.

    Every rank constructs one with the same arguments; rank 0 alone writes.

    Args:
        eval_images: an ImageSet to evaluate on while training, or None.
        run_folder: a RunFolder on rank 0, None elsewhere.
        log: called with a line of text.
        resumed: the ResumePoint to go on from, or None.
        graph_cache: the GraphCache to take the compiled training step from, or None.
    """

    def __init__(self, network, config, communicator, train_images, eval_images, run_folder, log, resumed=None, graph_cache=None):
        self.network, self.config, self.communicator = network, config, communicator
        self.run_folder, self.log = run_folder, log
        self.batches = TrainBatches(train_images, config, communicator.rank, communicator.size)
        self.steps_per_epoch = self.batches.steps_per_epoch
        self.last_step = self.steps_per_epoch * config.max_epoch
        if config.max_steps:
            self.last_step = min(self.last_step, config.max_steps)
        self.step = create_train_step(network, config, communicator, graph_cache)
        self.first_step, self.best_top1, self._finished_epoch = 0, -1.0, True
        # Over the steps of the epoch: losses (means over ranks), steps skipped for overflow, images replaced.
        self._sums = _no_sums()
        self._labels = zlib.crc32(train_images.labels)
        if resumed is not None:
            self._go_on_from(resumed)
        # A run of a step or two has nothing else to time.
        self.first_timed = min(self.first_step + _WARMUP_STEPS, self.last_step - 1)
        self.batches.first = self.first_step * config.accumulation_steps
        self.batches.last = self.last_step * config.accumulation_steps
        self.evaluator = Evaluator(eval_images, config, communicator) if eval_images is not None else None
        self.engine = NetworkEngine(network, config)
        self.class_to_index = train_images.class_to_index
        self._busy_s, self._timed_steps = 0.0, 0

    def run(self, stop_request=None):
        """Train to the end; returns images/s over all ranks, the first steps left out.

        Raises:
            Stopped: after a signal that ``stop_request`` noted on any rank, when the step is done and saved.
            UserError: where the loss or a gradient is no longer finite.
        """
        self._stop_request = stop_request
        broadcast_parameters(self.communicator, [*self.network.get_parameters(), *self.step.velocities], self.config.device_target)
        forward_batches = iterate(self.batches)
        step = self.first_step
        at_end_of_epoch = step % self.steps_per_epoch == 0 or step == self.last_step
        if at_end_of_epoch and not self._finished_epoch:
            self._finish_epoch(step, rate=0.0)
        while step < self.last_step:
            epoch_end = min((step // self.steps_per_epoch + 1) * self.steps_per_epoch, self.last_step)
            rate = self._train_epoch(forward_batches, step, epoch_end)
            self._finish_epoch(epoch_end, rate)
            step = epoch_end
        return self._rate(self._timed_steps, self._busy_s)

    def _train_epoch(self, forward_batches, start, end):
        """Steps ``start`` to ``end``, both of one epoch; returns images/s."""
        epoch = start // self.steps_per_epoch + 1
        global_batch = self.batches.global_batch
        first_of_epoch = (epoch - 1) * self.steps_per_epoch
        progress = Progress(f"epoch {epoch}/{self.config.max_epoch}", end - first_of_epoch, start - first_of_epoch, global_batch,
                            self.log, self.config.log_interval, self.communicator.is_root)
        busy_s, timed, self._finished_epoch = 0.0, 0, False
        for step in range(start, end):
            started = time.perf_counter()
            batches = itertools.islice(forward_batches, self.config.accumulation_steps)
            lr = learning_rate(step, self.steps_per_epoch, self.config)
            loss, stop = self._agree(self.step(batches, lr, step), step)
            self._check_finite(loss, step, lr)
            if step >= self.first_timed:
                busy_s, timed = busy_s + time.perf_counter() - started, timed + 1
            progress.update(step - first_of_epoch + 1, loss, lr)
            if stop:
                progress.close()
                self._stop(step + 1)
            if step + 1 < end and self._saves_at(step + 1):
                self._save_in_folder(step + 1)
        progress.close()
        self._busy_s, self._timed_steps = self._busy_s + busy_s, self._timed_steps + timed
        return self._rate(timed, busy_s)

    def _agree(self, loss, step):
        """(mean loss over ranks, whether any rank was told to stop) after a step, which is added to the epoch's sums."""
        forward = self.config.accumulation_steps
        replaced = self.batches.replaced_in(range(step * forward, (step + 1) * forward))
        loss, stop, replaced = self.communicator.sum([loss, bool(self._stop_signal()), replaced])
        loss /= self.communicator.size
        self._sums["replaced"] += int(replaced)
        if self.step.skipped:
            self._sums["skipped"] += 1
        else:
            self._sums["loss"] += float(loss)
        return float(loss), stop > 0

    def _stop_signal(self):
        return self._stop_request.signal if self._stop_request is not None else 0

    def _check_finite(self, loss, step, lr):
        if self.step.skipped or (math.isfinite(loss) and self.step.gone_wrong is None):
            return
        culprit = f"the gradient of {self.step.gone_wrong} is not finite" if self.step.gone_wrong else "the gradients are finite"
        last = self.communicator.from_root(self.run_folder and self.run_folder.last_checkpoint())
        kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        raise UserError(f"the loss is {loss:g} at step {step + 1} (epoch {step // self.steps_per_epoch + 1}) with learning rate "
                        f"{lr:.6g}, {culprit}; {kept}; try a lower --lr or a longer --warmup_epochs")

    def _stop(self, step):
        number = max(self.communicator.gather(self._stop_signal()))
        self._save_in_folder(step)
        self.log(f"stopped by {signal.Signals(number).name} after step {step}, which is saved; go on with "
                 f"--resume=auto --output_path={self.config.output_path}")
        self.communicator.barrier()
        raise Stopped(number)

    def _finish_epoch(self, step, rate):
        epoch = self._epoch_of(step)
        last = step == self.last_step
        steps = step - (epoch - 1) * self.steps_per_epoch
        loss = self._sums["loss"] / max(steps - self._sums["skipped"], 1)
        metrics = {"epoch": epoch, "step": step, "loss": round(loss, 6),
                   "lr": learning_rate(step - 1, self.steps_per_epoch, self.config), "images_per_second": round(rate, 2)}
        metrics.update({name: self._sums[key] for key, name in _COUNTS.items() if self._sums[key]})
        self._sums, self._finished_epoch = _no_sums(), True
        if self.evaluator is not None and (last or epoch % self.config.eval_interval == 0):
            accuracy = self.evaluator(self.engine)
            metrics.update(top1=round(accuracy.top1, 4), top5=round(accuracy.top5, 4))
            if accuracy.undecodable:
                self.log(undecodable_line(accuracy))
        if self.communicator.is_root:
            self._record(epoch, metrics)
        if metrics.get("top1", -1.0) > self.best_top1:
            self.best_top1 = metrics["top1"]
            self._save(step, lambda folder: folder.best)
        if last or epoch % self.config.ckpt_interval == 0 or self._saves_at(step):
            self._save_in_folder(step)
        if last and self.communicator.is_root:
            plot_curves(self.run_folder.read_metrics(), self.run_folder.curves)
        self.communicator.barrier()

    def _record(self, epoch, metrics):
        text = f"epoch {epoch}/{self.config.max_epoch} loss {metrics['loss']:.4f} {metrics['images_per_second']:.1f} images/s"
        if "top1" in metrics:
            text += f" acc={metrics['top1']:.2f}%(TOP1) acc={metrics['top5']:.2f}%(TOP5)"
        text += "".join(f", {metrics[name]} {name.replace('_', ' ')}" for name in _COUNTS.values() if name in metrics)
        self.log(text)
        self.run_folder.add_metrics(**metrics)

    def _epoch_of(self, step):
        """The epoch, from 1, that the step before ``step`` belongs to."""
        return -(-step // self.steps_per_epoch)

    def _saves_at(self, step):
        return self.config.ckpt_interval_steps > 0 and step % self.config.ckpt_interval_steps == 0

    def _save_in_folder(self, step):
        epoch = self._epoch_of(step)
        name = f"{self.config.network}-{epoch}_{step - (epoch - 1) * self.steps_per_epoch}.ckpt"
        self._save(step, lambda folder: folder.checkpoints / name)
        if self.communicator.is_root:
            self.run_folder.point_latest_at(self.run_folder.checkpoints / name)
            prune_checkpoints(self.run_folder.checkpoints, self.config.keep_checkpoint_max)

    def _save(self, step, place):
        """On rank 0 write all that a resumed run needs to the file ``place(run_folder)``."""
        if self.communicator.is_root:
            metadata = {"epoch": self._epoch_of(step), "step": step, "steps_per_epoch": self.steps_per_epoch,
                        "world_size": self.communicator.size, "epoch_sums": self._sums, "finished_epoch": self._finished_epoch,
                        "best_top1": self.best_top1, "labels": self._labels, "step_state": self.step.state(),
                        "fused": False, "class_to_index": self.class_to_index, "config": self.config.model_dump(mode="json")}
            save_checkpoint(place(self.run_folder), [*self.network.get_parameters(), *self.step.velocities], metadata)

    def _go_on_from(self, resumed):
        check_batches(resumed, self.steps_per_epoch, self._labels)
        resumed.restore(self.network, self.step)
        self.first_step, self.best_top1 = resumed.step, resumed.best_top1
        self._sums, self._finished_epoch = resumed.epoch_sums, resumed.finished_epoch
        if self.run_folder is not None:
            self.run_folder.remove_leftovers()
            self.run_folder.drop_metrics_after(resumed.step)

    def _rate(self, steps, seconds):
        return steps * self.batches.global_batch / seconds if seconds else 0.0


def broadcast_parameters(communicator, parameters, device_target):
    """Replace each of ``parameters`` by rank 0's, through the host."""
    if device_target == "CPU":
        communicator.broadcast_([parameter.asnumpy() for parameter in parameters])
    elif communicator.size > 1:
        # asnumpy() is a copy there.
        for parameter in parameters:
            array = parameter.asnumpy().copy()
            communicator.broadcast_([array])
            parameter.set_data(Tensor(array))


def _no_sums():
    return {"loss": 0.0, "skipped": 0, "replaced": 0}
