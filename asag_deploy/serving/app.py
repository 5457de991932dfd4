"""What the server answers at each of its `endpoints`, and what every request goes through.

Starlette is imported when the application is made, so that this module costs nothing where nobody serves.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from asag_deploy._version import __version__
from asag_deploy.bundle.manifest import Level, Mode
from asag_deploy.detections import Detections
from asag_deploy.errors import AsagError, ConfigError, ImageError
from asag_deploy.extras import missing
from asag_deploy.serving import access_log, answers, openapi, protocol
from asag_deploy.serving.batching import Batching
from asag_deploy.serving.endpoints import ENDPOINTS, OF_CROWD, Endpoint
from asag_deploy.serving.exchange import EXCHANGE, Exchange, Outcome, exchange_of
from asag_deploy.serving.forms import form_of
from asag_deploy.serving.limits import FRAME_BYTES, Limits, RefusedError, reason_of, unavailable
from asag_deploy.serving.metrics import Metrics
from asag_deploy.serving.options import Asked, Deadline, Defaults, read_asked
from asag_deploy.serving.requests import (
    ClientGone,
    body_of,
    check_head,
    check_kind,
    is_form,
    path_of,
    pieces_of,
)
from asag_deploy.serving.service import ImageFile, ServedDetector, Service
from asag_deploy.serving.tensors import HEADER_LENGTH, InferRequest, read_request, write_response
from asag_deploy.timing import since

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

CROWDED = "asag.crowded"
"""The entry of a request's scope that says that there are too many connections."""
UNREADABLE = "asag.unreadable"
"""The entry of a request's scope that has the refusal by which its connection has answered, because what came
was no HTTP, while the application was at the request."""

_log = logging.getLogger("asag_deploy.serving")
_ALONE = Batching()
Asgi = Callable[[Any, Any, Any], Awaitable[None]]
"""An ASGI application."""


def check_packages() -> None:
    """Raise ConfigError, before a bundle is loaded, if a package that serving needs is missing."""
    try:
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401  # for the first form
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(missing(error, "asag-serve", purpose="serving")) from None


def make_app(
    detector: ServedDetector,
    limits: Limits,
    *,
    backend: str,
    threshold: float,
    deadline_ms: float | None = None,
    max_detections: int | None = None,
    mode: Mode | None = None,
    max_level: Level | None = None,
    anchor_cap: int | None = None,
    model_name: str | None = None,
    bundle: str = "",
    batching: Batching = _ALONE,
    warm_up: bool = False,
    log: access_log.LineSink | None = None,
) -> App:
    """Make the ASGI application around a loaded detector.

    backend: what `/health` says runs the network; threshold, deadline_ms, max_detections: the least
    confidence (0 to 1), the milliseconds from a request's arrival, and the most detections, where a request
    names none; mode, max_level, anchor_cap: what the detector was loaded for, if that was asked for, as the
    OpenAPI document says; model_name: the model's in the Open Inference Protocol, None for the variant;
    bundle: what tells the bundle from others, for the metrics; batching: of images of several requests;
    warm_up: detect once before it is ready; log: what takes a line for each request.

    Raises ConfigError for a value that makes no sense, or if a package that serving needs is missing.
    """
    defaults = Defaults(
        threshold=threshold,
        deadline_ms=deadline_ms,
        max_detections=max_detections,
        mode=mode,
        max_level=max_level,
        anchor_cap=anchor_cap,
    )
    check_packages()
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.routing import Route

    metrics = Metrics(detector.manifest, backend=backend, bundle=bundle, threshold=threshold)
    service = Service(detector, limits, metrics, batching=batching, warm_up=warm_up)
    state = _State()
    handlers = Handlers(
        service,
        limits,
        metrics,
        model=protocol.Model(model_name, detector.manifest),
        defaults=defaults,
        backend=backend,
        state=state,
    )
    inner = Starlette(
        routes=[
            Route(endpoint.path, _handling(endpoint, handlers), methods=[endpoint.method])
            for endpoint in ENDPOINTS
        ],
        exception_handlers={
            HTTPException: answers.http_error,
            RefusedError: answers.refused,
            ClientGone: answers.gone,
            Exception: answers.unexpected,
        },
        lifespan=handlers.lifespan,
    )
    inner.router.redirect_slashes = False
    return App(inner, metrics, state, log)


