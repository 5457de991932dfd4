"""The parity gate on any backend, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from asag_bench import cli
from support.tiny_bundle import make_bundle


def test_a_trained_bundle_is_compared_with_its_own_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not with random weights, from which all would differ."""
    make_bundle(tmp_path / "bundle")
    manifest = tmp_path / "bundle" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "trained": True}))
    assert cli.main(["parity", str(tmp_path / "bundle"), "--backend", "onnxruntime"]) == 2
    assert "give the checkpoint it was exported from, with --checkpoint" in capsys.readouterr().err
