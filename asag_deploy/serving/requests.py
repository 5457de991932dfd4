"""Head and body of a request, read within the limits, and whether its client is still there."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from asag_deploy.plain_numbers import unsigned
from asag_deploy.serving.limits import (
    LONGEST_TARGET,
    MOST_HEADER_BYTES,
    MOST_HEADERS,
    Limits,
    RefusedError,
)
from asag_deploy.serving.options import NAMES, Deadline
from asag_deploy.serving.texts import mebibytes, shown

if TYPE_CHECKING:
    from starlette.requests import Request

_VERSIONS = ("1.0", "1.1")
_PLAIN_IMAGE = (
    "send the image file itself as the body, as `curl --data-binary @photo.jpg` does, or a "
    "multipart/form-data with it"
)
_PLAIN_REQUEST = "send the inference request itself as the body"
_PARTS, _FORM = "multipart/", "multipart/form-data"


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
            f"path and parameters are longer than {LONGEST_TARGET} bytes; the parameters are {NAMES}",
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


async def body_of(request: Request, limits: Limits, deadline: Deadline) -> bytes:
    """Read the whole body, whatever type it claims: curl calls every file a form.

    Raises RefusedError for bodies of several parts, for compressed ones, for more bytes or seconds than the
    limits allow, and once the deadline has passed; ClientGone if the client goes away.
    """
    check_kind(request)
    data = bytearray()
    async for piece in pieces_of(request, limits, deadline, most=limits.max_bytes):
        data += piece
    if not data:
        sentence = "the request has no body; send an image file as its body"
        raise RefusedError(HTTPStatus.BAD_REQUEST, sentence, reason="no_image")
    return bytes(data)


async def pieces_of(
    request: Request, limits: Limits, deadline: Deadline, *, most: int
) -> AsyncGenerator[bytes, None]:
    """Yield the body piece by piece, `most` bytes at most.

    Raises RefusedError for more bytes, or more seconds than there are, ClientGone if the client goes away.
    """
    from starlette.requests import ClientDisconnect

    if (unsigned(request.headers.get("content-length", "")) or 0) > most:
        raise too_large(limits)
    end, count = time.perf_counter() + limits.body_seconds, 0
    stream = request.stream()
    while True:
        left = min(end - time.perf_counter(), deadline.seconds_left)
        try:
            async with asyncio.timeout(left):
                piece = await anext(stream, None)
        except TimeoutError:
            deadline.check()
            raise RefusedError(
                HTTPStatus.REQUEST_TIMEOUT,
                f"the image did not arrive within {limits.body_seconds:g} seconds; send it again",
            ) from None
        except ClientDisconnect:
            raise ClientGone from None
        if piece is None:
            return
        count += len(piece)
        if count > most:
            raise too_large(limits)
        yield piece


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


def is_form(request: Request) -> bool:
    """Tell whether the body is a form with a file, as browsers and `curl -F` send it."""
    return _kind(request).startswith(_FORM)


def check_kind(request: Request, *, inference: bool = False) -> None:
    """Raise RefusedError for a body that has to be unpacked before it is an image, or such a request."""
    kind = _kind(request)
    if kind.startswith(_PARTS) and not kind.startswith(_FORM):
        raise RefusedError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            f"the request is of several parts ({shown(kind.partition(';')[0])}); "
            f"{_PLAIN_REQUEST if inference else _PLAIN_IMAGE}",
        )
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise RefusedError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            f"the body is compressed ({shown(encoding)}); send the "
            f"{'request' if inference else 'image file'} as it is",
        )


def too_large(limits: Limits) -> RefusedError:
    """Make the refusal of a body, or an image in it, that is larger than the limits allow."""
    return RefusedError(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        f"the image is larger than {mebibytes(limits.max_bytes)}, which is all this server takes; send a "
        "smaller one",
    )


def _kind(request: Request) -> str:
    return str(request.headers.get("content-type", "")).strip().lower()
