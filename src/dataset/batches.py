"""Batches as functions of their number.

A source computes batch i from nothing but (seed, epoch, indices), with a pool of threads.
``prefetch`` computes the next batches while one is in use.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Protocol

import cv2
import numpy as np

from src.cli.config import Config
from src.dataset.augmentations import Augmenter
from src.dataset.decoding import BadImage
from src.dataset.image_set import ImageSet
from src.dataset.transforms import eval_min_side, eval_transform
from src.utils.errors import UserError
from src.utils.machine import available_bytes, available_cores

PADDING_LABEL = -1
# Labels images that cannot be decoded, which count as wrong.
UNDECODABLE_LABEL = -2
_PREFETCHED_BATCHES = 2
# Of progressive_size: Tan and Le, arXiv:2104.00298, table 6.
SIZE_STAGES = 4
_SIZE_MULTIPLE = 8
_REPEATED = 1 << 32
HOW_TO_GO_ON = (
    "replace or remove it, or train with --bad_samples=replace; scripts/check_dataset.py lists all "
    "such files"
)
# Decoded images of at most 128 x 128 pixels are kept. The ranks share this limit, and an eighth of
# the memory that is free.
_KEPT_IMAGE_BYTES, _KEPT_BYTES = 3 * 128 * 128, 1 << 30
# How many images in a row to try instead of an undecodable one.
_SUBSTITUTES = 100


@dataclass(frozen=True)
class Batch:
    """Images with their labels, and what happened while they were read.

    Attributes:
        images: (B, S, S, 3) uint8 RGB.
        labels: (B,) int32, or class probabilities (B, C) float32 if augmentations mix samples.
        substituted: number of images that another one replaces because they cannot be decoded.
        undecodable: a message for each undecodable image, whose label is UNDECODABLE_LABEL.
    """

    images: np.ndarray
    labels: np.ndarray
    substituted: int = 0
    undecodable: tuple[str, ...] = ()


class BatchSource(Protocol):
    """Batches by number.

    Attributes:
        reads_ahead: whether it prepares the next batches itself.
    """

    reads_ahead: bool

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Batch: ...


def micro_batch_size(config: Config, world_size: int) -> int:
    """Images in one forward pass of one rank: per_batch_size, or its part of global_batch_size.

    Raises:
        UserError: if global_batch_size cannot be divided evenly.
    """
    if not config.global_batch_size:
        return config.per_batch_size
    images, rest = divmod(config.global_batch_size, world_size * config.accumulation_steps)
    if rest or not images:
        raise UserError(
            f"global_batch_size={config.global_batch_size} does not divide by {world_size} ranks x "
            f"accumulation_steps={config.accumulation_steps}"
        )
    return images


def global_batch_size(config: Config, world_size: int) -> int:
    """Images in one optimizer step over all ranks."""
    return micro_batch_size(config, world_size) * world_size * config.accumulation_steps


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """Permutation of ``count`` samples, (count,) int64: a function of (seed, epoch)."""
    # The top bit of the second key word separates this stream from those of samples, which have
    # their index there.
    key = np.array([seed, 2**63 + epoch], np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(count)


def balanced_order(
    seed: int, epoch: int, labels: np.ndarray, count: int | None = None
) -> np.ndarray:
    """``count`` samples, (count,) int64, with every class equally often.

    A function of (seed, epoch). Within a class, samples also occur equally often (up to one more):
    samples of small classes are repeated, and some of large classes are left out.

    Args:
        labels: (N,) int32.
        count: None for N.
    """
    present, count = np.unique(labels), len(labels) if count is None else count
    order = epoch_order(seed, epoch, len(labels))
    share, rest = divmod(count, len(present))
    # In each epoch other classes have one sample more.
    shares = share + (np.roll(np.arange(len(present)), epoch) < rest)
    chosen = [
        np.resize(order[labels[order] == label], size) for label, size in zip(present, shares)
    ]
    return np.concatenate(chosen)[epoch_order(seed, epoch, count)]


def training_size(config: Config, epoch: int) -> int:
    """Side in pixels of the training images of an epoch, counted from 0.

    With the key progressive_size, max_epoch is divided into four stages, whose sizes grow linearly
    from it to image_size (Tan and Le, arXiv:2104.00298, algorithm 1), in multiples of 8.
    """
    smallest, largest = config.progressive_size, config.image_size
    stage = epoch * SIZE_STAGES // config.max_epoch
    if not smallest or stage >= SIZE_STAGES - 1:
        return largest
    if stage <= 0:
        return smallest
    size = smallest + (largest - smallest) * stage / (SIZE_STAGES - 1)
    return min(max(round(size / _SIZE_MULTIPLE) * _SIZE_MULTIPLE, smallest), largest)


def _repeats(order: np.ndarray) -> np.ndarray:
    """How often each entry of ``order`` occurs before its place, (N,) int64."""
    by_index = np.argsort(order, kind="stable")
    first = np.searchsorted(order[by_index], order[by_index])
    repeats = np.empty(len(order), np.int64)
    repeats[by_index] = np.arange(len(order)) - first
    return repeats


def shard(indices: np.ndarray, rank: int, size: int) -> np.ndarray:
    """Every ``size``-th of ``indices``, beginning with the ``rank``-th."""
    return indices[rank::size]


def steps_per_epoch(images: int, config: Config, size: int) -> int:
    """Number of global batches that ``images`` training images make on ``size`` ranks.

    Raises:
        UserError: if they make none.
    """
    steps = images // global_batch_size(config, size)
    if not steps:
        raise UserError(
            f"{images} training images are fewer than one global batch of "
            f"{global_batch_size(config, size)} ({size} ranks x {micro_batch_size(config, size)} x "
            f"accumulation_steps={config.accumulation_steps}); "
            f"use --per_batch_size={max(images // (size * config.accumulation_steps), 1)} or less"
        )
    return steps


class TrainBatches:
    """Training batches of one rank over all epochs: number i is the i-th micro-batch of the run.

    The global batch of a step is the same for any number of ranks. The last incomplete global batch
    of an epoch is left out. With bad_samples=replace, the next image of the data set that can be
    decoded, and its label, replace an image that cannot. Small images are decoded once.

    Raises:
        UserError: if the data has fewer images than one global batch.
    """

    reads_ahead = False

    def __init__(self, images: ImageSet, config: Config, rank: int, size: int) -> None:
        self.images, self.config, self.rank, self.size = images, config, rank, size
        self.batch, self.global_batch_size = (
            micro_batch_size(config, size),
            global_batch_size(config, size),
        )
        self.steps_per_epoch = steps_per_epoch(len(images), config, size)
        self._threads = _Threads(config.num_parallel_workers or available_cores())
        self._augmenters: dict[int, Augmenter] = {}
        self._augmenter = self._augmenter_for(config.image_size)
        self._kept: dict[int, np.ndarray] = {}
        self._keepable_bytes = min(_KEPT_BYTES, available_bytes() / 8) / size
        self._order = -1, np.empty(0), np.empty(0)

    @property
    def per_epoch(self) -> int:
        """Number of batches in an epoch."""
        return self.steps_per_epoch * self.config.accumulation_steps

    def __len__(self) -> int:
        return self.per_epoch * self.config.max_epoch

    def __getitem__(self, number: int) -> Batch:
        indices, repeats = self.samples(number)
        epoch = number // self.per_epoch
        size = training_size(self.config, epoch)
        augmenter = self._augmenter_for(size)
        # A repeated image draws as in another epoch, far behind the last one.
        epochs = epoch + repeats * _REPEATED
        substituted: list[int] = []

        def load(index: int) -> tuple[np.ndarray, int]:
            used, image = self._load(index)
            if used != index:
                substituted.append(index)
            return image, int(self.images.labels[used])

        labels = (
            np.zeros((self.batch, self.images.num_classes), np.float32)
            if self._augmenter.mixes
            else np.zeros(self.batch, np.int32)
        )
        images = self._threads.fill(
            range(self.batch),
            lambda slot: augmenter.sample(load, int(epochs[slot]), int(indices[slot])),
            size,
            labels,
        )
        return Batch(images, labels, len(substituted))

    def samples(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The images of batch ``number``, and how often each was in the epoch before, (B,) int."""
        step, part = divmod(number, self.config.accumulation_steps)
        epoch, place = divmod(step, self.steps_per_epoch)
        first = place * self.global_batch_size
        places = shard(np.arange(first, first + self.global_batch_size), self.rank, self.size)
        places = places[part * self.batch : (part + 1) * self.batch]
        order, repeats = self._epoch_order(epoch)
        return order[places], repeats[places]

    def _augmenter_for(self, size: int) -> Augmenter:
        """The Augmenter that makes images of ``size``."""
        if size not in self._augmenters:
            config = self.config.model_copy(update={"image_size": size})
            self._augmenters[size] = Augmenter(config, len(self.images), self.images.num_classes)
        return self._augmenters[size]

    def _load(self, index: int) -> tuple[int, np.ndarray]:
        """(index of the image used, image) for image ``index``."""
        for attempt in range(_SUBSTITUTES):
            candidate = (index + attempt) % len(self.images)
            try:
                return candidate, self._decoded(candidate)
            except BadImage as failure:
                if self.config.bad_samples == "error":
                    raise UserError(f"{failure}; {HOW_TO_GO_ON}") from None
        raise UserError(
            f"{_SUBSTITUTES} images in a row from {self.images.name(index)} cannot be decoded; "
            "is this the right data?"
        )

    def _decoded(self, index: int) -> np.ndarray:
        image = self._kept.get(index)
        if image is None:
            # As large as the last epochs need it, since it may be kept for them.
            image = self.images.load(index, self._augmenter.min_side)
            # The next epoch gets the same array.
            image.flags.writeable = False
            if image.nbytes <= min(_KEPT_IMAGE_BYTES, self._keepable_bytes):
                self._kept[index] = image
                self._keepable_bytes -= image.nbytes
        return image

    def _epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if self._order[0] != epoch:
            order = self._new_order(epoch)
            repeats = np.zeros_like(order)
            if self.config.sampling == "balanced" or self.config.aug_repeats > 1:
                order = np.repeat(order, self.config.aug_repeats)[: len(self.images)]
                repeats = _repeats(order)
            self._order = epoch, order, repeats
        return self._order[1:]

    def _new_order(self, epoch: int) -> np.ndarray:
        if self.config.sampling == "balanced":
            drawn = math.ceil(len(self.images) / self.config.aug_repeats)
            return balanced_order(self.config.seed, epoch, self.images.labels, drawn)
        return epoch_order(self.config.seed, epoch, len(self.images))


