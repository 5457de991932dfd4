"""What the server answers: `POST /detect` and `GET /health`, everything as JSON.

Starlette is imported when the application is made, so that this module costs nothing where nobody serves.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Protocol

from asag_deploy._version import __version__
from asag_deploy.errors import AsagError, ConfigError, ImageError, one_line
from asag_deploy.images.reading import decode_image

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse

    from asag_deploy.bundle.manifest import Manifest
    from asag_deploy.detections import Detections
    from asag_deploy.images.reading import RgbImage

_log = logging.getLogger("asag_deploy.serving")
_BODY_NAME = "request body"
_RETRY_SECONDS = "1"
_FORM = "multipart/"


class ServedDetector(Protocol):
    """What is asked of a detector: `asag_deploy.Detector`, or what stands in for it."""

    @property
    def manifest(self) -> Manifest:
        """What the bundle says about itself."""
        ...

    def __call__(self, images: RgbImage, *, channel_order: Any) -> Detections:
        """Detect in one image."""
        ...


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one server takes on.  Raises ConfigError for values that make no sense."""

    requests: int = 1
    """Images in the network at the same time; the backend's threads are divided among them."""
    queue: int = 16
    """Requests that may wait beside those; one more is refused with 503."""
    max_bytes: int = 20 * 2**20
    """Largest request body; more is refused with 413."""
    body_seconds: float = 30.0
    """How long a client may take to send its image; then 408."""

    def __post_init__(self) -> None:
        if self.requests < 1:
            raise ConfigError(f"--requests is {self.requests}; it must be at least 1")
        if self.queue < 0:
            raise ConfigError(f"--queue is {self.queue}; it must be at least 0")
        if self.max_bytes < 1:
            raise ConfigError(f"max_bytes is {self.max_bytes}; it must be at least 1")
        if not self.body_seconds > 0:
            raise ConfigError(f"--body-seconds is {self.body_seconds:g}; it must be more than 0")


