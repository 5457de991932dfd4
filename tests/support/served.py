"""A server in a thread of the test's process, its clients, and a detector that a test can hold up."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from asag_deploy.bundle.manifest import Manifest
from asag_deploy.serving.app import make_app
from asag_deploy.serving.limits import Limits
from asag_deploy.serving.server import bind, make_server, run
from asag_deploy.serving.service import ServedDetector
from support.detection_samples import make_detections
from support.tiny_bundle import picture, tiny_manifest

SECONDS = 20.0


class GatedDetector:
    """Finds the same things everywhere, once its gate is open, or raises what it is told to."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.running = 0
        self.most_running = 0
        self.calls = 0
        self.asked: list[dict[str, Any]] = []
        self.batches: list[int] = []
        self._lock = threading.Lock()

    @property
    def manifest(self) -> Manifest:
        return tiny_manifest()

    def __call__(self, images: Any, *, channel_order: Any = "bgr", **options: Any) -> Any:
        with self._lock:
            self.running += 1
            self.calls += 1
            self.most_running = max(self.most_running, self.running)
            self.asked.append(options)
            self.batches.append(len(images) if isinstance(images, list) else 1)
        try:
            assert self.gate.wait(SECONDS), "the test has opened the gate"
            if self.error is not None:
                raise self.error
            if isinstance(images, list):
                return [make_detections(image.shape[:2]) for image in images]
            return make_detections(images.shape[:2])
        finally:
            with self._lock:
                self.running -= 1


class Client:
    """Requests to one server, each over its own connection."""

    def __init__(self, listener: socket.socket) -> None:
        self.host, self.port = listener.getsockname()[:2]

    @classmethod
    def at(cls, line: str) -> Client:
        """The server that has said this when it began."""
        match = re.search(r"http://([\d.]+):(\d+)", line)
        assert match is not None, line
        client = Client.__new__(Client)
        client.host, client.port = match[1], int(match[2])
        return client

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, http.client.HTTPMessage]:
        status, data, answered = self.ask_plainly(method, path, body, headers)
        return status, json.loads(data), answered

    def ask_plainly(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes, http.client.HTTPMessage]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=SECONDS)
        try:
            connection.request(method, path, body=body, headers=headers or {})
            response = connection.getresponse()
            return response.status, response.read(), response.headers
        finally:
            connection.close()

    def say(self, data: bytes) -> bytes:
        """Send bytes over a connection of their own; return the beginning of the answer."""
        with socket.create_connection((self.host, self.port), timeout=SECONDS) as connection:
            connection.sendall(data)
            return connection.recv(65536)

    def leave(self, data: bytes) -> None:
        """Send bytes, and go away."""
        with socket.create_connection((self.host, self.port), timeout=SECONDS) as connection:
            connection.sendall(data)

    def detect(self, body: Any, query: str = "", **headers: str) -> tuple[int, Any]:
        status, answer, _ = self.ask("POST", f"/detect{query}", body, headers)
        return status, answer


class Served(Client):
    """A server in a thread of this process."""

    def __init__(
        self,
        detector: ServedDetector,
        limits: Limits,
        listener: socket.socket,
        *,
        grace_seconds: int,
        drain_seconds: float,
        **settings: Any,
    ) -> None:
        super().__init__(listener)
        app = make_app(detector, limits, **{"backend": "onnxruntime", "threshold": 0.3, **settings})
        self.server = make_server(app, limits, grace_seconds=grace_seconds, drain_seconds=drain_seconds)
        self.thread = threading.Thread(target=run, args=(self.server, listener))
        self.thread.start()


@contextmanager
def serving(
    detector: ServedDetector,
    *,
    grace_seconds: int = 20,
    drain_seconds: float = 0,
    listener: socket.socket | None = None,
    settings: dict[str, Any] | None = None,
    **limits: Any,
) -> Iterator[Served]:
    """Serve until the block ends; settings: of `make_app`."""
    served = Served(
        detector,
        Limits(**limits),
        listener or listening(),
        grace_seconds=grace_seconds,
        drain_seconds=drain_seconds,
        **(settings or {}),
    )
    try:
        yield served
    finally:
        served.server.should_exit = True
        served.thread.join(SECONDS)
        assert not served.thread.is_alive()


def listening() -> socket.socket:
    """A socket to which clients may connect, of any free port."""
    listener = bind("127.0.0.1", 0)
    listener.listen(128)
    return listener


def png(image: NDArray[np.uint8]) -> bytes:
    return bytes(cv2.imencode(".png", image[..., ::-1])[1])


IMAGE = png(picture(3))


def in_threads(count: int, task: Callable[[], Any]) -> tuple[list[threading.Thread], list[Any]]:
    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.append(task())) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads, results


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it happens in time"
        time.sleep(0.005)