class EvalBatches:
    """Evaluation batches of one rank: each image of its shard once, in order.

    The last batch is filled up with black images labelled PADDING_LABEL, so that one compiled graph
    serves all batches. Undecodable images are black and labelled UNDECODABLE_LABEL.
    """

    reads_ahead = False

    def __init__(self, images: ImageSet, config: Config, rank: int, size: int, batch: int) -> None:
        self.images, self.config, self.batch = images, config, batch
        self.indices = shard(np.arange(len(images)), rank, size)
        self._min_side = eval_min_side(config)
        self._threads = _Threads(config.num_parallel_workers or available_cores())

    def __len__(self) -> int:
        return math.ceil(len(self.indices) / self.batch)

    def __getitem__(self, number: int) -> Batch:
        mine = self.indices[number * self.batch : (number + 1) * self.batch]
        undecodable: dict[int, str] = {}

        def make(index: int) -> tuple[Any, int]:
            try:
                image = self.images.load(index, self._min_side)
                return eval_transform(image, self.config), int(self.images.labels[index])
            except BadImage as failure:
                undecodable[index] = str(failure)
                return 0, UNDECODABLE_LABEL

        labels = np.full(self.batch, PADDING_LABEL, np.int32)
        images = self._threads.fill(mine, make, self.config.image_size, labels)
        return Batch(
            images, labels, undecodable=tuple(undecodable[index] for index in sorted(undecodable))
        )


