"""HTTP as clients hear it: uvicorn's, but what is no HTTP is answered like every other mistake."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uvicorn.protocols.http.h11_impl import H11Protocol

_SENTENCE = "what arrived is not an HTTP request that can be understood; send one as `curl` does"


def protocol() -> type[H11Protocol]:
    """Return the protocol of a connection, which refuses what is no HTTP with 400 and a sentence in JSON."""
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Protocol(H11Protocol):
        def send_400_response(self, msg: str) -> None:
            body = json.dumps({"error": _SENTENCE}).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            status = HTTPStatus.BAD_REQUEST
            # In the middle of another answer there is no place for this one.
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                answer = h11.Response(status_code=status, headers=headers, reason=status.phrase)
                for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
                    self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

    return Protocol
