"""Evaluation: every image counted exactly once, whatever the number of ranks."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mindspore import nn

from src.dataset.batches import PADDING_LABEL, EvalBatches, iterate
from src.models.formats import read_weights
from src.models.weights import assign_weights
from src.training.recorded import RecordedModel
from src.training.step import InputNormalizer
from src.utils.errors import UserError

_TOP = 5
_LARGEST_BATCH = 64


@dataclass(frozen=True)
class Accuracy:
    """Top-1 and top-5 accuracy in percent over ``images`` images, and the rate at which they were evaluated."""

    top1: float
    top5: float
    images: int
    images_per_second: float


class Classifier(nn.Cell):
    """(N, S, S, 3) uint8 RGB -> (N, num_classes) logits, in inference."""

    def __init__(self, network, config):
        super().__init__(auto_prefix=False)
        self.normalizer = InputNormalizer(config.mean, config.std)
        self.network = network

    def construct(self, images):
        return self.network(self.normalizer(images))


class Evaluator:
    """Evaluates a network on a set of images; one compiled graph serves all calls.

    Args:
        images: the ImageSet, the same on every rank; each rank takes its share.
    """

    def __init__(self, network, images, config, communicator):
        self._network, self._communicator = network, communicator
        self._classifier = Classifier(network, config)
        batch = min(config.per_batch_size, _LARGEST_BATCH,
                    max(-(-len(images) // communicator.size), 1))
        self._batches = EvalBatches(images, config, communicator.rank, communicator.size, batch)

    def __call__(self, progress=None):
        """Accuracy over all ranks' images. ``progress`` is called with the number of images of each batch."""
        was_training = self._network.training
        self._classifier.set_train(False)
        counts, seconds = np.zeros(3), 0.0
        started = time.perf_counter()
        for number, (images, labels) in enumerate(iterate(self._batches)):
            logits = self._classifier(images).asnumpy()
            counts += count_correct(logits, labels.asnumpy())
            if progress is not None:
                progress(int((labels.asnumpy() != PADDING_LABEL).sum()))
            if number == 0 and len(self._batches) > 1:
                # The first batch compiles the graph; a rate that counts it says nothing about the network.
                first, started = int(counts[2]), time.perf_counter()
        seconds = max(time.perf_counter() - started, 1e-9)
        timed = counts[2] - first if len(self._batches) > 1 else counts[2]
        self._network.set_train(was_training)
        top1, top5, seen, rate = self._communicator.sum([*counts, timed / seconds])
        return Accuracy(100 * top1 / seen, 100 * top5 / seen, int(seen), rate)


def count_correct(logits, labels):
    """(top-1 hits, top-5 hits, images) of logits (N, C) and labels (N,); rows labelled PADDING_LABEL do not count.

    The rank of the true class is the number of classes with a larger logit, ties counting for the lower index; a row
    with a NaN is wrong.
    """
    rows = labels != PADDING_LABEL
    logits, labels = logits[rows], labels[rows]
    own = logits[np.arange(len(labels)), labels][:, None]
    earlier = np.arange(logits.shape[1])[None, :] < labels[:, None]
    rank = ((logits > own) | ((logits == own) & earlier)).sum(axis=1)
    valid = ~np.isnan(logits).any(axis=1)
    return np.array([((rank < 1) & valid).sum(), ((rank < _TOP) & valid).sum(), len(labels)], np.float64)


def evaluate_checkpoints(paths, flags, communicator, log):
    """Evaluate checkpoint files in order of epoch.

    Args:
        flags: the command line's {key: value}, which win over what each checkpoint records.
        log: called with a line for each checkpoint.

    Returns:
        List of {checkpoint, epoch, step, top1, top5, images, images_per_second}.
    """
    read = sorted(((path, *read_weights(path)) for path in paths),
                  key=lambda entry: (entry[2].get("step", 0), str(entry[0])))
    results, previous, evaluator, network = [], None, None, None
    for path, arrays, metadata in read:
        recorded = RecordedModel.of(arrays, metadata, flags, Path(path).parent)
        if recorded != previous:
            network = recorded.build()
            evaluator = Evaluator(network, recorded.open_images(), recorded.config, communicator)
            previous = recorded
        assign_weights(network, arrays, path)
        accuracy = evaluator()
        results.append({"checkpoint": str(path), "epoch": metadata.get("epoch"), "step": metadata.get("step"),
                        "top1": accuracy.top1, "top5": accuracy.top5, "images": accuracy.images,
                        "images_per_second": accuracy.images_per_second})
        log(report_line(results[-1]))
    return results


def report_line(result):
    """One line of a result, in the seeds' words."""
    return (f"{result['checkpoint']}: acc={result['top1']:.2f}%(TOP1) acc={result['top5']:.2f}%(TOP5) "
            f"{result['images']} images, {result['images_per_second']:.2f} images/s")


def write_results(path, results):
    """Write results as a JSON list. Raises UserError where the file cannot be written."""
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)
    except OSError as failure:
        raise UserError(f"cannot write result_path '{path}': {failure.strerror}") from None
