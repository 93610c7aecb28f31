"""The image service of the server: reads images, classifies them, and explains predictions.

Raises RequestError for requests that get no result; src/inference/serving.py makes HTTP of both.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from src.cli.config import Config
from src.dataset.decoding import BadImage, decode_image
from src.dataset.transforms import eval_min_side, eval_transform
from src.inference.backends import Backend, with_flip
from src.inference.batcher import BUSY, MAX_IMAGES_AT_ONCE, Batcher, Capacity
from src.inference.checkpoint_model import CheckpointModel
from src.inference.heatmap import covered, encode_png, heat, overlay
from src.inference.prediction import Prediction
from src.inference.server_requests import ImageRequest, RequestError, read_request
from src.utils.machine import available_cores

LARGEST_BODY = 20 * 2**20
# Bytes of all bodies in memory together, before they are decoded.
MOST_BODY_BYTES = 256 * 2**20
# How much of a body that is too large is read and thrown away.
_FORGOTTEN = 100 * 2**20
# How long a body may take to arrive.
_BODY_S = 60
_MAX_HEAT_MAPS = 8


class ImageService:
    """Answers requests: images in, predictions and heat maps out.

    Args:
        backends: (B, S, S, 3) uint8 images -> (B, C) logits; all are timed for every batch size.

    Attributes:
        model: what is served, with class names that can be sent.
        batcher: computes the images of all requests.
    """

    def __init__(self, model: CheckpointModel, backends: Sequence[Backend]) -> None:
        # Names may have bytes that are not UTF-8.
        classes = (model.class_to_index or {}).items()
        sendable = {name.encode("utf-8", "backslashreplace").decode(): i for name, i in classes}
        self.model = replace(model, class_to_index=sendable)
        self.batcher = Batcher(
            [with_flip(backend) for backend in backends] if model.config.test_flip else backends,
            model.config.image_size,
        )
        self.batcher.warm_up()
        # The default pool has more threads than cores, each of which may hold a large image.
        self._readers = ThreadPoolExecutor(available_cores(), thread_name_prefix="reader")
        self._images, self._heat_maps = Capacity(MAX_IMAGES_AT_ONCE), Capacity(_MAX_HEAT_MAPS)
        self._one_heat_map = asyncio.Semaphore(1)
        self._bodies = Bodies()

    @property
    def class_names(self) -> list[str]:
        """Names of the classes that have one."""
        return list(self.model.class_to_index or ())

    @asynccontextmanager
    async def receive(self, request: Any) -> AsyncIterator[ImageRequest]:
        """Reads a request; its body counts towards the bound until the context ends.

        Raises:
            RequestError: if the request has no images, or there is no room for them.
        """
        content_type = request.headers.get("content-type", "")
        async with self._bodies.receive(request) as body:
            try:
                sent = await self._in_reader(read_request, content_type, body)
            except ValueError as failure:
                raise RequestError(400, str(failure)) from None
            yield sent

    async def predict(self, sent: ImageRequest) -> dict[str, Any]:
        """The answer to a request: of one image, or of a list, where each may have an error.

        Raises:
            RequestError: if there is no room for its images, or if it is not a list and has no
                image.
        """
        with self._images.taken(len(sent.images)):
            if not sent.is_list:
                return await self._predicted(*sent.images[0])
            return {"answers": await asyncio.gather(*(self._entry(*one) for one in sent.images))}

    async def heat_map(self, sent: ImageRequest) -> bytes:
        """A PNG of where in the one image its likeliest class comes from. Raises RequestError."""
        if len(sent.images) != 1:
            raise RequestError(400, "send one image for a heat map")
        # One at a time, so that its many images leave room for those of others.
        with self._heat_maps.taken(1):
            async with self._one_heat_map:
                image, damage = await self._image(*sent.images[0])
                if damage:
                    raise RequestError(400, damage)
                images = [image, *covered(image, self.model.config.mean)]
                with self._images.taken(len(images)):
                    found = await asyncio.gather(*map(self.batcher.classify, images))
                return await self._in_reader(_heat_map, image, np.stack(found))

    async def _entry(self, name: str, body: bytes | None) -> dict[str, Any]:
        """One entry of a list of answers."""
        try:
            return {"image": name, **await self._predicted(name, body)}
        except RequestError as refusal:
            return {"image": name, **refusal.answer}

    async def _predicted(self, name: str, body: bytes | None) -> dict[str, Any]:
        image, damage = await self._image(name, body)
        probabilities = await self.batcher.classify(image)
        answer = Prediction.of("", probabilities, self.model).answer()
        return {**answer, "damaged": damage} if damage else answer

    async def _image(self, name: str, body: bytes | None) -> tuple[np.ndarray, str]:
        """(S, S, 3) uint8, and a message if a part of it may be wrong."""
        if body is None:
            raise RequestError(400, f"{name} is not base64")
        try:
            return await self._in_reader(_prepared, name, body, self.model.config)
        except BadImage as failure:
            raise RequestError(400, str(failure)) from None
        except MemoryError:
            raise RequestError(
                503, "there is too little memory for this image now; try again"
            ) from None

    async def _in_reader(self, function: Callable[..., Any], *arguments: Any) -> Any:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._readers, function, *arguments)


def _prepared(name: str, body: bytes, config: Config) -> tuple[np.ndarray, str]:
    encoded = np.frombuffer(body, np.uint8)
    damage: list[str] = []
    image = decode_image(encoded, name, config.max_pixels, eval_min_side(config), damage.append)
    if damage and config.strict:
        raise BadImage(damage[0])
    return eval_transform(image, config), "".join(damage)


def _heat_map(image: np.ndarray, probabilities: np.ndarray) -> bytes:
    warmth = heat(probabilities, int(probabilities[0].argmax()), len(image))
    return encode_png(overlay(image, warmth))


@dataclass(eq=False)
class _Body:
    """The body of a request.

    Attributes:
        content: what is kept of it.
        arriving: whether more may come.
        refusal: why nothing is kept of it; None if all is.
    """

    content: bytearray = field(default_factory=bytearray)
    arriving: bool = True
    refusal: RequestError | None = None

    def drop(self, refusal: RequestError) -> None:
        self.content, self.refusal = bytearray(), refusal


class Bodies:
    """Reads bodies of requests, and bounds how many bytes of them are in memory together.

    When a part arrives for which there is no room, the body that began first and is still arriving
    is dropped. So large bodies that arrive slowly do not keep out those that arrive at once.
    """

    def __init__(self, most: int = MOST_BODY_BYTES) -> None:
        self._most = most
        # In the order in which they began.
        self._bodies: dict[_Body, None] = {}

    @asynccontextmanager
    async def receive(self, request: Any) -> AsyncIterator[bytearray]:
        """A context with the body of a request, which has its room in it. Raises RequestError."""
        body = _Body()
        self._bodies[body] = None
        try:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._read(request, body), _BODY_S)
            if body.refusal:
                raise body.refusal
            if body.arriving:
                raise RequestError(408, f"the request did not arrive within {_BODY_S} s")
            yield body.content
        finally:
            del self._bodies[body]

    async def _read(self, request: Any, body: _Body) -> None:
        """Read a body to its end, also if it is refused, unless it is far too large.

        What is not read resets the connection, and then some clients do not see the answer.
        """
        too_large = RequestError(413, f"the request has more than {LARGEST_BODY >> 20} MiB")
        declared = request.headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > LARGEST_BODY + _FORGOTTEN:
            body.drop(too_large)
            return
        received = 0
        async for part in request.stream():
            received += len(part)
            if received > LARGEST_BODY:
                body.drop(too_large)
            if received > LARGEST_BODY + _FORGOTTEN:
                return
            if not body.refusal:
                body.content += part
                self._make_room()
        body.arriving = False

    def _make_room(self) -> None:
        excess = sum(len(body.content) for body in self._bodies) - self._most
        for body in self._bodies:
            if excess <= 0:
                return
            if body.arriving and body.content:
                excess -= len(body.content)
                body.drop(RequestError(503, BUSY))
