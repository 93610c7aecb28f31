"""The server's requests, metrics and OpenAPI description."""

import asyncio
import base64
import binascii
import email
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from typing import Any

from src.cli.config import Config, key_info

MAX_IMAGES = 64
_DESCRIPTION_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<style>:root {{ color-scheme: light dark; }}
body {{ margin: 0 auto; max-width: 40rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; }}
h2 {{ font-size: 1.1rem; margin: 1.6rem 0 .3rem; }} code {{ overflow-wrap: anywhere; }}
</style></head><body>{content}</body></html>
"""


class RequestError(Exception):
    """A request that gets no result.

    Attributes:
        status: of HTTP.
        answer: why, for the client.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.answer = status, {"error": reason}


@dataclass(frozen=True)
class ImageRequest:
    """The images of a request.

    Attributes:
        images: (name, encoded image) of each; None where it is not base64.
        is_list: whether the answer is a list, one entry per image.
    """

    images: list[tuple[str, bytes | None]]
    is_list: bool = False


def read_request(content_type: str, body: bytes | bytearray) -> ImageRequest:
    """The images in a body: one as it is, the files of a form, or base64 in JSON.

    Raises:
        ValueError: with a sentence for the client.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind.startswith("multipart/"):
        files = files_in_form(content_type, body)
        request = ImageRequest([*files], is_list=len(files) > 1)
    elif kind == "application/json":
        request = _images_in_json(body)
    else:
        request = ImageRequest([("the body", bytes(body))])
    if len(request.images) > MAX_IMAGES:
        raise ValueError(
            f"send at most {MAX_IMAGES} images per request; this one has {len(request.images)}"
        )
    if all(content == b"" for _, content in request.images):
        raise ValueError(
            "send an image as the body of the request, as curl --data-binary @photo.jpg does, or "
            "as the file of a form, as curl --form image=@photo.jpg does"
        )
    return request


def files_in_form(content_type: str, body: bytes | bytearray) -> list[tuple[str, bytes]]:
    """(name, content) of the files in a multipart/form-data body (RFC 7578), or its only field."""
    # As Latin-1 every byte is one character, so names keep theirs.
    text = body.decode("latin-1")
    try:
        form = email.message_from_string(f"Content-Type: {content_type}\r\n\r\n{text}")
    except (RecursionError, LookupError, ValueError):  # parts within parts, unknown character sets
        return []
    parts = [part for part in form.walk() if not part.is_multipart()] if form.is_multipart() else []
    files = [part for part in parts if part.get_filename() is not None]
    others = [
        str(part.get_param("name", "", "content-disposition"))
        for part in parts
        if part.get_filename() is None
    ]
    flags = [
        name
        for name in others
        if name in Config.model_fields and "serve" in key_info(name).commands
    ]
    if files and flags:
        raise ValueError(f"fields without effect: {', '.join(flags)}; they are flags of serve.py")
    contents = [
        (_as_text(part.get_filename("the form")), part.get_payload(decode=True))
        for part in files or (parts if len(parts) == 1 else [])
    ]
    return [(name, content) for name, content in contents if isinstance(content, bytes)]


def _images_in_json(body: bytes | bytearray) -> ImageRequest:
    """The images of {"image": BASE64} or {"images": [BASE64, ...]}."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("the body is not JSON, although its Content-Type says so") from None
    is_list = isinstance(found, dict) and "images" in found
    if is_list and "image" in found:
        raise ValueError('send "image" or "images", not both')
    unknown = set(found) - {"image", "images"} if isinstance(found, dict) else ()
    if unknown:
        raise ValueError(f"unknown keys: {', '.join(sorted(unknown))}; they are flags of serve.py")
    texts = found.get("images" if is_list else "image") if isinstance(found, dict) else None
    texts = texts if is_list else [texts]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError('send {"image": BASE64} or {"images": [BASE64, ...]}')
    contents = [(f"image {number}", _decoded(text)) for number, text in enumerate(texts)]
    return ImageRequest(contents, is_list)


def _decoded(text: str) -> bytes | None:
    """The bytes of base64, which may have line breaks; None if it is none."""
    # Browsers write data:image/jpeg;base64, ahead of it.
    encoded = text.partition(",")[2] if text.startswith("data:") else text
    try:
        return base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError):
        return None


def _as_text(name: str) -> str:
    """The name of a file, whose bytes were read as Latin-1 and are usually UTF-8."""
    try:
        return name.encode("latin-1").decode()
    except UnicodeError:
        return name.encode("utf-8", "backslashreplace").decode()


