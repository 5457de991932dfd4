"""What the server answers: `POST /detect` and `GET /health`, everything as JSON.

Starlette is imported when the application is made, so that this module costs nothing where nobody serves.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Protocol

from asag_deploy._version import __version__
from asag_deploy.errors import AsagError, ConfigError, ImageError
from asag_deploy.extras import missing
from asag_deploy.images.reading import checked_header, decode_image
from asag_deploy.serving.limits import Limits, RefusedError
from asag_deploy.serving.requests import (
    ClientGone,
    Exchange,
    body_of,
    check_head,
    check_threshold,
    megapixels,
    path_of,
    shown,
    threshold_of,
    watched,
)

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

    from asag_deploy.bundle.manifest import Manifest
    from asag_deploy.detections import Detections
    from asag_deploy.images.reading import RgbImage

CROWDED = "asag.crowded"
"""The entry of a request's scope that says that there are too many connections."""

_log = logging.getLogger("asag_deploy.serving")
_BODY_NAME = "request body"
_RETRY_SECONDS = "1"
_LINGER_SECONDS = 2.0
_PATIENCE_SECONDS = 0.2
"""How long a request waits for a place: those before it may be of clients that are just seen to have gone."""
_HEALTH = "/health"
_EXCHANGE = "asag.exchange"

App = Callable[[Any, Any, Any], Awaitable[None]]
"""An ASGI application."""


class ServedDetector(Protocol):
    """What is asked of a detector: `asag_deploy.Detector`, or what stands in for it."""

    @property
    def manifest(self) -> Manifest:
        """What the bundle says about itself."""
        ...

    def __call__(self, images: RgbImage, *, channel_order: Any) -> Detections:
        """Detect in one image."""
        ...


def make_app(detector: ServedDetector, limits: Limits, *, backend: str, threshold: float) -> App:
    """Make the ASGI application around a loaded detector.

    `backend` is what `/health` says runs the network; `threshold` the least confidence (0 to 1) where a
    request names none.  Raises ConfigError for a threshold that makes no sense, or if Starlette is missing.
    """
    check_threshold(threshold)
    try:
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.routing import Route
    except ImportError as error:
        raise ConfigError(missing(error, "asag-serve", purpose="serving")) from None
    service = _Service(detector, limits, backend, threshold)
    app = Starlette(
        routes=[
            Route("/detect", service.detect, methods=["POST"]),
            Route(_HEALTH, service.health, methods=["GET"]),
        ],
        exception_handlers={
            HTTPException: _http_error,
            RefusedError: _refused,
            Exception: _unexpected,
        },
        lifespan=service.lifespan,
    )
    app.router.redirect_slashes = False
    return _guarded(app)


class _Service:
    """The two endpoints, and the requests they have in hand."""

    def __init__(self, detector: ServedDetector, limits: Limits, backend: str, threshold: float) -> None:
        self._detector = detector
        self._limits = limits
        self._backend = backend
        self._threshold = threshold
        self._in_hand = 0  # touched by the event loop's thread alone
        self._places = asyncio.Semaphore(limits.requests + limits.queue)
        self._turns = asyncio.Semaphore(limits.requests)
        self._pool = ThreadPoolExecutor(limits.requests, thread_name_prefix="asag-serve")

    @asynccontextmanager
    async def lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        """Let go of the threads with the server; one that is still detecting ends once it has."""
        try:
            yield
        finally:
            self._pool.shutdown(wait=False, cancel_futures=True)

    async def health(self, _request: Request) -> Response:
        """Answer 200 as long as the server listens, also when it is full."""
        manifest = self._detector.manifest
        return _json(
            {
                "status": "ok",
                "version": __version__,
                "variant": manifest.variant,
                "trained": manifest.trained,
                "classes": len(manifest.categories),
                "backend": self._backend,
                "requests": self._in_hand,
            }
        )

    async def detect(self, request: Request) -> Response:
        """Detect in the image file that the body is; answer with its `Detections.to_json`."""
        threshold = threshold_of(request, self._threshold)
        try:
            async with self._place():
                data = await body_of(request, self._limits)
                return _json(await self._detect(request, data, threshold))
        except ClientGone:
            return _json({"error": "the client went away"}, HTTPStatus.BAD_REQUEST)  # which nobody reads
        except ImageError as error:
            raise RefusedError(HTTPStatus.UNPROCESSABLE_ENTITY, str(error)) from None
        except AsagError as error:
            _log.error("%s", error)
            raise RefusedError(HTTPStatus.INTERNAL_SERVER_ERROR, str(error)) from None

    async def _detect(self, request: Request, data: bytes, threshold: float) -> dict[str, Any]:
        """Wait for a turn, as long as somebody waits for the answer, and detect."""
        async with watched(request) as gone:
            await self._turn(gone)
        work = asyncio.get_running_loop().run_in_executor(self._pool, self._run, data, threshold)
        # Not before it has ended, even if nobody waits for it any more, since until then it takes memory.
        work.add_done_callback(lambda _: self._turns.release())
        return await asyncio.shield(work)

    async def _turn(self, gone: asyncio.Task[None]) -> None:
        """Wait until the network has time; raise ClientGone or RefusedError if that comes to nothing."""
        turn = asyncio.create_task(self._turns.acquire())
        given = False
        try:
            await asyncio.wait(
                (turn, gone), timeout=self._limits.queue_seconds, return_when=asyncio.FIRST_COMPLETED
            )
            given = turn.done() and not gone.done()
        finally:
            if not given and not turn.cancel():
                self._turns.release()
        if gone.done():
            raise ClientGone
        if not given:
            raise RefusedError(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"the network had no time within {self._limits.queue_seconds:g} seconds; try again later",
                {"Retry-After": _RETRY_SECONDS},
            )

    def _run(self, data: bytes, threshold: float) -> dict[str, Any]:
        header, most = checked_header(data, _BODY_NAME), self._limits.max_pixels
        if header.height * header.width > most:
            raise RefusedError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the image has {header.width} x {header.height} pixels, more than the {megapixels(most)} "
                "that this server takes; send a smaller one",
            )
        image = decode_image(data, _BODY_NAME, max_pixels=most)
        return self._detector(image, channel_order="rgb").filter(threshold).to_json()

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        """Take one of the places that there are, before the body is read, so that memory is bounded too."""
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                await self._places.acquire()
        except TimeoutError:
            raise RefusedError(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"the server is busy with {self._in_hand} images, which is all it takes; try again soon",
                {"Retry-After": _RETRY_SECONDS},
            ) from None
        self._in_hand += 1
        try:
            yield
        finally:
            self._in_hand -= 1
            self._places.release()


