"""Whether a backend finds what the exported network finds, and that it shows where it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from asag_bench.cli import main
from asag_deploy import detector_options
from asag_deploy.backends import open_network
from asag_deploy.bundle.bundle import Bundle
from asag_export.gate.parity import Found, in_common
from support.tiny_bundle import make_bundle, picture

QUICK = ("--duration", "0.03", "--warmup", "1", "--threads", "1", "--quiet", "--no-plots")


def detections(*rows: tuple[float, int, tuple[float, float, float, float]]) -> Found:
    scores, classes, boxes = (np.array(values) for values in zip(*rows, strict=True))
    return Found(scores.astype(np.float32), classes, boxes.astype(np.float32))


def test_detections_in_common() -> None:
    box, beside = (0.1, 0.1, 0.5, 0.5), (0.1, 0.1, 0.5, 0.45)
    expected = detections((0.9, 1, box), (0.8, 2, box))
    assert in_common(expected, expected) == 1
    assert in_common(expected, detections((0.895, 1, box), (0.8, 3, box))) == 0.5  # another class
    assert in_common(expected, detections((0.87, 1, box), (0.8, 2, box))) == 0.5  # another score
    assert in_common(expected, detections((0.9, 1, beside), (0.8, 2, box))) == 0.5  # another box
    nothing = Found(*(column[:0] for column in expected))
    assert in_common(nothing, expected) == 1
    assert in_common(expected, nothing) == 0
    flat = detections((0.9, 1, (0.1, 0.1, 0.1, 0.5)))
    assert in_common(flat, flat) == 1
    assert in_common(flat, detections((0.9, 1, (0.1, 0.1, 0.15, 0.5)))) == 0


def test_a_backend_that_computes_something_else_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its decoder's scores are halved behind the back of the bundle's parity report."""
    bundle = make_bundle(tmp_path / "bundle")
    (tmp_path / "photos").mkdir()
    cv2.imwrite(str(tmp_path / "photos" / "p3.png"), picture(5, 2)[..., ::-1])
    folders = ["--images", str(tmp_path / "photos"), "--output-dir", str(tmp_path / "out")]

    def halved(backend: str | None, opened: Bundle, *given: Any) -> Any:
        network: Any = open_network(backend, opened, *given)
        stage = network.stage

        def other(name: str) -> Any:
            if name != "decoder":
                return stage(name)

            def call(inputs: Any) -> Any:
                outputs = stage(name)(inputs)
                scores = network.download(outputs["det_scores"])
                return {**outputs, "det_scores": network.upload(scores / 2)}

            return call

        network.stage = other
        return network

    monkeypatch.setattr(detector_options, "open_network", halved)
    assert main(["run", str(bundle.path), *folders, *QUICK]) == 0
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert found["agreement"]["subjects"]["onnxruntime"]["detections"] < 0.5
    assert "DIFFERENT: onnxruntime finds " in (tmp_path / "out" / "result.md").read_text()
