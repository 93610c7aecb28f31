"""Batches of the server: what waits is one, each size has its engine, failures end nothing."""

import asyncio
import time

import numpy as np
import pytest

from src.inference.batcher import Batcher, Capacity
from src.inference.server_requests import RequestError


def test_room_that_was_taken_is_given_back():
    room = Capacity(10)
    with room.taken(6):
        with pytest.raises(RequestError), room.taken(5):
            pass
        with room.taken(4):
            pass
    with pytest.raises(ValueError), room.taken(10):
        raise ValueError
    with room.taken(10):
        pass


def test_what_waits_is_one_batch_and_there_is_a_bound():
    sizes = []

    def engine(images):
        sizes.append(len(images))
        return images.reshape(len(images), -1)[:, :2].astype(np.float32)

    async def trial():
        batcher = Batcher([engine], 8, queued=20)
        images = [np.full((8, 8, 3), number, np.uint8) for number in range(21)]
        asked = [asyncio.ensure_future(batcher.classify(image)) for image in images]
        await asyncio.sleep(0)
        running = asyncio.ensure_future(batcher.run())
        found = await asyncio.gather(*asked, return_exceptions=True)
        running.cancel()
        return found

    found = asyncio.run(trial())
    assert isinstance(found[20], RequestError) and all(
        isinstance(answer, np.ndarray) for answer in found[:20]
    )
    assert sizes == [16, 4]


def test_each_size_of_a_batch_takes_the_engine_that_is_fastest_for_it():
    used = []

    def engine(name, of_batch, of_image):
        def compute(images):
            time.sleep(of_batch + of_image * len(images))
            used.append(name)
            return np.zeros((len(images), 3), np.float32)

        return compute

    async def run():
        batcher = Batcher([engine("large", 0.08, 0.001), engine("small", 0.0, 0.02)], 8)
        batcher.warm_up()
        used.clear()
        running = asyncio.create_task(batcher.run())
        await batcher.classify(np.zeros((8, 8, 3), np.uint8))
        await asyncio.gather(*[batcher.classify(np.zeros((8, 8, 3), np.uint8)) for _ in range(16)])
        running.cancel()

    asyncio.run(run())
    assert used == ["small", "large"]


def test_a_failing_engine_does_not_end_the_batcher():
    def engine(images):
        if images[0, 0, 0, 0] == 1:
            raise RuntimeError("this one")
        return np.zeros((len(images), 2), np.float32)

    async def trial():
        batcher = Batcher([engine], 8)
        running = asyncio.ensure_future(batcher.run())
        with pytest.raises(RuntimeError, match="this one"):
            await batcher.classify(np.full((8, 8, 3), 1, np.uint8))
        assert (await batcher.classify(np.zeros((8, 8, 3), np.uint8))).tolist() == [0.5, 0.5]
        running.cancel()

    asyncio.run(trial())