class RefusedError(Exception):
    """A request that is answered with a status and a sentence."""

    def __init__(self, status: HTTPStatus, sentence: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(one_line(sentence))
        self.status = status
        self.headers = headers


def make_app(detector: ServedDetector, limits: Limits, *, backend: str, threshold: float) -> Starlette:
    """Make the ASGI application around a loaded detector.

    `backend` is what `/health` says runs the network; `threshold` the least confidence (0 to 1) where a
    request names none.  Raises ConfigError for a threshold that makes no sense, or if Starlette is missing.
    """
    _check_threshold(threshold)
    try:
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.routing import Route
    except ImportError:
        raise ConfigError(
            "serving needs the packages starlette and uvicorn: pip install 'asag-deploy[serve]'"
        ) from None
    service = _Service(detector, limits, backend, threshold)
    return Starlette(
        routes=[
            Route("/detect", service.detect, methods=["POST"]),
            Route("/health", service.health, methods=["GET"]),
        ],
        exception_handlers={
            HTTPException: _http_error,
            RefusedError: _refused,
            Exception: _unexpected,
        },
        lifespan=service.lifespan,
    )


class _Service:
    """The two endpoints, and the requests they have in hand."""

    def __init__(self, detector: ServedDetector, limits: Limits, backend: str, threshold: float) -> None:
        self._detector = detector
        self._limits = limits
        self._backend = backend
        self._threshold = threshold
        self._in_hand = 0  # touched by the event loop's thread alone
        self._pool = ThreadPoolExecutor(limits.requests, thread_name_prefix="asag-serve")

    @asynccontextmanager
    async def lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        """Let go of the threads with the server; one that is still detecting ends once it has."""
        try:
            yield
        finally:
            self._pool.shutdown(wait=False, cancel_futures=True)

    async def health(self, _request: Request) -> JSONResponse:
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

    async def detect(self, request: Request) -> JSONResponse:
        """Detect in the image file that the body is; answer with its `Detections.to_json`."""
        threshold = _threshold_of(request, self._threshold)
        with self._place():
            data = await self._body(request)
            work = asyncio.get_running_loop().run_in_executor(self._pool, self._run, data, threshold)
            try:
                return _json(await work)
            except ImageError as error:
                raise RefusedError(HTTPStatus.UNPROCESSABLE_ENTITY, str(error)) from None
            except AsagError as error:
                _log.error("%s", error)
                raise RefusedError(HTTPStatus.INTERNAL_SERVER_ERROR, str(error)) from None

    def _run(self, data: bytes, threshold: float) -> dict[str, Any]:
        image = decode_image(data, _BODY_NAME)
        return self._detector(image, channel_order="rgb").filter(threshold).to_json()

    @contextmanager
    def _place(self) -> Iterator[None]:
        """Take one of the places that there are, before the body is read, so that memory is bounded too."""
        places = self._limits.requests + self._limits.queue
        if self._in_hand >= places:
            raise RefusedError(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"the server is busy with {self._in_hand} images, which is all it takes; try again soon",
                {"Retry-After": _RETRY_SECONDS},
            )
        self._in_hand += 1
        try:
            yield
        finally:
            self._in_hand -= 1

    async def _body(self, request: Request) -> bytes:
        """Read the whole body, whatever type it claims: curl calls every file a form.

        Refuses multipart forms, and more bytes or seconds than the limits allow.
        """
        from starlette.requests import ClientDisconnect

        kind = request.headers.get("content-type", "").lower()
        if kind.startswith(_FORM):
            raise RefusedError(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
                f"the request is a form ({kind.partition(';')[0]}); send the image file itself as the body, "
                "as `curl --data-binary @photo.jpg` does",
            )
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > self._limits.max_bytes:
            raise self._too_large()
        data = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                async for chunk in request.stream():
                    data += chunk
                    if len(data) > self._limits.max_bytes:
                        raise self._too_large()
        except TimeoutError:
            raise RefusedError(
                HTTPStatus.REQUEST_TIMEOUT,
                f"the image did not arrive within {self._limits.body_seconds:g} seconds; send it again",
            ) from None
        except ClientDisconnect:  # nobody reads the answer
            raise RefusedError(
                HTTPStatus.BAD_REQUEST, "the client went away before its image arrived"
            ) from None
        if not data:
            raise RefusedError(
                HTTPStatus.BAD_REQUEST, "the request has no body; send an image file as its body"
            )
        return bytes(data)

    def _too_large(self) -> RefusedError:
        return RefusedError(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"the image is larger than {self._limits.max_bytes / 2**20:g} MiB, which is all this server "
            "takes; send a smaller one",
            {"Connection": "close"},  # what is still on its way is not to be read
        )


def _threshold_of(request: Request, default: float) -> float:
    text = request.query_params.get("threshold")
    unknown = sorted(set(request.query_params) - {"threshold"})
    if unknown:
        raise RefusedError(
            HTTPStatus.BAD_REQUEST, f"unknown parameter '{unknown[0]}'; the only one there is is threshold"
        )
    if text is None:
        return default
    try:
        value = float(text)
        _check_threshold(value)
    except ValueError:  # a ConfigError is one too
        raise RefusedError(
            HTTPStatus.BAD_REQUEST, f"threshold is '{text}', which is not a number between 0 and 1"
        ) from None
    return value


def _check_threshold(threshold: float) -> None:
    if not 0 <= threshold <= 1:
        raise ConfigError(f"--threshold is {threshold:g}, which is not between 0 and 1")


async def _refused(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RefusedError), "registered for it alone"
    return _json({"error": str(error)}, error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    """Answer Starlette's own errors: an unknown path or method."""
    from starlette.exceptions import HTTPException

    assert isinstance(error, HTTPException), "registered for it alone"
    sentence = one_line(
        f"there is no {request.method} {request.url.path}; there are POST /detect, with an image as "
        "the body, and GET /health"
    )
    return _json({"error": sentence}, error.status_code, dict(error.headers or {}))


async def _unexpected(request: Request, _error: Exception) -> JSONResponse:
    """Answer without details; Starlette raises the error again, so that only the log has its traceback."""
    sentence = f"the server failed at {request.url.path}; its log says why"
    return _json({"error": sentence}, HTTPStatus.INTERNAL_SERVER_ERROR)


def _json(
    content: object, status: int = HTTPStatus.OK, headers: dict[str, str] | None = None
) -> JSONResponse:
    from starlette.responses import JSONResponse

    return JSONResponse(content, status_code=int(status), headers=headers)
