"""A request and its answer, how far they have come, and by which names they can be found again.

A request has an id, its own (`X-Request-Id`) or one that is made here, and may belong to a trace
(https://www.w3.org/TR/trace-context/); both come back with the answer and stand in the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

from asag_deploy.detections import Detections
from asag_deploy.serving.limits import RefusedError

EXCHANGE = "asag.exchange"
"""The entry of a request's scope that holds its `Exchange`."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:+/=@~-]{1,128}")
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_NO_VERSION, _FIRST_VERSION = "ff", "00"


class Trace(NamedTuple):
    """The trace that a request belongs to."""

    trace_id: str
    parent: str
    """The caller's span."""
    span: str
    """The span of this request."""
    flags: str

    @property
    def header(self) -> str:
        """What `traceparent` says of this request."""
        return f"{_FIRST_VERSION}-{self.trace_id}-{self.span}-{self.flags}"


class Timed(NamedTuple):
    """What was found in one image of a request, and how long its turn was waited for."""

    found: Detections
    queue_ms: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a request, for the log."""

    images: tuple[Timed, ...]
    options: dict[str, Any]
    """What it asked for, by name."""
    detections: int
    """How many the answer has."""


def request_id_of(headers: list[tuple[bytes, bytes]]) -> str:
    """Return the id that a request brings, if it is short and of harmless characters, or make one."""
    given = _header(headers, b"x-request-id")
    return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)


def trace_of(headers: list[tuple[bytes, bytes]]) -> Trace | None:
    """Return the trace that a request says it belongs to; None if it says nothing that can be read."""
    match = _TRACEPARENT.fullmatch(_header(headers, b"traceparent"))
    if match is None:
        return None
    version, trace_id, parent, flags, more = match.groups()
    if version == _NO_VERSION or (version == _FIRST_VERSION and more) or not int(trace_id, 16):
        return None
    return Trace(trace_id, parent, secrets.token_hex(8), flags) if int(parent, 16) else None


class Exchange:
    """A request and its answer, as an application receives and sends them."""

    def __init__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        self._receive, self._send = receive, send
        self.arrived = time.perf_counter()
        """When its head had been read."""
        self.time = time.time()
        """The same by the clock, in seconds since 1970."""
        self.method: str = scope["method"]
        self.request_id = request_id_of(scope["headers"])
        self.trace = trace_of(scope["headers"])
        self.endpoint = "other"
        """The path of the endpoint that answers, as the OpenAPI document has it."""
        self.body_read = False
        """Whether the body has come to its end."""
        self.answered = False
        """Whether an answer has begun."""
        self.status = 0
        """Of the answer; 0 if there was none."""
        self.received_bytes = 0
        self.sent_bytes = 0
        self.refused: RefusedError | None = None
        self.client_gone = False
        """Whether the client has gone before it was answered."""
        self.outcome: Outcome | None = None

    async def receive(self) -> Any:
        """Receive the next message."""
        message = await self._receive()
        self.received_bytes += len(message.get("body", b""))
        self.body_read = message["type"] == "http.disconnect" or not message.get("more_body", False)
        return message

    async def send(self, message: Any) -> None:
        """Send the next message; the head says which request it answers."""
        self.answered = True
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = [(b"x-request-id", self.request_id.encode())]
            if self.trace is not None:
                own.append((b"traceparent", self.trace.header.encode()))
            message = {**message, "headers": [*message.get("headers", ()), *own]}
        self.sent_bytes += len(message.get("body", b""))
        await self._send(message)

    def was_answered(self, refusal: RefusedError) -> None:
        """Take note that the connection has answered, whatever the application did."""
        self.client_gone, self.refused, self.status = False, refusal, int(refusal.status)

    async def discard_body(self, seconds: float) -> None:
        """Let a client end what it is sending, and throw it away; for so long at most.

        Closing the connection at once would make the answer, which it has not read yet, disappear.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self.body_read:
                    await self.receive()


def exchange_of(scope: Any) -> Exchange:
    """Return the exchange that a request belongs to."""
    exchange = scope[EXCHANGE]
    assert isinstance(exchange, Exchange), "every request comes through the guard, which makes it"
    return exchange


def _header(headers: list[tuple[bytes, bytes]], wanted: bytes) -> str:
    """Return the value of a header that is there once; else nothing."""
    values = [value for name, value in headers if name.lower() == wanted]
    return values[0].decode("latin-1").strip() if len(values) == 1 else ""