def _handling(endpoint: Endpoint, handlers: Handlers) -> Callable[[Request], Awaitable[Response]]:
    handler: Callable[[Request], Awaitable[Response]] = getattr(handlers, endpoint.handler)

    async def handle(request: Request) -> Response:
        exchange_of(request.scope).endpoint = endpoint.path
        return await handler(request)

    return handle


class _State:
    """What application and server tell each other."""

    def __init__(self) -> None:
        self.is_stopping: Callable[[], bool] = lambda: False


class Handlers:
    """The endpoints, by the names that `ENDPOINTS` has for them."""

    def __init__(
        self,
        service: Service,
        limits: Limits,
        metrics: Metrics,
        *,
        model: protocol.Model,
        defaults: Defaults,
        backend: str,
        state: _State,
    ) -> None:
        self._service, self._limits, self._metrics = service, limits, metrics
        self._model, self._defaults, self._backend = model, defaults, backend
        self._state = state
        self._manifest = service.manifest
        metrics.ready.set_function(lambda: float(self._is_ready()))

    @asynccontextmanager
    async def lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        """Let go of what the service holds with the server."""
        async with self._service.running():
            yield

    async def health(self, _request: Request) -> Response:
        """Answer 200 as long as the server listens, also when it is full."""
        return answers.as_json(
            {
                "status": "ok",
                "version": __version__,
                "variant": self._manifest.variant,
                "trained": self._manifest.trained,
                "classes": len(self._manifest.categories),
                "backend": self._backend,
                "requests": self._service.in_hand,
            }
        )

    async def metrics(self, _request: Request) -> Response:
        """Answer with the figures, also when the server is full."""
        text, kind = self._metrics.text()
        return answers.as_bytes(text, {"Content-Type": kind})

    async def openapi(self, _request: Request) -> Response:
        """Answer with the document of all endpoints."""
        return answers.as_json(openapi.document(self._manifest, self._limits, self._defaults))

    async def detect(self, request: Request) -> Response:
        """Detect in the image file of the body or of the form in it; answer with its `Detections.to_json`."""
        exchange = exchange_of(request.scope)
        query = request.query_params.multi_items()
        asked = read_asked(query, self._manifest, self._defaults)
        deadline = Deadline(exchange.arrived, asked.deadline_ms)
        async with self._service.place(deadline):
            if is_form(request):
                form = await form_of(request, self._limits, deadline)
                file = ImageFile(form.image, "file of the form")
                asked = read_asked([*query, *form.fields], self._manifest, self._defaults)
                deadline = Deadline(exchange.arrived, asked.deadline_ms)
            else:
                file = ImageFile(await body_of(request, self._limits, deadline))
            (found,) = await self._detected(request, [file], asked, deadline)
        return answers.as_json(found.to_json())

    async def v2_server(self, _request: Request) -> Response:
        """Say what the server is."""
        return answers.as_json(protocol.SERVER)

    async def v2_live(self, _request: Request) -> Response:
        """Answer 200 as long as the server listens."""
        return answers.as_json({"live": True})

    async def v2_ready(self, _request: Request) -> Response:
        """Answer 200 while requests may be sent here: not before it is warm, not once it is stopping.

        A full queue is no reason to be unready: it passes sooner than whoever asks comes again, and one
        server after the other taken away would leave the load to fewer.
        """
        return self._ready({})

    async def v2_model(self, request: Request) -> Response:
        """Describe the model."""
        self._model.check(request.path_params)
        return answers.as_json(self._model.metadata())

    async def v2_model_ready(self, request: Request) -> Response:
        """Answer 200 while the model may be asked."""
        self._model.check(request.path_params)
        return self._ready({"name": self._model.name})

    async def v2_infer(self, request: Request) -> Response:
        """Detect in the image files of an inference request; answer with tensors."""
        self._model.check(request.path_params)
        exchange = exchange_of(request.scope)
        no_deadline = Deadline(exchange.arrived, None)  # what the request asks for stands in its body
        async with self._service.place(no_deadline):
            asks = await self._infer_request(request, no_deadline)
            options = protocol.with_deadline(asks.options)
            beside = f", {protocol.TIMEOUT}, binary_data_output"
            asked = read_asked(options, self._manifest, self._defaults, beside=beside)
            name = protocol.deadline_name(asks.options)
            deadline = Deadline(exchange.arrived, asked.deadline_ms, name=name)
            files = [ImageFile(*named) for named in protocol.named(asks.images)]
            found = await self._detected(request, files, asked, deadline)
        head = self._model.head(asks.id)
        return answers.as_bytes(*write_response(head, protocol.tensors_of(found), asks.outputs))

    async def _infer_request(self, request: Request, deadline: Deadline) -> InferRequest:
        """Read the body of an inference request; what it is read from is let go of."""
        check_kind(request, inference=True)
        data, most = bytearray(), self._limits.max_bytes + FRAME_BYTES
        async for piece in pieces_of(request, self._limits, deadline, most=most):
            data += piece
        # Megabytes of JSON would hold up everybody else's requests.
        return await asyncio.to_thread(read_request, bytes(data), request.headers.get(HEADER_LENGTH))

    async def _detected(
        self, request: Request, images: Sequence[ImageFile], asked: Asked, deadline: Deadline
    ) -> list[Detections]:
        """Detect in the images of a request; refuse it in the words of what the detector raises."""
        try:
            timed = await self._service.detect(request, images, asked, deadline)
        except ImageError as error:
            raise RefusedError(HTTPStatus.UNPROCESSABLE_ENTITY, str(error), reason="not_an_image") from None
        except ConfigError as error:
            raise RefusedError(HTTPStatus.BAD_REQUEST, str(error), reason="bad_parameter") from None
        except AsagError as error:
            _log.error("%s", error)
            raise RefusedError(
                HTTPStatus.INTERNAL_SERVER_ERROR, str(error), reason="backend_failed"
            ) from None
        found = [asked.of(one.found) for one in timed]
        exchange_of(request.scope).outcome = Outcome(
            images=tuple(timed), options=dict(asked.given), detections=sum(map(len, found))
        )
        return found

    def _is_ready(self) -> bool:
        return self._service.warm and not self._state.is_stopping()

    def _ready(self, said: dict[str, Any]) -> Response:
        reason = "the server is stopping" if self._state.is_stopping() else "the network is being tried"
        if not self._is_ready():
            return answers.as_json({**said, "ready": False, "error": reason}, HTTPStatus.SERVICE_UNAVAILABLE)
        return answers.as_json({**said, "ready": True})