@dataclass
class ServerMetrics:
    """Counters for /metrics.

    Attributes:
        requests: number of requests to /predict, by status.
        seconds: total time that these requests took.
        unanswered: number of requests that were read, and cut off when the server stopped.
    """

    requests: Counter[int] = field(default_factory=Counter)
    seconds: float = 0.0
    unanswered: int = 0

    def add(self, status: int, seconds: float) -> None:
        """Count a request to /predict."""
        self.requests[status] += 1
        self.seconds += seconds

    @contextmanager
    def count_if_cancelled(self) -> Iterator[None]:
        """Count the request that is answered in this context if it is cut off."""
        try:
            yield
        except asyncio.CancelledError:
            self.unanswered += 1
            raise

    def text(self, images: int, batches: int, waiting: int) -> str:
        """In Prometheus' text format, version 0.0.4."""
        lines = [
            "# HELP acnet_requests_total Requests to /predict, by status.",
            "# TYPE acnet_requests_total counter",
            *(
                f'acnet_requests_total{{status="{status}"}} {count}'
                for status, count in sorted(self.requests.items())
            ),
            "# HELP acnet_request_seconds Time from a request's first byte to its answer.",
            "# TYPE acnet_request_seconds summary",
            f"acnet_request_seconds_sum {self.seconds:.6f}",
            f"acnet_request_seconds_count {self.requests.total()}",
            "# HELP acnet_images_total Images that were computed, 50 for a heat map.",
            "# TYPE acnet_images_total counter",
            f"acnet_images_total {images}",
            "# HELP acnet_batches_total Batches in which they were computed.",
            "# TYPE acnet_batches_total counter",
            f"acnet_batches_total {batches}",
            "# HELP acnet_waiting_images Images that wait for the next batch.",
            "# TYPE acnet_waiting_images gauge",
            f"acnet_waiting_images {waiting}",
        ]
        return "\n".join(lines) + "\n"


def openapi(network: str, classes: list[str]) -> dict[str, Any]:
    """The description of the server, OpenAPI 3.1."""
    error = {"description": "what is wrong", **_json({"$ref": "#/components/schemas/Error"})}
    prediction = {"$ref": "#/components/schemas/Prediction"}
    base64_text = {"type": "string", "contentEncoding": "base64"}
    file = {"type": "string", "format": "binary"}
    return {
        "openapi": "3.1.0",
        "info": {"title": network, "version": "1", "description": f"Classes: {', '.join(classes)}"},
        "paths": {
            "/predict": {
                "post": {
                    "summary": "Classify a photograph, or several",
                    "requestBody": {
                        "required": True,
                        "content": {
                            "image/*": {"schema": file},
                            "multipart/form-data": {
                                "schema": {"type": "object", "additionalProperties": file}
                            },
                            "application/json": {
                                "schema": {
                                    "type": "object",
                                    "properties": {
                                        "image": base64_text,
                                        "images": {"type": "array", "items": base64_text},
                                    },
                                }
                            },
                        },
                    },
                    "responses": {
                        "200": {
                            "description": "a prediction, or a list of answers for several images",
                            **_json(
                                {"oneOf": [prediction, {"$ref": "#/components/schemas/Answers"}]}
                            ),
                        },
                        **dict.fromkeys(("400", "408", "413", "503"), error),
                    },
                }
            },
            "/heatmap": {
                "post": {
                    "summary": "Heat map of the regions that the top class depends on",
                    "requestBody": {"required": True, "content": {"image/*": {"schema": file}}},
                    "responses": {
                        "200": {
                            "description": "the photograph; its important regions are warm",
                            "content": {"image/png": {"schema": file}},
                        },
                        **dict.fromkeys(("400", "408", "413", "503"), error),
                    },
                }
            },
            "/health": {"get": _get("Network, and how many images it has computed so far")},
            "/metrics": {"get": _get("Figures for Prometheus")},
        },
        "components": {
            "schemas": {
                "Error": {"type": "object", "properties": {"error": {"type": "string"}}},
                "Prediction": {
                    "type": "object",
                    "properties": {
                        "predictions": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "properties": {
                                    "class": {"type": "string"},
                                    "probability": {"type": "number"},
                                },
                            },
                        },
                        "unsure": {"type": "boolean"},
                        "damaged": {
                            "type": "string",
                            "description": "why a part of the image may be wrong",
                        },
                    },
                },
                "Answers": {
                    "type": "object",
                    "properties": {
                        "answers": {
                            "type": "array",
                            "description": "in order; of each image its name, and a prediction or "
                            "an error",
                            "items": {"type": "object"},
                        }
                    },
                },
            }
        },
    }


def description_page(description: dict[str, Any]) -> str:
    """The OpenAPI description as an HTML page, for people."""
    info = description["info"]
    parts = [f"<h1>{escape(info['title'])}</h1><p>{escape(info['description'])}</p>"]
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2><code>{method.upper()} {path}</code></h2>")
            parts.append(f"<p>{escape(operation['summary'])}.</p>")
            takes = operation.get("requestBody", {}).get("content", {})
            rows = [f"<li>Takes <code>{escape(kind)}</code></li>" for kind in takes]
            for status, response in operation["responses"].items():
                kinds = ", ".join(f"<code>{kind}</code>" for kind in response.get("content", {}))
                text = escape(response["description"])
                rows.append(f"<li>{status}: {text}{f' ({kinds})' if kinds else ''}</li>")
            parts.append(f"<ul>{''.join(rows)}</ul>")
    example = "curl --data-binary @photo.jpg http://127.0.0.1:8000/predict"
    parts.append(f"<h2>Example</h2><p><code>{example}</code></p>")
    parts.append('<p>For programs: <a href="openapi.json">openapi.json</a></p>')
    return _DESCRIPTION_PAGE.format(title=escape(info["title"]), content="".join(parts))


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": schema}}}


def _get(summary: str) -> dict[str, Any]:
    return {"summary": summary, "responses": {"200": {"description": "OK"}}}
