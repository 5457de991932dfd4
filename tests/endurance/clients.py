"""Clients of a server, good and bad: each sends one request and says whether it got the right answer."""

from __future__ import annotations

import http.client
import json
import random
import socket
import struct
import time
from collections.abc import Callable, Mapping
from typing import Any

SECONDS = 60.0
_HEAD = "POST /detect?threshold=0 HTTP/1.1\r\nHost: soak\r\nContent-Length: {}\r\n\r\n"

Address = tuple[str, int]
Client = Callable[[Address, random.Random], str | None]
"""Sends a request; returns what was wrong with the answer, or None."""


def ask(address: Address, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    """Send a request over a connection of its own; return status and answer, without its times."""
    connection = http.client.HTTPConnection(*address, timeout=SECONDS)
    try:
        connection.request(method, path, body=body)
        response = connection.getresponse()
        answer = json.loads(response.read())
        if isinstance(answer, dict):
            answer.pop("times_ms", None)
        return response.status, answer
    finally:
        connection.close()


class Clients:
    """One of each kind, over images whose answers are known."""

    def __init__(self, expected: Mapping[bytes, Any], most_bytes: int) -> None:
        self._expected = expected
        self._images = list(expected)
        self._most_bytes = most_bytes
        self.kinds: dict[str, tuple[Client, int]] = {
            "good": (self.good, 70),
            "on one connection": (self.several, 4),
            "damaged": (self.damaged, 4),
            "garbage": (self.garbage, 4),
            "huge, announced": (self.huge, 2),
            "huge, in chunks": (self.chunks, 1),
            "half a body": (self.half, 4),
            "gone at once": (self.gone, 4),
            "reset": (self.reset, 3),
            "slow": (self.slow, 2),
            "another path": (self.elsewhere, 2),
        }
        """By name: the client, and how often it comes."""

    def good(self, address: Address, rng: random.Random) -> str | None:
        """Send an image; the answer is what it was when there was one client."""
        image = rng.choice(self._images)
        return self._compare(image, *ask(address, "POST", "/detect?threshold=0", image))

    def several(self, address: Address, rng: random.Random) -> str | None:
        """Send images one after the other over one connection."""
        connection = http.client.HTTPConnection(*address, timeout=SECONDS)
        try:
            for image in rng.sample(self._images, 3):
                connection.request("POST", "/detect?threshold=0", body=image)
                response = connection.getresponse()
                answer = json.loads(response.read())
                answer.pop("times_ms", None)
                problem = self._compare(image, response.status, answer)
                if problem is not None:
                    return problem
        finally:
            connection.close()
        return None

    def damaged(self, address: Address, rng: random.Random) -> str | None:
        """Send an image that breaks off."""
        image = rng.choice(self._images)
        return _status(422, *ask(address, "POST", "/detect", image[: len(image) // 2]))

    def garbage(self, address: Address, rng: random.Random) -> str | None:
        """Send what is no HTTP."""
        with socket.create_connection(address, timeout=SECONDS) as connection:
            connection.sendall(b"\x16\x03\x01" + rng.randbytes(200) + b"\r\n\r\n")
            return _begins(connection, b"HTTP/1.1 400 ")

    def huge(self, address: Address, rng: random.Random) -> str | None:
        """Announce more than is taken."""
        return _status(413, *ask(address, "POST", "/detect", bytes(self._most_bytes + rng.randrange(1, 9))))

    def chunks(self, address: Address, rng: random.Random) -> str | None:
        """Send more than is taken without announcing it."""
        piece = bytes(self._most_bytes // 4)
        return _status(413, *ask(address, "POST", "/detect", iter([piece] * rng.randrange(5, 7))))

    def half(self, address: Address, rng: random.Random) -> str | None:
        """Go away in the middle of an image."""
        image = rng.choice(self._images)
        with socket.create_connection(address, timeout=SECONDS) as connection:
            connection.sendall(_HEAD.format(len(image)).encode() + image[: rng.randrange(len(image))])
        return None

    def gone(self, address: Address, rng: random.Random) -> str | None:
        """Go away as soon as the image is sent."""
        image = rng.choice(self._images)
        with socket.create_connection(address, timeout=SECONDS) as connection:
            connection.sendall(_HEAD.format(len(image)).encode() + image)
        return None

    def reset(self, address: Address, rng: random.Random) -> str | None:
        """Let the connection be reset while the image is waited for or looked at."""
        image = rng.choice(self._images)
        with socket.create_connection(address, timeout=SECONDS) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(_HEAD.format(len(image)).encode() + image)
            time.sleep(rng.random() / 100)
        return None

    def slow(self, address: Address, rng: random.Random) -> str | None:
        """Send an image slower than is waited for."""
        with socket.create_connection(address, timeout=SECONDS) as connection:
            connection.sendall(_HEAD.format(100).encode())
            for _ in range(rng.randrange(1, 5)):
                connection.sendall(b"x")
                time.sleep(0.05)
            return _begins(connection, b"HTTP/1.1 408 ")

    def elsewhere(self, address: Address, rng: random.Random) -> str | None:
        """Ask for what there is not."""
        return _status(404, *ask(address, "GET", f"/{rng.randrange(10**6)}"))

    def _compare(self, image: bytes, status: int, answer: Any) -> str | None:
        if status != 200:
            return f"status {status}: {answer}"
        return None if answer == self._expected[image] else f"another answer: {answer}"


def _status(wanted: int, status: int, answer: Any) -> str | None:
    fine = status == wanted and list(answer) == ["error"]
    return None if fine else f"status {status}, expected {wanted}: {answer}"


def _begins(connection: socket.socket, start: bytes) -> str | None:
    got = connection.recv(4096)
    return None if got.startswith(start) else f"{got[:60]!r}, expected {start!r}"
