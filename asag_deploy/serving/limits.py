"""What one server takes on, and how it refuses the rest."""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus

from asag_deploy.errors import ConfigError

MOST_HEADER_BYTES = 16 * 2**10
"""All headers of a request together; more are refused with 431."""
MOST_HEADERS = 100
"""Headers of a request; more are refused with 431."""
FRAME_BYTES = 64 * 2**10
"""What a body may have beside its images: a form's other fields, the JSON of an inference request."""
RETRY_SECONDS = "1"
LONGEST_TARGET = 2048
"""Bytes of a request's path and parameters; a longer one is refused with 414."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one server takes on.  Raises ConfigError for values that make no sense."""

    requests: int = 1
    """Images in the network at the same time; the backend's threads are divided among them."""
    queue: int = 16
    """Requests that may wait beside those; one more is refused with 503."""
    connections: int = 256
    """Open connections; on those beyond, all is refused with 503 but what watches the server (`/health`)."""
    max_bytes: int = 20 * 2**20
    """Largest image; more is refused with 413, and so is a body that is `FRAME_BYTES` larger still."""
    max_pixels: int = 100_000_000
    """Pixels of the largest image; one with more is refused with 413 before it is decoded."""
    head_seconds: float = 10.0
    """How long a client may take to send the head of its request; then 408."""
    body_seconds: float = 30.0
    """How long a client may take to send its image; then 408."""
    queue_seconds: float = 30.0
    """How long a request may wait for the network; then 503."""
    answer_seconds: float = 30.0
    """How long a client may take to read its answer; then the connection is cut."""

    def __post_init__(self) -> None:
        _check("--requests", self.requests, 1)
        _check("--queue", self.queue, 0)
        _check("--connections", self.connections, 1)
        _check("max_bytes", self.max_bytes, 1)
        _check("max_pixels", self.max_pixels, 1)
        for name in ("head", "body", "queue", "answer"):
            seconds = getattr(self, f"{name}_seconds")
            if not seconds > 0:
                raise ConfigError(f"--{name}-seconds is {seconds:g}; it must be more than 0")


class RefusedError(Exception):
    """A request that is answered with a status and a sentence.

    reason: one word for it, of a few dozen, by which refusals are counted; None for that of the status.
    """

    def __init__(
        self,
        status: HTTPStatus,
        sentence: str,
        headers: dict[str, str] | None = None,
        *,
        reason: str | None = None,
    ) -> None:
        super().__init__(status, sentence, headers)
        self.status = status
        self.sentence = sentence
        self.headers = headers
        self.reason = reason_of(status) if reason is None else reason

    def __str__(self) -> str:
        return self.sentence


def unavailable(sentence: str, reason: str) -> RefusedError:
    """Make the refusal of a request that may be sent again soon."""
    return RefusedError(
        HTTPStatus.SERVICE_UNAVAILABLE, sentence, {"Retry-After": RETRY_SECONDS}, reason=reason
    )


def reason_of(status: HTTPStatus) -> str:
    """Return the word by which refusals of a status are counted, where there is none of their own."""
    return _RENAMED.get(status.value, status.name.lower())


_RENAMED = {413: "content_too_large", 414: "uri_too_long", 422: "unprocessable_content"}
"""Statuses whose name Python 3.13 has changed: figures are called the same on every Python."""


def _check(option: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{option} is {value}; it must be at least {least}")
