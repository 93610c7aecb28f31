"""A small HTTP server that classifies photographs.

Requests are batched, the size of each is bounded, and accepted requests are answered before it
ends. The packages starlette and uvicorn are an optional extra.
"""

import asyncio
import html
import resource
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from src.cli.command import Command
from src.distributed.shutdown import Signals
from src.inference.backends import open_backends
from src.inference.image_service import ImageService
from src.inference.server_requests import RequestError, ServerMetrics, description_page, openapi
from src.runs.run_folder import choose_checkpoint
from src.utils.errors import UserError
from src.utils.log import Log, create_log
from src.utils.progress import print_status

# How long accepted requests are answered after a signal to stop.
_STOP_S = 60
# The status of a request whose client has gone away, for the metrics, as nginx counts it.
_HUNG_UP = 499
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
    for note in model.prediction_notes:
        log(note)

    def log_address(address: str) -> None:
        log(f"serving {model.config.network} of {path} on {address}")

    service = ImageService(model, backends)
    figures = ServerMetrics()
    app = create_app(service, figures, log)
    serve_app(app, address, command.signals, log_address)
    if unanswered := figures.unanswered:
        log(f"stopped; {unanswered} requests were not answered within {_STOP_S} s")
    else:
        log("stopped; every accepted request was answered")


def create_app(service: ImageService, figures: ServerMetrics, log: Log) -> Any:
    """The ASGI application of a service: what ``routes`` has.

    Args:
        figures: count what happens.
        log: gets a line for each failure of the program.

    Raises:
        UserError: where the packages are missing.
    """
    _, starlette = import_server()
    responses, route = starlette.responses, starlette.routing.Route
    disconnected = starlette.requests.ClientDisconnect
    config = service.model.config
    described = openapi(config.network, service.class_names)
    page = _PAGE.read_text(encoding="utf-8").replace("NETWORK", config.network)
    page = page.replace("QUESTION", html.escape(_question(service.class_names) or config.network))

    async def predict(request: Any) -> Any:
        started, status = time.perf_counter(), 500
        try:
            async with service.receive(request) as sent:
                with figures.count_if_cancelled():
                    answer = await service.predict(sent)
            status = 200
            return responses.JSONResponse(answer)
        except RequestError as refusal:
            status = refusal.status
            raise
        except disconnected:
            status = _HUNG_UP
            raise
        finally:
            figures.add(status, time.perf_counter() - started)

    async def explain(request: Any) -> Any:
        async with service.receive(request) as sent:
            with figures.count_if_cancelled():
                picture = await service.heat_map(sent)
        return responses.Response(picture, media_type="image/png")

    async def refuse(request: Any, refusal: RequestError) -> Any:
        return responses.JSONResponse(refusal.answer, refusal.status)

    async def hang_up(request: Any, failure: Exception) -> Any:
        # Nobody reads it, and it is no failure of the program: clients could fill the log.
        return responses.Response(status_code=_HUNG_UP)

    async def fail(request: Any, failure: Exception) -> Any:
        log(f"{request.url.path} failed: {type(failure).__name__}: {failure}")
        return responses.JSONResponse({"error": "the server failed; its log says why"}, 500)

    async def health(request: Any) -> Any:
        return responses.JSONResponse(
            {
                "status": "ok",
                "network": config.network,
                "classes": config.num_classes,
                "images": service.batcher.images,
                "batches": service.batcher.batches,
            }
        )

    async def metrics(request: Any) -> Any:
        batcher = service.batcher
        text = figures.text(batcher.images, batcher.batches, batcher.waiting)
        return responses.PlainTextResponse(text)

    def always(response: Any) -> Any:
        async def respond(request: Any) -> Any:
            return response

        return respond

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        running = asyncio.create_task(service.batcher.run())
        yield
        running.cancel()

    return starlette.applications.Starlette(
        lifespan=lifespan,
        exception_handlers={RequestError: refuse, disconnected: hang_up, Exception: fail},
        routes=[
            route("/", always(responses.HTMLResponse(page))),
            route("/predict", predict, methods=["POST"]),
            route("/heatmap", explain, methods=["POST"]),
            route("/health", health),
            route("/metrics", metrics),
            route("/openapi.json", always(responses.JSONResponse(described))),
            route("/docs", always(responses.HTMLResponse(description_page(described)))),
        ],
    )


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
        import starlette.requests
        import starlette.responses
        import starlette.routing
        import uvicorn
    except ImportError:
        raise UserError(
            "serving needs two more packages: run 'bash scripts/setup.sh --serve'"
        ) from None
    return uvicorn, starlette
