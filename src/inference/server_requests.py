"""What the server takes and says: the images of a request, its figures, its description."""

import base64
import binascii
import email
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

MOST_IMAGES = 64


@dataclass(frozen=True)
class ImageRequest:
    """The images of a request.

    Attributes:
        images: (name, encoded image) of each.
        is_list: whether the answer is a list, one entry per image.
    """

    images: list[tuple[str, bytes]]
    is_list: bool = False


def read_request(content_type: str, body: bytes) -> ImageRequest:
    """The images in a body: one as it is, the files of a form, or base64 in JSON.

    Raises:
        ValueError: with a sentence for the client.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind.startswith("multipart/"):
        files = files_in_form(content_type, body)
        request = ImageRequest(files, is_list=len(files) > 1)
    elif kind == "application/json":
        request = _images_in_json(body)
    else:
        request = ImageRequest([("the body", body)])
    if len(request.images) > MOST_IMAGES:
        raise ValueError(
            f"send at most {MOST_IMAGES} images per request; this one has {len(request.images)}"
        )
    if not any(content for _, content in request.images):
        raise ValueError(
            "send an image as the body of the request, as curl --data-binary @photo.jpg does, or "
            "as the file of a form, as curl --form image=@photo.jpg does"
        )
    return request


def files_in_form(content_type: str, body: bytes) -> list[tuple[str, bytes]]:
    """(name, content) of the files in a multipart/form-data body (RFC 7578), or its first field."""
    header = f"Content-Type: {content_type}\r\n\r\n".encode("latin-1", "replace")
    try:
        form = email.message_from_bytes(header + body)
    except (RecursionError, LookupError, ValueError):  # parts within parts, unknown character sets
        return []
    parts = [part for part in form.walk() if not part.is_multipart()] if form.is_multipart() else []
    files = [part for part in parts if part.get_filename() is not None]
    contents = [
        (_sendable(part.get_filename("the form")), part.get_payload(decode=True))
        for part in files or parts[:1]
    ]
    return [(name, content) for name, content in contents if isinstance(content, bytes)]


def _images_in_json(body: bytes) -> ImageRequest:
    """Of {"image": BASE64} or {"images": [BASE64, ...]}."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("the body is not JSON, although its Content-Type says so") from None
    is_list = isinstance(found, dict) and "images" in found
    texts = found.get("images" if is_list else "image") if isinstance(found, dict) else None
    texts = texts if is_list else [texts]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError('send {"image": BASE64} or {"images": [BASE64, ...]}')
    images = []
    for number, text in enumerate(texts):
        # Browsers write data:image/jpeg;base64, ahead of it.
        encoded = text.partition(",")[2] if text.startswith("data:") else text
        try:
            images.append((f"image {number}", base64.b64decode(encoded, validate=True)))
        except (binascii.Error, ValueError):
            raise ValueError(f"image {number} is not base64") from None
    return ImageRequest(images, is_list)


def _sendable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


@dataclass
class Figures:
    """What /metrics counts besides images and batches."""

    requests: Counter[int] = field(default_factory=Counter)
    seconds: float = 0.0

    def add(self, status: int, seconds: float) -> None:
        """Count a request to /predict."""
        self.requests[status] += 1
        self.seconds += seconds

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
            "# HELP acnet_images_total Images that were classified.",
            "# TYPE acnet_images_total counter",
            f"acnet_images_total {images}",
            "# HELP acnet_batches_total Batches in which they were classified.",
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
            "/health": {"get": _get("Network, and what it has classified so far")},
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


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": schema}}}


def _get(summary: str) -> dict[str, Any]:
    return {"summary": summary, "responses": {"200": {"description": "OK"}}}