def _guarded(app: App) -> App:
    """Refuse what no endpoint has to see, and end what is cut off when the server stops without a word."""

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        exchange = Exchange(receive, send)
        scope = {**scope, "path": path_of(scope), _EXCHANGE: exchange}
        try:
            check_head(scope)
            _check_crowd(scope)
            await app(scope, exchange.receive, exchange.send)
        except RefusedError as error:
            await _refusal(error)(scope, exchange.receive, exchange.send)
        except asyncio.CancelledError:  # the time to end in has passed
            if not exchange.answered:
                exchange.body_read = True  # no time to wait for what is still on its way
                sentence = "the server is stopping; send the image again"
                await _refusal(RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, sentence))(scope, receive, send)

    return guarded


def _check_crowd(scope: Any) -> None:
    if scope.get(CROWDED, False) and scope["path"] != _HEALTH:
        raise RefusedError(
            HTTPStatus.SERVICE_UNAVAILABLE,
            "there are too many connections to this server; close those that are idle, or try again soon",
            {"Retry-After": _RETRY_SECONDS},
        )


async def _refused(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError), "registered for it alone"
    return _refusal(error)


async def _http_error(request: Request, error: Exception) -> Response:
    """Answer Starlette's own errors: an unknown path or method."""
    from starlette.exceptions import HTTPException

    assert isinstance(error, HTTPException), "registered for it alone"
    sentence = (
        f"there is no {shown(request.method)} {shown(request.scope['path'])}; there are POST /detect, with "
        "an image as the body, and GET /health"
    )
    return _refusal(RefusedError(HTTPStatus(error.status_code), sentence, dict(error.headers or {})))


async def _unexpected(request: Request, _error: Exception) -> Response:
    """Answer without details; Starlette raises the error again, so that only the log has its traceback."""
    sentence = f"the server failed at {shown(request.scope['path'])}; its log says why"
    return _json({"error": sentence}, HTTPStatus.INTERNAL_SERVER_ERROR)


def _refusal(error: RefusedError) -> Response:
    """Answer with the sentence, and close the connection if a body is still on its way."""
    from starlette.responses import JSONResponse

    class Refusal(JSONResponse):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            exchange: Exchange = scope[_EXCHANGE]
            if exchange.body_read:
                await super().__call__(scope, receive, send)
                return
            self.headers["Connection"] = "close"
            start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            await send(start)
            await send({"type": "http.response.body", "body": self.body, "more_body": True})
            await exchange.discard_body(_LINGER_SECONDS)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    return Refusal({"error": error.sentence}, status_code=int(error.status), headers=error.headers)


def _json(content: object, status: int = HTTPStatus.OK) -> Response:
    from starlette.responses import JSONResponse

    return JSONResponse(content, status_code=int(status))
