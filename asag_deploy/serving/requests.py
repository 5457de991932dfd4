"""What a request asks for: head and body, read within the limits, and whether its client is still there."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from asag_deploy.errors import ConfigError
from asag_deploy.serving.limits import (
    LONGEST_TARGET,
    MOST_HEADER_BYTES,
    MOST_HEADERS,
    Limits,
    RefusedError,
)

if TYPE_CHECKING:
    from starlette.requests import Request

_VERSIONS = ("1.0", "1.1")
_FORM = "multipart/"
_LONGEST_ECHO = 40


class ClientGone(Exception):
    """The client has closed its connection, and nobody reads an answer."""


def path_of(scope: dict[str, Any]) -> str:
    """Return the path of a request, also of one that names the whole address, as proxies may."""
    target: bytes = scope.get("raw_path", b"") or scope["path"].encode()
    scheme, separator, rest = target.partition(b"://")
    if separator and scheme.lower() in (b"http", b"https"):
        return unquote((b"/" + rest.partition(b"/")[2]).decode("latin-1"))
    return str(scope["path"])


def check_head(scope: dict[str, Any]) -> None:
    """Raise RefusedError for a target or headers that are too long, or that say two things at once."""
    version = scope["http_version"]
    if version not in _VERSIONS:
        raise RefusedError(
            HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, f"the request is of HTTP {version}; send one of HTTP 1.1"
        )
    target = len(scope.get("raw_path", b"")) + len(scope["query_string"])
    if target > LONGEST_TARGET:
        raise RefusedError(
            HTTPStatus.REQUEST_URI_TOO_LONG,
            f"path and parameters are longer than {LONGEST_TARGET} bytes; the only parameter is threshold",
        )
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    if len(headers) > MOST_HEADERS or sum(len(n) + len(v) for n, v in headers) > MOST_HEADER_BYTES:
        raise RefusedError(
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
            f"the request has more than {MOST_HEADERS} headers or {MOST_HEADER_BYTES} bytes of them",
        )
    names = [name for name, _ in headers]
    if b"content-length" in names and b"transfer-encoding" in names:
        raise RefusedError(
            HTTPStatus.BAD_REQUEST, "the request says twice how long it is; send either length or chunks"
        )


def threshold_of(request: Request, default: float) -> float:
    """Return the threshold that a request asks for; raise RefusedError for one that makes no sense."""
    unknown = sorted(set(request.query_params) - {"threshold"})
    if unknown:
        raise RefusedError(
            HTTPStatus.BAD_REQUEST,
            f"unknown parameter '{shown(unknown[0])}'; the only one there is is threshold",
        )
    values = request.query_params.getlist("threshold")
    if not values:
        return default
    if len(values) > 1:
        raise RefusedError(HTTPStatus.BAD_REQUEST, f"threshold is given {len(values)} times; give it once")
    try:
        value = float(values[0])
        check_threshold(value)
    except ValueError:  # a ConfigError is one too
        raise RefusedError(
            HTTPStatus.BAD_REQUEST,
            f"threshold is '{shown(values[0])}', which is not a number between 0 and 1",
        ) from None
    return value


def check_threshold(threshold: float) -> None:
    """Raise ConfigError unless a threshold is from 0 to 1."""
    if not 0 <= threshold <= 1:
        raise ConfigError(f"--threshold is {threshold:g}, which is not between 0 and 1")


async def body_of(request: Request, limits: Limits) -> bytes:
    """Read the whole body, whatever type it claims: curl calls every file a form.

    Raises RefusedError for multipart forms, for compressed bodies, and for more bytes or seconds than the
    limits allow, ClientGone if the client goes away.
    """
    from starlette.requests import ClientDisconnect

    _check_kind(request)
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limits.max_bytes:
        raise _too_large(limits)
    data = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                data += chunk
                if len(data) > limits.max_bytes:
                    raise _too_large(limits)
    except TimeoutError:
        raise RefusedError(
            HTTPStatus.REQUEST_TIMEOUT,
            f"the image did not arrive within {limits.body_seconds:g} seconds; send it again",
        ) from None
    except ClientDisconnect:
        raise ClientGone from None
    if not data:
        raise RefusedError(HTTPStatus.BAD_REQUEST, "the request has no body; send an image file as its body")
    return bytes(data)


@asynccontextmanager
async def watched(request: Request) -> AsyncIterator[asyncio.Task[None]]:
    """Give a task that ends as soon as the client of a request, whose body has been read, goes away."""

    async def wait() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    gone = asyncio.create_task(wait())
    try:
        yield gone
    finally:
        gone.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await gone


class Exchange:
    """A request and its answer, as an application receives and sends them, and how far they have come."""

    def __init__(self, receive: Any, send: Any) -> None:
        self._receive, self._send = receive, send
        self.body_read = False
        """Whether the body has come to its end."""
        self.answered = False
        """Whether an answer has begun."""

    async def receive(self) -> Any:
        """Receive the next message."""
        message = await self._receive()
        self.body_read = message["type"] == "http.disconnect" or not message.get("more_body", False)
        return message

    async def send(self, message: Any) -> None:
        """Send the next message."""
        self.answered = True
        await self._send(message)

    async def discard_body(self, seconds: float) -> None:
        """Let a client end what it is sending, and throw it away; for so long at most.

        Closing the connection at once would make the answer, which it has not read yet, disappear.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self.body_read:
                    await self.receive()


def shown(text: str) -> str:
    """Return a client's text as it may stand in a sentence."""
    plain = text if text.isprintable() else ascii(text)[1:-1]
    return plain if len(plain) <= _LONGEST_ECHO else f"{plain[:_LONGEST_ECHO]}..."


def mebibytes(count: int) -> str:
    """Return a number of bytes in MiB."""
    return f"{count / 2**20:g} MiB"


def megapixels(count: int) -> str:
    """Return a number of pixels in millions, rounded up."""
    return f"{math.ceil(count / 1e4) / 100:g} million pixels"


def _check_kind(request: Request) -> None:
    kind = request.headers.get("content-type", "").lower()
    if kind.startswith(_FORM):
        raise RefusedError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            f"the request is a form ({shown(kind.partition(';')[0])}); send the image file itself as the "
            "body, as `curl --data-binary @photo.jpg` does",
        )
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise RefusedError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            f"the body is compressed ({shown(encoding)}); send the image file as it is",
        )


def _too_large(limits: Limits) -> RefusedError:
    return RefusedError(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        f"the image is larger than {mebibytes(limits.max_bytes)}, which is all this server takes; send a "
        "smaller one",
    )
