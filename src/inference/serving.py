"""A small HTTP server that classifies photographs.

Requests are batched, sizes are bounded, and accepted requests are answered before it ends. The
packages starlette and uvicorn are an optional extra.
"""

import asyncio
import html
import resource
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax

from src.cli.command import Command
from src.dataset.decoding import BadImage, decode_image
from src.dataset.transforms import eval_least_side, eval_transform
from src.distributed.shutdown import Signals
from src.inference.backends import Backend, open_backends, with_flip
from src.inference.checkpoint_model import CheckpointModel
from src.inference.prediction import Prediction
from src.inference.server_requests import Figures, openapi, read_request
from src.runs.checkpoint import choose_checkpoint
from src.utils.errors import UserError
from src.utils.log import create_log
from src.utils.machine import available_cores
from src.utils.progress import print_status

# One compiled graph each. A batch takes the largest of these sizes for which enough images wait.
BATCH_SIZES = (1, 2, 4, 8, 16)
LARGEST_BODY = 20 * 2**20
_QUEUED = 256
_TIMED = 3
# How long a body may take to arrive.
_BODY_S = 60
# How long accepted requests are answered after a signal to stop.
_STOP_S = 60
_CLASSES_ASKED = 6
_PAGE = Path(__file__).with_name("serving_page.html")


def serve(command: Command) -> None:
    """The command serve.py: serve the checkpoint that the command line names."""
    import_server()
    config, log = command.config, command.checked(create_log())
    # Before the network is loaded, which takes seconds.
    address = bind(config.host, config.port)
    path = choose_checkpoint(config.checkpoint_file_path, print_status)
    model, backends = open_backends(path, command.flags, command.kernels)

    def log_address(address: str) -> None:
        log(f"serving {model.config.network} of {path} on {address}")

    app = create_app(model, backends)
    serve_app(app, address, command.signals, log_address)
    if unanswered := app.state.batcher.unanswered:
        log(f"stopped; {unanswered} requests were not answered within {_STOP_S} s")
    else:
        log("stopped; every accepted request was answered")


class Busy(Exception):
    """The queue of requests is full."""


class Batcher:
    """Collects images that arrive while others are computed into the next batch.

    Args:
        backends: (B, S, S, 3) uint8 images -> (B, C) logits, called in one thread. Each batch size
            uses the fastest of them.
        image_size: S.
    """

    def __init__(self, backends: Sequence[Backend], image_size: int, queued: int = _QUEUED) -> None:
        self._backends, self._size = backends, image_size
        self._fastest = dict.fromkeys(BATCH_SIZES, backends[0])
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="backend")
        self._waiting: asyncio.Queue[tuple[np.ndarray, asyncio.Future[np.ndarray]]] = asyncio.Queue(
            queued
        )
        self.images = self.batches = self.unanswered = 0

    def warm_up(self) -> None:
        """Compile a graph for each batch size, and find the fastest backend for it."""
        for size in BATCH_SIZES:
            images = np.zeros((size, self._size, self._size, 3), np.uint8)
            seconds = [
                self._thread.submit(_seconds, backend, images).result()
                for backend in self._backends
            ]
            self._fastest[size] = self._backends[int(np.argmin(seconds))]

    @property
    def waiting(self) -> int:
        """Number of images that wait for the next batch."""
        return self._waiting.qsize()

    async def classify(self, image: np.ndarray) -> np.ndarray:
        """Probabilities (C,) of an image (S, S, 3). Raises Busy."""
        answer: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        try:
            self._waiting.put_nowait((image, answer))
        except asyncio.QueueFull:
            raise Busy from None
        try:
            return await answer
        except asyncio.CancelledError:
            self.unanswered += 1
            raise

    async def run(self) -> None:
        """Compute what is waiting, without end."""
        while True:
            batch = [await self._waiting.get()]
            size = max(size for size in BATCH_SIZES if size <= 1 + self._waiting.qsize())
            batch += [self._waiting.get_nowait() for _ in range(size - 1)]
            images = np.stack([image for image, _ in batch])
            self.batches, self.images = self.batches + 1, self.images + len(batch)
            try:
                found = softmax(await self._compute(self._fastest[len(batch)], images), axis=1)
            except Exception as failure:  # the next batch may be better
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(failure)
                continue
            for (_, answer), probabilities in zip(batch, found):
                # A client that has gone away has cancelled it.
                if not answer.done():
                    answer.set_result(probabilities)

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


