"""Checkpoints and backbones are read from an address as from a file."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from asag_deploy.errors import DownloadError
from asag_training.checkpoints import load_checkpoint
from asag_training.evaluation.cli import main

WEIGHTS = Path(__file__).parents[2] / "export" / "asag_export"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    handler = functools.partial(Quiet, directory=str(WEIGHTS))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        monkeypatch.setenv("ASAG_CACHE_DIR", str(tmp_path / "cache"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_a_checkpoint(address: str) -> None:
    found = load_checkpoint(Path(f"{address}/asag-a-scenes.safetensors"))
    expected = load_checkpoint(WEIGHTS / "asag-a-scenes.safetensors")
    assert found.config == expected.config
    assert all(torch.equal(found.state[name], value) for name, value in expected.state.items())
    with pytest.raises(DownloadError, match=r"there is nothing at .*gone\.pth"):
        load_checkpoint(f"{address}/gone.pth")


def test_a_program(address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"{address}/asag-a-scenes.safetensors", "--data", str(tmp_path)]
    assert main(arguments) == 2
    assert "annotations" in capsys.readouterr().err, "the checkpoint was read, and there is no data"
    assert main([f"{address}/gone.pth", "--data", str(tmp_path)]) == 2
    assert "there is nothing at" in capsys.readouterr().err
