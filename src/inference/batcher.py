"""Collects single images of many requests into batches for the network."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
from scipy.special import softmax

from src.inference.backends import Backend
from src.inference.server_requests import RequestError
from src.utils.progress import ProgressBar

# One compiled graph each. A batch takes the largest of these sizes for which enough images wait.
BATCH_SIZES = (1, 2, 4, 8, 16)
MAX_IMAGES_AT_ONCE = 1024
_TIMED = 3
BUSY = "too many requests are waiting; try again"
_NOT_FINITE = "the network's outputs for this image are not finite"


class Capacity:
    """Counts what is worked on, and refuses what would be too much."""

    def __init__(self, most: int) -> None:
        self._most, self._taken = most, 0

    @contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """Take room for ``count`` in this context. Raises RequestError if there is not as much."""
        if self._taken + count > self._most:
            raise RequestError(503, BUSY)
        self._taken += count
        try:
            yield
        finally:
            self._taken -= count


class Batcher:
    """Collects images that arrive while others are computed into the next batch.

    Args:
        backends: (B, S, S, 3) uint8 images -> (B, C) logits, called in one thread. Each batch size
            uses the fastest of them.
        image_size: S.
    """

    def __init__(
        self, backends: Sequence[Backend], image_size: int, queued: int = MAX_IMAGES_AT_ONCE
    ) -> None:
        self._backends, self._size = backends, image_size
        self._fastest = dict.fromkeys(BATCH_SIZES, backends[0])
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="backend")
        self._waiting: asyncio.Queue[tuple[np.ndarray, asyncio.Future[np.ndarray]]] = asyncio.Queue(
            queued
        )
        self.images = self.batches = 0

    def warm_up(self) -> None:
        """Compile a graph for each batch size, and find the fastest backend for it."""
        with ProgressBar("compiled", len(BATCH_SIZES), "batch size") as progress:
            for size in BATCH_SIZES:
                images = np.zeros((size, self._size, self._size, 3), np.uint8)
                seconds = [
                    self._thread.submit(_seconds, backend, images).result()
                    for backend in self._backends
                ]
                self._fastest[size] = self._backends[int(np.argmin(seconds))]
                progress.advance()

    @property
    def waiting(self) -> int:
        """Number of images that wait for the next batch."""
        return self._waiting.qsize()

    async def classify(self, image: np.ndarray) -> np.ndarray:
        """Probabilities (C,) of an image (S, S, 3).

        Raises:
            RequestError: if too many images wait, or if the outputs are not finite.
        """
        answer: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        try:
            self._waiting.put_nowait((image, answer))
        except asyncio.QueueFull:
            raise RequestError(503, BUSY) from None
        return await answer

    async def run(self) -> None:
        """Compute what is waiting, without end."""
        while True:
            batch = [await self._waiting.get()]
            size = max(size for size in BATCH_SIZES if size <= 1 + self._waiting.qsize())
            batch += [self._waiting.get_nowait() for _ in range(size - 1)]
            self.batches, self.images = self.batches + 1, self.images + len(batch)
            try:
                images = np.stack([image for image, _ in batch])
                logits = await self._compute(self._fastest[len(batch)], images)
                found = softmax(logits.astype(np.float64), axis=1)
            except Exception as failure:  # the next batch may be better
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(failure)
                continue
            for (_, answer), probabilities in zip(batch, found):
                # A client that has gone away has cancelled it.
                if answer.done():
                    continue
                if np.isfinite(probabilities).all():
                    answer.set_result(probabilities)
                else:
                    answer.set_exception(RequestError(500, _NOT_FINITE))

    async def _compute(self, backend: Backend, images: np.ndarray) -> np.ndarray:
        return await asyncio.get_running_loop().run_in_executor(self._thread, backend, images)


def _seconds(backend: Backend, images: np.ndarray) -> float:
    """Seconds of the fastest of some calls, after one call that compiles."""
    backend(images)
    times = []
    for _ in range(_TIMED):
        started = time.perf_counter()
        backend(images)
        times.append(time.perf_counter() - started)
    return min(times)
