"""Videos that a server sends."""

from __future__ import annotations

import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from asag_deploy.errors import SourceError
from asag_deploy.images import videos
from asag_deploy.images.videos import Video
from support.videos import write_video


class Server(BaseHTTPRequestHandler):
    """Sends a video whole; cut, under `/cut`; whole but without its length, under `/open`."""

    content = b""

    def do_GET(self) -> None:
        self.send_response(200)
        if self.path != "/open":
            self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content[: len(self.content) // (2 if self.path == "/cut" else 1)])

    def log_message(self, *_: object) -> None: ...


def test_an_address_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(videos, "_OPEN_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/clip.mp4"
        with pytest.raises(SourceError, match="'clip' gives no pictures: nothing came in time; check the"):
            Video("clip", address)


def test_addresses(tmp_path: Path) -> None:
    options = {"movflags": "faststart"}
    Server.content = write_video(tmp_path / "a.mp4", frames=12, b_frames=2, options=options).read_bytes()
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name, whole in (("whole", True), ("open", True), ("cut", False)):
            with Video("clip", f"http://127.0.0.1:{server.server_port}/{name}") as video:
                frames = list(video.frames())
            assert (len(frames) == 12) == whole
            if whole:
                assert video.problem is None
            else:
                assert str(video.problem).startswith(f"'clip' broke off after {len(frames)} of 12 frames")
        server.shutdown()
