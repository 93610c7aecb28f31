"""Batches as functions of their number, carried by mindspore.dataset.

A source below answers "batch i" from (seed, epoch, indices) alone and fills whole batches with a pool of threads, which
costs less than a chain of operations with one Python call an image; GeneratorDataset prefetches ahead of the training.
"""

from concurrent.futures import ThreadPoolExecutor, wait

import cv2
import numpy as np

from src.dataset.sources import BadImage
from src.dataset.transforms import eval_transform, sample_generator, train_transform
from src.utils.device import available_cores
from src.utils.errors import UserError

PADDING_LABEL = -1
# Of images that cannot be decoded: they count, as wrong.
UNDECODABLE_LABEL = -2
_PREFETCHED_BATCHES = 2
HOW_TO_GO_ON = "replace or remove it, or train with --bad_samples=replace; scripts/check_dataset.py lists all such files"
# Images in a row that are tried in place of one that cannot be decoded.
_SUBSTITUTES = 100


def epoch_order(seed, epoch, count):
    """Permutation of ``count`` samples, (count,) int64: a function of (seed, epoch)."""
    # The top bit of the second key word keeps this stream apart from those of samples, whose index is there.
    key = np.array([seed, 2 ** 63 + epoch], np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(count)


def rank_share(indices, rank, size):
    """Every ``size``-th of ``indices``, beginning with the ``rank``-th."""
    return indices[rank::size]


class TrainBatches:
    """Training batches of one rank over all epochs: item i is the i-th forward batch of the run.

    Each is (images (B, S, S, 3) uint8 RGB, labels (B,) int32). The global batch of a step is the same whatever the
    number of ranks; the last incomplete global batch of an epoch is left out. With bad_samples=replace an image that
    cannot be decoded is replaced by the next of the data set that can, with its label.

    Args:
        first, last: range of forward batches to serve, so that a resumed run starts where it was.

    Raises:
        UserError: where the data has fewer images than one global batch.
    """

    def __init__(self, images, config, rank, size, first=0, last=None):
        self.images, self.config, self.rank, self.size = images, config, rank, size
        self.batch = config.rank_batch(size)
        self.global_batch = config.global_batch(size)
        self.steps_per_epoch = len(images) // self.global_batch
        if not self.steps_per_epoch:
            raise UserError(f"{len(images)} training images are fewer than one global batch of {self.global_batch} "
                            f"({size} ranks x {self.batch} x accumulation_steps={config.accumulation_steps}); "
                            f"use --per_batch_size={max(len(images) // (size * config.accumulation_steps), 1)} or less")
        steps = self.steps_per_epoch * config.max_epoch
        self.first = first
        self.last = steps * config.accumulation_steps if last is None else last
        self.failure = None
        self._threads = _Threads(config.num_parallel_workers or available_cores())
        self._order = (None, None)
        self._replaced = {}

    def __len__(self):
        return self.last - self.first

    def __getitem__(self, item):
        step, part = divmod(self.first + int(item), self.config.accumulation_steps)
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        indices = self._epoch_order(epoch)[step_in_epoch * self.global_batch:(step_in_epoch + 1) * self.global_batch]
        mine = rank_share(indices, self.rank, self.size)[part * self.batch:(part + 1) * self.batch]

        substitutes = []

        def make(index):
            used, image = self._load(index)
            if used != index:
                substitutes.append(used)
            random = sample_generator(self.config.seed, epoch, index)
            return train_transform(image, random, self.config), self.images.labels[used]

        batch = _fill(self, mine, make, self.batch)
        if substitutes:
            self._replaced[self.first + int(item)] = len(substitutes)
        return batch

    def replaced_in(self, numbers):
        """How many images were replaced in the forward batches ``numbers``, which were served before; asked once."""
        return sum(self._replaced.pop(number, 0) for number in numbers)

    def _load(self, index):
        """(index of the image used, image) for image ``index``."""
        for attempt in range(_SUBSTITUTES):
            candidate = (index + attempt) % len(self.images)
            try:
                return candidate, self.images.load(candidate)
            except BadImage as failure:
                if self.config.bad_samples == "error":
                    raise UserError(f"{failure}; {HOW_TO_GO_ON}") from None
        raise UserError(f"{_SUBSTITUTES} images in a row from {self.images.name(index)} cannot be decoded; is this the right data?")

    def _epoch_order(self, epoch):
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(self.config.seed, epoch, len(self.images)))
        return self._order[1]


class EvalBatches:
    """Evaluation batches of one rank: each image of the rank's share once, in order.

    The last batch is filled up with black images labelled PADDING_LABEL, so that one compiled graph serves all. Images
    that cannot be decoded are black and labelled UNDECODABLE_LABEL.

    Attributes:
        undecodable: messages on those images, in the order in which they were met.
    """

    def __init__(self, images, config, rank, size, batch):
        self.images, self.config, self.batch = images, config, batch
        self.indices = rank_share(np.arange(len(images)), rank, size)
        self.failure, self.undecodable = None, []
        self._threads = _Threads(config.num_parallel_workers or available_cores())

    def __len__(self):
        return -(-len(self.indices) // self.batch)

    def __getitem__(self, item):
        mine = self.indices[int(item) * self.batch:(int(item) + 1) * self.batch]
        return _fill(self, mine, self._make, self.batch)

    def _make(self, index):
        try:
            return eval_transform(self.images.load(index), self.config), self.images.labels[index]
        except BadImage as failure:
            self.undecodable.append(str(failure))
            return 0, UNDECODABLE_LABEL


def iterate(source):
    """Yield the tuples of mindspore Tensors of ``source``, prefetched. Raises the UserError that stopped the source."""
    import mindspore.dataset as dataset
    if not len(source):
        return
    dataset.config.set_prefetch_size(_PREFETCHED_BATCHES)
    pipeline = dataset.GeneratorDataset(source, ["images", "labels"], shuffle=False, num_parallel_workers=1,
                                        python_multiprocessing=False)
    try:
        yield from pipeline.create_tuple_iterator(num_epochs=1)
    except RuntimeError:
        # mindspore.dataset wraps the source's error in its own, with a trace of C++ frames.
        if source.failure is not None:
            raise source.failure from None
        raise


def _fill(source, indices, make, batch):
    size = source.config.image_size
    images = np.zeros((batch, size, size, 3), np.uint8)
    labels = np.full(batch, PADDING_LABEL, np.int32)

    # Each thread takes the next slot itself: handing one over costs more than the smaller operations on an image.
    slots = iter(range(len(indices)))

    def work():
        for slot in slots:
            images[slot], labels[slot] = make(int(indices[slot]))

    try:
        source._threads.all_do(work)
    except Exception as failure:
        source.failure = failure
        raise
    return images, labels


class _Threads:
    """``count`` threads that live as long as this object."""

    def __init__(self, count):
        # One level of threads: these. OpenCV's own would multiply them.
        cv2.setNumThreads(0)
        self._count, self._pool = count, ThreadPoolExecutor(count)

    def all_do(self, work):
        """Call ``work()`` on every thread; when all are done, raise what one of them raised."""
        for done in wait([self._pool.submit(work) for _ in range(self._count)]).done:
            done.result()