def prefetch(source: BatchSource, first: int = 0, last: int | None = None) -> Iterator[Batch]:
    """Yield batches ``first`` to ``last``, exclusive, prepared in advance by a thread.

    Raises:
        Exception: what the source raises.
    """
    numbers = iter(range(first, len(source) if last is None else last))
    if source.reads_ahead:
        for number in numbers:
            yield source[number]
        return
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        pending: deque[Future[Batch]] = deque()
        try:
            for number in numbers:
                pending.append(pool.submit(source.__getitem__, number))
                if len(pending) > _PREFETCHED_BATCHES:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


class _Threads:
    """``count`` threads that live as long as this object."""

    def __init__(self, count: int) -> None:
        # No OpenCV threads: each of these threads would start its own.
        cv2.setNumThreads(0)
        self._count, self._pool = count, ThreadPoolExecutor(count)

    def fill(
        self,
        indices: Sequence[int] | np.ndarray,
        make: Callable[[int], tuple[Any, Any]],
        size: int,
        labels: np.ndarray,
    ) -> np.ndarray:
        """Images (len(labels), size, size, 3) uint8; zeros behind the last index.

        Args:
            labels: receives the images' labels.
        """
        images = np.zeros((len(labels), size, size, 3), np.uint8)
        # Each thread takes the next slot itself: a queue costs more than a small operation.
        slots = iter(range(len(indices)))

        def work() -> None:
            for slot in slots:
                images[slot], labels[slot] = make(int(indices[slot]))

        for done in wait([self._pool.submit(work) for _ in range(self._count)]).done:
            done.result()
        return images
