"""How answers and refusals are sent.  Starlette is imported when the first is made."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from asag_deploy.serving.endpoints import known_path, listed
from asag_deploy.serving.exchange import exchange_of
from asag_deploy.serving.limits import RefusedError
from asag_deploy.serving.texts import shown

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

_LINGER_SECONDS = 2.0


def as_json(content: object, status: int = HTTPStatus.OK) -> Response:
    """Answer with JSON."""
    from starlette.responses import JSONResponse

    return JSONResponse(content, status_code=int(status))


def as_bytes(content: bytes, headers: dict[str, str]) -> Response:
    """Answer with what has been written already."""
    from starlette.responses import Response

    return Response(content, headers=headers)


def refusal(error: RefusedError) -> Response:
    """Answer with the sentence, and close the connection if a body is still on its way."""
    from starlette.responses import JSONResponse

    class Refusal(JSONResponse):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            exchange = exchange_of(scope)
            exchange.refused = error
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


async def refused(_request: Request, error: Exception) -> Response:
    """Answer a request that was refused."""
    assert isinstance(error, RefusedError), "registered for it alone"
    return refusal(error)


async def gone(request: Request, _error: Exception) -> Response:
    """Answer a client that has gone, as something has to be answered; nobody reads it."""
    exchange_of(request.scope).client_gone = True
    return as_json({"error": "the client went away"}, HTTPStatus.BAD_REQUEST)


async def http_error(request: Request, error: Exception) -> Response:
    """Answer Starlette's own errors: an unknown path or method."""
    from starlette.exceptions import HTTPException

    assert isinstance(error, HTTPException), "registered for it alone"
    exchange = exchange_of(request.scope)
    exchange.endpoint = known_path(request.scope["path"]) or exchange.endpoint  # by another method
    sentence = f"there is no {shown(request.method)} {shown(request.scope['path'])}; there are {listed()}"
    return refusal(RefusedError(HTTPStatus(error.status_code), sentence, dict(error.headers or {})))


async def unexpected(request: Request, _error: Exception) -> Response:
    """Answer without details; Starlette raises the error again, so that only the log has its traceback."""
    sentence = f"the server failed at {shown(request.scope['path'])}; its log says why"
    exchange_of(request.scope).refused = RefusedError(HTTPStatus.INTERNAL_SERVER_ERROR, sentence)
    return as_json({"error": sentence}, HTTPStatus.INTERNAL_SERVER_ERROR)
