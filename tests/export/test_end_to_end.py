"""From an exported bundle to detections, the way a user gets there: `Detector` and `asag-detect`."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from asag_deploy import Detections, Detector
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.detect.cli import main
from asag_deploy.images.reading import read_image
from asag_deploy.loop.stopping import stop_rule
from asag_evaluation.data.doodles import draw_doodles
from asag_training.network.model import build
from asag_training.network.stage_plan import build_stages
from asag_training.network.stages import TorchNetwork
from support.small_network import small_checkpoint

pytestmark = pytest.mark.slow

SIZES = {"wide": (150, 400), "small": (40, 60), "square": (300, 300), "tall": (500, 220)}
"""Heights and widths of the pictures, none of which the network runs at."""


@pytest.fixture(scope="module")
def detector(small_bundle: Bundle) -> Iterator[Detector]:
    with Detector.load(small_bundle, threads=1) as loaded:
        yield loaded


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for seed, (name, (height, width)) in enumerate(SIZES.items()):
        cv2.imwrite(str(pictures / f"{name}.png"), draw_doodles(height, width, seed))
    return pictures


def assert_equal(a: Detections, b: Detections, atol: float = 0.0) -> None:
    """The same boxes in the same order, within `atol` pixels and a hundredth of that in confidence."""
    np.testing.assert_array_equal(a.class_id, b.class_id)
    np.testing.assert_allclose(a.confidence, b.confidence, rtol=0, atol=atol / 100)
    np.testing.assert_allclose(a.xyxy, b.xyxy, rtol=0, atol=atol)
    np.testing.assert_allclose(a.anchors, b.anchors, rtol=0, atol=atol)
    assert (a.trace.stop, a.trace.anchor_count) == (b.trace.stop, b.trace.anchor_count)
    for level, other in zip(a.trace.levels, b.trace.levels, strict=True):
        assert (level.level, level.patches, level.anchors) == (other.level, other.patches, other.anchors)
        np.testing.assert_array_equal(level.patch_boxes, other.patch_boxes)


def test_detector_computes_what_the_network_computes(detector: Detector, small_bundle: Bundle) -> None:
    """The same runtime, once over ONNX Runtime and once over the network in PyTorch."""
    checkpoint, manifest = small_checkpoint(), small_bundle.manifest
    stages = build_stages(
        build(checkpoint.config, checkpoint.state), manifest.probing, preprocessing=manifest.preprocessing
    )
    rule = stop_rule(manifest, None, None)
    deepest = set()
    reference = Detector(small_bundle.manifest, TorchNetwork(stages), rule)
    for seed, (height, width) in enumerate(SIZES.values()):
        picture = draw_doodles(height, width, seed)
        found, expected = (net(picture, channel_order="rgb") for net in (detector, reference))
        assert len(expected) == 100
        deepest.add(expected.trace.exit_level)
        np.testing.assert_allclose(found.confidence, expected.confidence, rtol=0, atol=1e-4)
        np.testing.assert_allclose(found.anchors, expected.anchors, rtol=0, atol=0.05)
        assert found.trace.stop == expected.trace.stop
        for level, other in zip(found.trace.levels, expected.trace.levels, strict=True):
            assert (level.patches, level.anchors) == (other.patches, other.anchors)
            np.testing.assert_array_equal(level.patch_boxes, other.patch_boxes)
    assert "P3" in deepest


def test_detect_in_a_folder(small_bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 this is no picture")
    out, results = tmp_path / "out", tmp_path / "results.json"
    arguments = [str(small_bundle.path), str(folder), "--output-dir", str(out), "--json", str(results)]
    assert main([*arguments, "--threshold", "0", "--trace"]) == 1  # for the broken one
    assert {path.stem for path in out.iterdir()} == set(SIZES)
    content: list[dict[str, Any]] = json.loads(results.read_text(encoding="utf-8"))
    assert len(content) == len(SIZES)
    for path in out.iterdir():
        picture, drawn = read_image(folder / path.name), read_image(path)
        assert drawn.shape == picture.shape
        assert not np.array_equal(drawn, picture)


def test_broken_picture_is_reported(
    small_bundle: Bundle, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "broken.jpg").write_bytes(b"")
    assert main([str(small_bundle.path), str(folder)]) == 1
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert [line for line in lines if "broken.jpg" in line]
    assert any("untrained" in line for line in lines)
    assert all(f"{name}.png" in captured.out for name in SIZES)
    assert "Traceback" not in captured.err


def probe(bundle: Bundle, folder: Path, tmp_path: Path, *options: str) -> list[dict[str, Any]]:
    """The trace of every picture, by way of `asag-detect`."""
    results = tmp_path / "results.json"
    assert main([str(bundle.path), str(folder), "--json", str(results), "--quiet", *options]) == 0
    content: list[dict[str, Any]] = json.loads(results.read_text(encoding="utf-8"))
    assert len(content) == len(SIZES)
    return [image["trace"] for image in content]


def test_detect_no_deeper_than(small_bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    natural = probe(small_bundle, folder, tmp_path)
    assert "P3" in {trace["exit_level"] for trace in natural}
    for level in ("P5", "P4", "P3"):
        traces = probe(small_bundle, folder, tmp_path, "--max-level", level)
        for trace, by_itself in zip(traces, natural, strict=True):
            went_on = by_itself["exit_level"] < level  # P3 is deeper than P4
            assert trace["exit_level"] == (level if went_on else by_itself["exit_level"])
            assert trace["stop"] == ("max level" if went_on else by_itself["stop"])


def test_detect_fast(small_bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    traces = probe(small_bundle, folder, tmp_path, "--mode", "fast")
    assert all(level["patches"] <= 15 for trace in traces for level in trace["levels"])
    exact = probe(small_bundle, folder, tmp_path)
    patches = [sum(level["patches"] for t in ts for level in t["levels"]) for ts in (traces, exact)]
    assert patches[0] <= patches[1]


def test_detect_in_batches(small_bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(SIZES):  # all of one size, for padding changes what is near it
        cv2.imwrite(str(folder / f"{name}.png"), draw_doodles(200, 300, seed))
    one_by_one = probe(small_bundle, folder, tmp_path)
    assert probe(small_bundle, folder, tmp_path, "--batch", "3") == one_by_one


def test_bundle_of_half_precision(half_bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    traces = probe(half_bundle, folder, tmp_path)
    levels = {trace["exit_level"] for trace in traces}
    assert "P4" in levels
    assert "P3" not in levels


def test_bundle_that_was_tampered_with(
    small_bundle: Bundle, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "bundle"
    copy.mkdir()
    for path in small_bundle.path.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    content = bytearray((copy / "decoder.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (copy / "decoder.onnx").write_bytes(content)
    assert main([str(copy), str(folder)]) == 2
    assert "decoder.onnx' is truncated or was altered" in capsys.readouterr().err


PICTURES: dict[str, NDArray[Any]] = {
    "one pixel": np.full((1, 1, 3), 200, dtype=np.uint8),
    "20000 pixels wide": draw_doodles(40, 2000, 0).repeat(10, axis=1),
    "20000 pixels high": draw_doodles(2000, 40, 0).repeat(10, axis=0),
    "one row": draw_doodles(1, 300, 0),
    "grey": draw_doodles(90, 120, 1)[..., 0],
    "16 bits": draw_doodles(90, 120, 2).astype(np.uint16) * 257,
    "with alpha": np.concatenate([draw_doodles(90, 120, 3), np.full((90, 120, 1), 255, np.uint8)], axis=-1),
    "black": np.zeros((64, 64, 3), dtype=np.uint8),
    "not contiguous": draw_doodles(120, 200, 4)[::2, ::-1],
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_of_every_kind(detector: Detector, name: str) -> None:
    picture = PICTURES[name]
    found = detector(picture)
    height, width = picture.shape[:2]
    assert found.original_shape == (height, width)
    assert len(found) > 0
    assert found.trace.anchor_count >= detector.manifest.probing.anchor_floor
    assert np.isfinite(found.xyxy).all()
    assert (found.xyxy >= 0).all()
    assert (found.xyxy <= [width, height, width, height]).all()
    assert ((found.confidence > 0) & (found.confidence <= 1)).all()


def test_a_path_an_array_and_a_list_are_the_same(detector: Detector, folder: Path) -> None:
    paths = [folder / f"{name}.png" for name in SIZES]
    pictures = [cv2.imread(str(path)) for path in paths]
    alone = [detector(path) for path in paths]
    for path, picture, found in zip(paths, pictures, alone, strict=True):
        assert picture is not None
        assert_equal(detector(str(path)), found)
        assert_equal(detector(picture), found)
        assert_equal(detector(picture[..., ::-1], channel_order="rgb"), found)
    mixed = detector([paths[0], *(picture for picture in pictures[1:] if picture is not None)])
    assert [found.original_shape for found in mixed] == list(SIZES.values())
    for found, again in zip(mixed, detector(paths), strict=True):
        assert_equal(found, again)


def test_batch_of_one_size_is_its_images(detector: Detector) -> None:
    pictures = [draw_doodles(200, 260, seed) for seed in range(3)]
    for together, picture in zip(detector(pictures), pictures, strict=True):
        alone = detector(picture)
        np.testing.assert_allclose(together.confidence, alone.confidence, rtol=0, atol=1e-4)
        assert together.trace.anchor_count == alone.trace.anchor_count


def test_several_threads_at_once(detector: Detector) -> None:
    pictures = [draw_doodles(100 + 20 * seed, 180, seed) for seed in range(6)]
    expected = [detector(picture) for picture in pictures]
    with ThreadPoolExecutor(4) as pool:
        for found, one in zip(pool.map(detector, pictures * 3), expected * 3, strict=True):
            assert_equal(found, one)


def test_forward_takes_what_detection_normalises(detector: Detector) -> None:
    preprocessing = detector.manifest.preprocessing
    picture = draw_doodles(160, 224, 5)  # the size that the network runs at, so it is not resized
    mean, std = (np.array(values, dtype=np.float32) for values in (preprocessing.mean, preprocessing.std))
    image = ((picture - mean) / std).transpose(2, 0, 1)[None].astype(np.float32)
    output = detector.forward(image, np.array([[160, 224]]))
    found = detector(picture, channel_order="rgb")
    best = np.sort(1 / (1 + np.exp(-output.logits[0].astype(np.float64))), axis=None)[::-1][:100]
    np.testing.assert_allclose(found.confidence, best, rtol=0, atol=1e-5)
    assert output.trace[0].anchor_count == found.trace.anchor_count == output.anchor_count[0]
    assert output.logits.shape == (1, output.anchor_count[0], 80)


def test_memory_stays_flat(detector: Detector) -> None:
    rng = np.random.default_rng(0)
    pictures = [draw_doodles(int(h), int(w), 0) for h, w in rng.integers(60, 300, (12, 2))]
    for picture in pictures * 2:
        detector(picture)
    before = resident_megabytes()
    for picture in pictures * 5:
        detector(picture)
    # Keeping the features of every image alone would be some 4 MB a time.
    assert resident_megabytes() - before < 60


def resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20