class App:
    """The application as the server calls it.

    It refuses what no endpoint has to see, ends what is cut off when the server stops without a word, and
    counts and logs every request.
    """

    def __init__(self, app: Asgi, metrics: Metrics, state: _State, log: access_log.LineSink | None) -> None:
        self._app, self._metrics, self._state, self._log_lines = app, metrics, state, log
        if log is not None:
            log.lost = metrics.lost_log_lines.inc

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request, or take part in the server's beginning and end."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(scope, receive, send)
        path = path_of(scope)
        try:
            await self._answer({**scope, "path": path, EXCHANGE: exchange}, exchange)
        finally:
            if UNREADABLE in scope:
                exchange.was_answered(scope[UNREADABLE])
            seconds = since(exchange.arrived) / 1000
            self._metrics.answered(exchange, seconds)
            if self._log_lines is not None:
                self._log_lines.write(access_log.line_of(exchange, path, seconds))

    async def _answer(self, scope: dict[str, Any], exchange: Exchange) -> None:
        try:
            check_head(scope)
            _check_crowd(scope)
            await self._app(scope, exchange.receive, exchange.send)
        except RefusedError as error:
            await answers.refusal(error)(scope, exchange.receive, exchange.send)
        except asyncio.CancelledError:  # the time to end in has passed
            if not exchange.answered:
                exchange.body_read = True  # no time to wait for what is still on its way
                sentence = "the server is stopping; send the image again"
                cut_off = unavailable(sentence, "stopping")
                await answers.refusal(cut_off)(scope, exchange.receive, exchange.send)

    def is_stopping_when(self, stopping: Callable[[], bool]) -> None:
        """Be told how to see that the server is about to stop."""
        self._state.is_stopping = stopping

    def turned_away(self, status: HTTPStatus, sentence: str) -> None:
        """Count and log a connection that was answered before there was a request."""
        self._metrics.turned_away(int(status), reason_of(status))
        if self._log_lines is not None:
            self._log_lines.write(access_log.turned_away(int(status), reason_of(status), sentence))


def _check_crowd(scope: dict[str, Any]) -> None:
    if scope.get(CROWDED, False) and scope["path"] not in OF_CROWD:
        raise unavailable(
            "there are too many connections to this server; close those that are idle, or try again soon",
            "too_many_connections",
        )
