"""Connections that ask for no more than a server has: of heads, of idle time, of time to read the answer.

What uvicorn leaves open, HTTP over h11, is bounded here; bodies and images are the application's.
Uvicorn is imported when the class is made, so that this module costs nothing where nobody serves.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from asag_deploy.serving.app import CROWDED, UNREADABLE
from asag_deploy.serving.limits import MOST_HEADER_BYTES, RETRY_SECONDS, Limits, RefusedError

if TYPE_CHECKING:
    import asyncio

    from uvicorn.protocols.http.h11_impl import H11Protocol as _Base
else:
    _Base = object

BEYOND = 32
"""Connections over the limit that are still listened to, as one of them may ask for `/health`."""
_SENTENCES = {
    HTTPStatus.REQUEST_TIMEOUT: "the head of the request did not arrive in time; send it again",
    HTTPStatus.REQUEST_URI_TOO_LONG: "the first line of the request is too long",
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: f"the headers are longer than {MOST_HEADER_BYTES} bytes",
    HTTPStatus.SERVICE_UNAVAILABLE: "there are too many connections to this server; try again soon",
}
_NO_REQUEST = "this is no HTTP request that can be read"

TurnedAway = Callable[[HTTPStatus, str], None]
"""Is told status and sentence of what was answered without the application."""


def connection_class(limits: Limits, turned_away: TurnedAway) -> type[asyncio.Protocol]:
    """Make the class of a server's connections; raises ImportError if uvicorn is missing."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    told = {"limits": limits, "turned_away": staticmethod(turned_away)}
    return type("Connection", (_Answering, H11Protocol), told)


class _Timed(_Base):
    """A connection that is cut off when its client takes too long to send a head, or to read an answer."""

    limits: Limits
    _deadline: asyncio.TimerHandle | None = None
    """Cuts off a head that does not arrive."""
    _unread: asyncio.TimerHandle | None = None
    """Cuts off an answer that is not read."""

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel("_deadline")
        self._cancel("_unread")
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        import h11

        if self.conn.their_state is h11.MUST_CLOSE:  # nothing is asked any more; the answer still comes
            return
        super().data_received(data)
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            if self._deadline is None:
                self._expect_head()
        else:
            self._cancel("_deadline")

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._cancel("_unread")
        self._expect_reading()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(self.limits.answer_seconds, self._cut_if_unread)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel("_unread")

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._expect_reading()

    def _expect_head(self) -> None:
        self._cancel("_deadline")
        self._deadline = self.loop.call_later(self.limits.head_seconds, self._no_head)

    def _no_head(self) -> None:
        raise NotImplementedError

    def _expect_reading(self) -> None:
        """Cut a connection whose client does not read what is still to be sent."""
        if self.transport.get_write_buffer_size() and self._unread is None:
            self._unread = self.loop.call_later(self.limits.answer_seconds, self._cut_if_unread)

    def _cut_if_unread(self) -> None:
        self._unread = None
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def _cancel(self, name: str) -> None:
        timer: asyncio.TimerHandle | None = getattr(self, name)
        if timer is not None:
            timer.cancel()
            setattr(self, name, None)


class _Answering(_Timed):
    """A connection that answers what the application never sees."""

    turned_away: TurnedAway

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        crowd = len(self.connections)
        if crowd > self.limits.connections + BEYOND:
            self._turn_away(HTTPStatus.SERVICE_UNAVAILABLE)
            return
        if crowd > self.limits.connections:
            self._mark_crowded()
        self._expect_head()

    def send_400_response(self, msg: str) -> None:
        """Answer what h11 does not understand; it says itself which status that deserves."""
        error = sys.exc_info()[1]
        hint = getattr(error, "error_status_hint", HTTPStatus.BAD_REQUEST)
        if hint == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE and b"\n" not in self.conn.trailing_data[0]:
            hint = HTTPStatus.REQUEST_URI_TOO_LONG
        self._turn_away(HTTPStatus(hint))

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: whoever wants to speak something else is answered as usual."""

    def _mark_crowded(self) -> None:
        app = self.app

        async def crowded(scope: Any, receive: Any, send: Any) -> None:
            scope[CROWDED] = True  # no copy: what is said to the request's scope later has to be seen
            await app(scope, receive, send)

        self.app = crowded

    def _no_head(self) -> None:
        self._deadline = None
        if self.conn.trailing_data[0]:
            self._turn_away(HTTPStatus.REQUEST_TIMEOUT)
        else:
            self.transport.close()

    def _turn_away(self, status: HTTPStatus) -> None:
        """Answer without the application, and close; not if an answer has begun."""
        import h11

        cycle = self.cycle
        under_way = cycle is not None and not cycle.response_complete
        begun = under_way and cycle.response_started
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not begun:
            sentence = _SENTENCES.get(status, _NO_REQUEST)
            body = json.dumps({"error": sentence}).encode()
            again = status == HTTPStatus.SERVICE_UNAVAILABLE
            retry = f"retry-after: {RETRY_SECONDS}\r\n" if again else ""
            self.transport.write(
                f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n{retry}"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode()
                + body
            )
            if under_way:
                # The application, which counts its requests, is still at this one: it has to end there.
                scope: Any = cycle.scope
                scope[UNREADABLE] = RefusedError(status, sentence)
                cycle.disconnected = True
                cycle.message_event.set()
            else:
                self.turned_away(status, sentence)
        self.transport.close()
        self._expect_reading()