def create_app(model: CheckpointModel, backends: Sequence[Backend]) -> Any:
    """The ASGI application: a page at /, POST /predict, GET /health, /metrics and /openapi.json.

    Args:
        backends: (B, S, S, 3) uint8 images -> (B, C) logits; all are timed for every batch size.

    Raises:
        UserError: where the packages are missing.
    """
    _, starlette = import_server()
    # Names may have bytes that are no text.
    classes = (model.class_to_index or {}).items()
    sendable = {name.encode("utf-8", "backslashreplace").decode(): i for name, i in classes}
    model = replace(model, class_to_index=sendable)
    batcher = Batcher(
        [with_flip(backend) for backend in backends] if model.config.test_flip else backends,
        model.config.image_size,
    )

    batcher.warm_up()
    figures = Figures()
    # The default pool has more threads than cores, each of which may hold a large image.
    readers = ThreadPoolExecutor(available_cores(), thread_name_prefix="reader")

    question = html.escape(_question(list(sendable)) or model.config.network)

    def prepared(name: str, body: bytes) -> np.ndarray:
        encoded = np.frombuffer(body, np.uint8)
        config = model.config
        image = decode_image(encoded, name, config.max_pixels, eval_least_side(config))
        return eval_transform(image, config)

    async def answer_of(name: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """(status, answer) for one image."""
        try:
            loop = asyncio.get_running_loop()
            image = await loop.run_in_executor(readers, prepared, name, body)
            probabilities = await batcher.classify(image)
        except BadImage as failure:
            return 400, {"error": str(failure)}
        except MemoryError:
            return 503, {"error": "there is too little memory for this image now; try again"}
        except Busy:
            return 503, {"error": "too many requests are waiting; try again"}
        return 200, Prediction.of("", probabilities, model).answer()

    async def answer(request: Any) -> tuple[int, dict[str, Any]]:
        try:
            body = await asyncio.wait_for(_body(request), _BODY_S)
        except asyncio.TimeoutError:
            return 408, {"error": f"the request did not arrive within {_BODY_S} s"}
        if body is None:
            return 413, {"error": f"the request has more than {LARGEST_BODY >> 20} MiB"}
        content_type = request.headers.get("content-type", "")
        loop = asyncio.get_running_loop()
        try:
            sent = await loop.run_in_executor(readers, read_request, content_type, body)
        except ValueError as failure:
            return 400, {"error": str(failure)}
        answers = await asyncio.gather(*(answer_of(*image) for image in sent.images))
        if not sent.is_list:
            return answers[0]
        names = (name for name, _ in sent.images)
        return 200, {"answers": [{"image": n, **found} for n, (_, found) in zip(names, answers)]}

    async def predict(request: Any) -> Any:
        started = time.perf_counter()
        status, found = await answer(request)
        figures.add(status, time.perf_counter() - started)
        return starlette.responses.JSONResponse(found, status)

    async def health(request: Any) -> Any:
        return starlette.responses.JSONResponse(
            {
                "status": "ok",
                "network": model.config.network,
                "classes": model.config.num_classes,
                "images": batcher.images,
                "batches": batcher.batches,
            }
        )

    async def metrics(request: Any) -> Any:
        text = figures.text(batcher.images, batcher.batches, batcher.waiting)
        return starlette.responses.PlainTextResponse(text)

    async def description(request: Any) -> Any:
        return starlette.responses.JSONResponse(openapi(model.config.network, list(sendable)))

    async def page(request: Any) -> Any:
        text = _PAGE.read_text(encoding="utf-8")
        return starlette.responses.HTMLResponse(
            text.replace("NETWORK", model.config.network).replace("QUESTION", question)
        )

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        running = asyncio.create_task(batcher.run())
        yield
        running.cancel()

    route = starlette.routing.Route
    app = starlette.applications.Starlette(
        lifespan=lifespan,
        routes=[
            route("/", page),
            route("/predict", predict, methods=["POST"]),
            route("/health", health),
            route("/metrics", metrics),
            route("/openapi.json", description),
        ],
    )
    app.state.batcher = batcher
    return app


async def _body(request: Any) -> bytes | None:
    """The body of a request; None if it is too large, of which no more is read then."""
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > LARGEST_BODY:
        return None
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > LARGEST_BODY:
            return None
        parts.append(part)
    return b"".join(parts)


def _question(classes: Sequence[str]) -> str:
    """The classes as a question for a title, or "" if there are too many."""
    if not 2 <= len(classes) <= _CLASSES_ASKED:
        return ""
    return f"{', '.join(classes[:-1])} or {classes[-1]}?"


def bind(host: str, port: int) -> socket.socket:
    """A socket with this address, which does not listen yet.

    Args:
        port: 0 is a free one.

    Raises:
        UserError: if the address is not available.
    """
    try:
        family, kind, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as failure:
        raise UserError(
            f"cannot serve on {host}:{port}: {failure.strerror or failure}; --host and --port "
            "choose the address, and --port=0 a free port"
        ) from None
    return bound


def serve_app(
    app: Any, address: socket.socket, signals: Signals, ready: Callable[[str], None]
) -> None:
    """Serve ``app`` until a signal comes; what was accepted is answered first.

    Args:
        address: what to listen on.
        ready: called with the address when requests are taken.

    Raises:
        UserError: if the address is not available any more.
    """
    uvicorn, _ = import_server()
    # Each connection is an open file; the usual limit of 1,024 is only a default.
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))

    class Server(uvicorn.Server):  # type: ignore[name-defined]
        # Signals arrive in a thread of ours.
        capture_signals = staticmethod(nullcontext)

        async def startup(self, sockets: Sequence[Any] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                ready(f"http://{_host_and_port(address)}/")

    server = Server(
        uvicorn.Config(
            app, log_level="critical", access_log=False, timeout_graceful_shutdown=_STOP_S
        )
    )

    def stop(number: int) -> None:
        server.should_exit = True

    signals.defer_to(stop)
    # uvicorn exits like this if it cannot start; our own message follows.
    with suppress(SystemExit):
        server.run(sockets=[address])
    if not server.started:
        raise UserError(
            f"cannot serve on {_host_and_port(address)}: another program has taken the address; "
            "--port=0 picks a free port"
        )


def _host_and_port(address: socket.socket) -> str:
    host, port, *_ = address.getsockname()
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def import_server() -> tuple[Any, Any]:
    """(uvicorn, starlette), an optional extra. Raises UserError that says what to install."""
    try:
        import starlette.applications
        import starlette.responses
        import starlette.routing
        import uvicorn
    except ImportError:
        raise UserError(
            "serving needs two more packages: run 'bash scripts/setup.sh --serve'"
        ) from None
    return uvicorn, starlette
