"""One line of JSON for every request, written by a thread of its own.

Whoever answers requests never waits for a disk: a line is put into a queue, and dropped where that is full.
What cannot be written is counted, and the server goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from asag_deploy.errors import ConfigError
from asag_deploy.serving.exchange import Exchange
from asag_deploy.serving.limits import LONGEST_TARGET
from asag_deploy.serving.texts import shown

STDERR = "-"
_STDERR_DESCRIPTOR = 2
_WAITING_LINES = 10_000
_CLIENT_GONE = 499
_LONGEST_PATH = 2 * LONGEST_TARGET
"""Characters: no path that is answered is longer, also with what cannot be printed written as escapes."""
_END = None
_PATIENCE_S = 2.0
_LOOK_AGAIN_S = 1.0
"""How often it is seen whether the file has been moved away, as programs do that keep logs short."""


class LineSink(Protocol):
    """What takes the lines: an `AccessLog`."""

    lost: Callable[[int], None] | None
    """Is told how many lines could not be written, perhaps from another thread."""

    def write(self, line: dict[str, Any]) -> None:
        """Take a line."""
        ...

    def close(self) -> None:
        """Write what has been taken."""
        ...


class AccessLog:
    """A file of lines, or stderr.

    It is appended to, unlike everything else that is written: a log has no moment at which it is complete.
    """

    def __init__(self, path: Path) -> None:
        """Open a file, `-` for stderr; raises ConfigError if it cannot be opened."""
        self._path = None if str(path) == STDERR else path
        self.lost: Callable[[int], None] | None = None
        self._descriptor = _STDERR_DESCRIPTOR if self._path is None else self._open()
        self._looked = time.monotonic()
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue(_WAITING_LINES)
        self._thread = threading.Thread(target=self._run, name="asag-access-log", daemon=True)
        self._thread.start()

    def write(self, line: dict[str, Any]) -> None:
        """Take a line; never waits."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._lose(1)

    def close(self) -> None:
        """Write what has been taken, unless that takes seconds, and let go of the file."""
        with contextlib.suppress(queue.Full):
            self._lines.put(_END, timeout=_PATIENCE_S)
        self._thread.join(_PATIENCE_S)

    def _open(self) -> int:
        assert self._path is not None, "stderr is open"
        try:
            return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigError(
                f"the access log '{self._path}' cannot be opened: {error.strerror}; name another --access-log"
            ) from None

    def _run(self) -> None:
        try:
            while (line := self._lines.get()) is not _END:
                text = json.dumps(line, ensure_ascii=True, separators=(",", ":")) + "\n"
                self._put(text.encode())
        finally:
            if self._path is not None:
                os.close(self._descriptor)

    def _put(self, data: bytes) -> None:
        try:
            self._follow()
            while data:
                data = data[os.write(self._descriptor, data) :]
        except (OSError, ConfigError):
            self._lose(1)

    def _follow(self) -> None:
        """Open the file anew if another stands in its place."""
        if self._path is None or time.monotonic() - self._looked < _LOOK_AGAIN_S:
            return
        self._looked = time.monotonic()
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(self._path.stat(), os.fstat(self._descriptor)):
                return
        fresh = self._open()
        os.close(self._descriptor)
        self._descriptor = fresh

    def _lose(self, lines: int) -> None:
        if self.lost is not None:
            self.lost(lines)


def line_of(exchange: Exchange, path: str, seconds: float) -> dict[str, Any]:
    """Describe a request that has come to its end after so many seconds."""
    line: dict[str, Any] = {
        "time": _at(exchange.time),
        "id": exchange.request_id,
        "method": shown(exchange.method),
        "path": shown(path, _LONGEST_PATH),
        "status": _CLIENT_GONE if exchange.client_gone else exchange.status,
        "ms": round(seconds * 1000, 3),
        "bytes": exchange.received_bytes,
        "sent": exchange.sent_bytes,
    }
    if exchange.trace is not None:
        line |= {
            "trace_id": exchange.trace.trace_id,
            "span_id": exchange.trace.span,
            "parent_id": exchange.trace.parent,
        }
    outcome = exchange.outcome
    if outcome is not None:
        traces = [timed.found.trace for timed in outcome.images]
        line |= {
            "images": len(traces),
            "queue_ms": round(max(timed.queue_ms for timed in outcome.images), 3),
            "exit_level": max((trace.exit_level for trace in traces), key=("P5", "P4", "P3").index),
            "stop": sorted({trace.stop.value for trace in traces}),
            "patches": sum(level.patches for trace in traces for level in trace.levels),
            "anchors": sum(trace.anchor_count for trace in traces),
            "detections": outcome.detections,
            "options": outcome.options,
        }
    if exchange.refused is not None:
        line |= {"refused": exchange.refused.reason, "error": exchange.refused.sentence}
    elif exchange.client_gone:
        line["error"] = "the client went away"
    return line


def turned_away(status: int, reason: str, sentence: str) -> dict[str, Any]:
    """Describe a connection that was answered before there was a request."""
    return {"time": _at(time.time()), "status": status, "refused": reason, "error": sentence}


def _at(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
