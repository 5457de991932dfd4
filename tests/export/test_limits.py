"""Other numbers of anchors and detections than a network was trained with: by call, and at export."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from asag_deploy import Bundle, Detector
from asag_deploy.loop.stopping import stop_rule
from asag_evaluation.data.doodles import draw_doodles
from asag_export.cli import main
from asag_export.gate.parity import ParityReport
from asag_training.checkpoints import save_checkpoint
from asag_training.network.model import build
from asag_training.network.stage_plan import build_stages, postprocessing_plan, probing_plan
from asag_training.network.stages import TorchNetwork
from support.rtx_engines import needs_rtx
from support.small_network import small_checkpoint

PICTURES = [
    draw_doodles(height, width, seed) for seed, (height, width) in enumerate([(150, 300), (300, 220)])
]


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def detector(small_bundle: Bundle, request: pytest.FixtureRequest) -> Iterator[Detector]:
    with Detector.load(small_bundle, threads=1, backend=request.param) as loaded:
        yield loaded


def in_pytorch(bundle: Bundle, cap: int, detections: int) -> Detector:
    """The network of the bundle, built for so many anchors and detections."""
    checkpoint = small_checkpoint(anchor_cap=cap, max_detections=detections)
    manifest = dataclasses.replace(
        bundle.manifest,
        probing=probing_plan(checkpoint.config),
        postprocessing=postprocessing_plan(checkpoint.config),
    )
    model = build(checkpoint.config, checkpoint.state)
    stages = build_stages(model, manifest.probing, preprocessing=manifest.preprocessing)
    return Detector(manifest, TorchNetwork(stages), stop_rule(manifest, None, None))


@pytest.mark.parametrize(("cap", "detections"), [(9, 5), (30, 100), (40, 20)])
def test_a_call_with_a_cap_finds_what_a_network_with_that_cap_finds(
    detector: Detector, small_bundle: Bundle, cap: int, detections: int
) -> None:
    expected = in_pytorch(small_bundle, cap, detections)(PICTURES, channel_order="rgb")
    found = detector(PICTURES, channel_order="rgb", anchor_cap=cap, max_detections=detections)
    uncapped = detector(PICTURES, channel_order="rgb")
    for one, other, every in zip(found, expected, uncapped, strict=True):
        assert every.trace.anchor_count > cap, "or the cap was not put to the test"
        assert one.trace.anchor_count == other.trace.anchor_count == cap
        np.testing.assert_allclose(one.anchors, other.anchors, rtol=0, atol=0.05)
        assert len(one) == len(other) == min(detections, cap * len(one.categories))
        np.testing.assert_allclose(one.confidence, other.confidence, rtol=0, atol=1e-4)


def test_forward_gives_as_many_anchors_as_the_detector_was_loaded_for(small_bundle: Bundle) -> None:
    images = np.zeros((1, 3, 160, 320), dtype=np.float32)
    with Detector.load(small_bundle, threads=1, anchor_cap=12) as loaded:
        raw = loaded.forward(images, np.array([[160, 320]]))
    assert raw.anchor_count.tolist() == [12]
    assert raw.logits.shape[1] == raw.anchors.shape[1] == raw.trace[0].anchor_count == 12


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "network.safetensors"
    save_checkpoint(path, small_checkpoint())
    return path


def test_an_export_for_more(checkpoint: Path, tmp_path: Path, parity: ParityReport) -> None:
    assert parity.passed
    output = tmp_path / "bundle"
    options = ["--checkpoint", str(checkpoint), "--output-dir", str(output), "--quiet"]
    assert main([*options, "--anchor-cap", "600", "--max-detections", "450"]) == 0
    manifest = Bundle.open(output).manifest
    assert (manifest.probing.anchor_cap, manifest.postprocessing.max_detections) == (600, 450)
    assert manifest.probing.cap_can_be_lowered


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--anchor-cap", "4"], "error: --anchor-cap is 4; this network needs at least 5"),
        (["--anchor-cap", "0"], "--anchor-cap is 0; it must be a whole number from 1 to 2048"),
        (["--anchor-cap", "2049"], "--anchor-cap is 2049; it must be a whole number from 1 to 2048"),
        (["--max-detections", "-1"], "--max-detections"),
        pytest.param(
            ["--max-detections", "5000", "--anchor-cap", "2048", "--format", "tensorrt-rtx"],
            "detections of an image at most, and this network gives 5000; give --max-detections 3840",
            marks=needs_rtx,
        ),
    ],
)
def test_limits_that_are_not_possible(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], sentence: str
) -> None:
    output = tmp_path / "bundle"
    assert main(["--checkpoint", str(checkpoint), "--output-dir", str(output), *options]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.splitlines()) == 1
    assert not output.exists()
