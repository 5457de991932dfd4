"""`Detector`, from images to detections, over the tiny bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from asag_deploy import (
    BackendError,
    Bundle,
    BundleNotFoundError,
    CheckpointError,
    ConfigError,
    Detections,
    Detector,
    ImageError,
    OutputError,
    RawOutput,
    StopReason,
)
from asag_deploy.fetching.locate import local_checkpoint, local_model
from asag_deploy.images.reading import decode_image
from support.detection_samples import assert_same
from support.tiny_bundle import ANCHOR_CAP, CLASSES, MAX_DETECTIONS, batch, make_bundle, picture
from support.tiny_graphs import FIRST_ANCHORS

PHASES = ["preprocess", "normalize", "backbone", "probe_p4", "probe_p3", "decoder", "postprocess", "total"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("exact") / "bundle")


@pytest.fixture(scope="module")
def detector(bundle: Bundle) -> Iterator[Detector]:
    with Detector.load(bundle, threads=1) as detector:
        yield detector


def detect(detector: Detector, *colour: int) -> Detections:
    return detector(picture(*colour), channel_order="rgb")


def test_detections(detector: Detector) -> None:
    result = detect(detector, 3)
    assert len(result) == MAX_DETECTIONS
    # The tiny decoder scores class 0 at sigmoid(4 x anchor score); the three best anchors were replaced.
    assert result.confidence[0] == pytest.approx(1 / (1 + np.exp(-4 * 0.87)), abs=1e-6)
    assert result.names[0] == CLASSES[0]
    assert [category.id for category in result.categories] == [10, 20, 30]
    assert result.original_shape == (64, 64)
    assert result.anchors.shape == (17 + 6, 4)


def test_boxes_are_in_pixels_of_the_original(detector: Detector) -> None:
    # It is resized to 85 x 64 and padded to 96 x 64; the best anchor is at 0.025 of the image, 0.2 wide.
    result = detector(picture(0, size=(128, 96)), channel_order="rgb")
    assert result.original_shape == (128, 96)
    np.testing.assert_allclose(result.xyxy[0], [0, 0, 0.125 * 96, 0.125 * 128], rtol=1e-5)
    np.testing.assert_allclose(
        result.anchors[0], [-0.075 * 96, -0.075 * 128, 0.125 * 96, 0.125 * 128], rtol=1e-4
    )
    np.testing.assert_allclose(result.trace.levels[0].patch_boxes[-1], [0, 0, 96, 128], rtol=1e-5)


def test_patch_boxes_are_in_pixels_of_the_original(detector: Detector) -> None:
    result = detector(picture(5, 2, size=(128, 128)), channel_order="rgb")
    p5, p4, p3 = result.trace.levels
    assert p5.patch_boxes.tolist() == [
        [0, 0, 64, 64],
        [64, 0, 128, 64],
        [0, 64, 64, 128],
        [64, 64, 128, 128],
        [0, 0, 128, 128],
    ]
    # Two cells of 16 pixels a side around the first anchors on the diagonal, at twice the network's size:
    # their centres, up to 0.225 of the image, all lie within the first patch that fits into it.
    assert p4.patch_boxes.tolist() == [[0, 0, 64, 64]] * 5
    # Anchors of P4 stand at the middle of their patch: there two cells of 8 pixels.
    assert p3.patch_boxes.tolist() == [[16, 16, 48, 48]] * 2


def test_early_stop_at_once(detector: Detector) -> None:
    trace = detect(detector, 0, 5).trace
    assert (trace.exit_level, trace.stop) == ("P5", StopReason.NOTHING_SELECTED)
    assert trace.anchor_count == FIRST_ANCHORS


def test_natural_stop_after_p4(detector: Detector) -> None:
    result = detect(detector, 5, 0, 2)
    p5, p4 = result.trace.levels
    assert result.trace.stop == StopReason.NOTHING_SELECTED
    assert (p5.selected, p5.anchors, p4.patches, p4.anchors) == (5, 15, 3, 6)
    assert result.trace.anchor_count == 21
    assert list(result.times_ms) == [phase for phase in PHASES if phase != "probe_p3"]


def test_running_to_p3(detector: Detector) -> None:
    result = detect(detector, 5, 2)
    assert (result.trace.exit_level, result.trace.stop) == ("P3", StopReason.LAST_LEVEL)
    assert [level.anchors for level in result.trace.levels] == [15, 8, 4]
    assert result.trace.anchor_count == ANCHOR_CAP
    assert list(result.times_ms) == PHASES
    assert all(time > 0 for time in result.times_ms.values())
    assert result.times_ms["total"] >= sum(result.times_ms[phase] for phase in PHASES[:-1]) * 0.99


def test_capacity_overflow(detector: Detector) -> None:
    _, p4, p3 = detect(detector, 20, 9).trace.levels
    assert (p4.patches, p4.patches_dropped) == (18, 2)
    assert (p3.patches, p3.patches_dropped) == (6, 3)


@pytest.mark.parametrize(
    ("max_level", "stop"), [("P5", StopReason.MAX_LEVEL), ("P4", StopReason.MAX_LEVEL), ("P3", "last level")]
)
def test_max_level(bundle: Bundle, max_level: Any, stop: StopReason) -> None:
    trace = detect(Detector.load(bundle, max_level=max_level, threads=1), 5, 2).trace
    assert (trace.exit_level, trace.stop) == (max_level, stop)


def test_deadline_that_cannot_be_kept(bundle: Bundle) -> None:
    detector = Detector.load(bundle, deadline_ms=1e-6, threads=1)
    assert detect(detector, 5).trace.stop == StopReason.DEADLINE
    assert detector.forward(batch(picture(5)), np.array([[64, 64]])).trace[0].stop == StopReason.DEADLINE


def test_deadline_counts_from_each_call(bundle: Bundle) -> None:
    detector = Detector.load(bundle, deadline_ms=1e7, threads=1)
    for _ in range(2):
        assert detect(detector, 5).trace.stop == StopReason.NOTHING_SELECTED


def test_fast_mode_of_an_exact_bundle(bundle: Bundle) -> None:
    detector = Detector.load(bundle, mode="fast", threads=1)
    two = detect(detector, 2).trace
    assert (two.exit_level, two.stop) == ("P5", StopReason.FEW_SELECTED)
    sixteen = detect(detector, 16).trace
    assert (sixteen.levels[1].patches, sixteen.levels[1].patches_dropped) == (15, 1)


def test_bundle_exported_fast_runs_fast(tmp_path: Path) -> None:
    detector = Detector.load(make_bundle(tmp_path / "bundle", mode="fast"), threads=1)
    assert detect(detector, 2).trace.stop == StopReason.FEW_SELECTED


def test_patches_allowed_by_the_variant(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", max_patches=4)
    for mode in ("exact", "fast"):
        level = detect(Detector.load(bundle, mode=mode, threads=1), 9).trace.levels[1]
        assert (level.patches, level.patches_dropped) == (4, 5)


def test_first_level_alone(tmp_path: Path) -> None:
    detector = Detector.load(make_bundle(tmp_path / "bundle", levels=()), threads=1)
    result = detect(detector, 5, 2)
    assert (result.trace.exit_level, result.trace.stop) == ("P5", StopReason.MAX_LEVEL)
    assert result.trace.anchor_count == FIRST_ANCHORS


def test_bundle_that_ends_with_p4(tmp_path: Path) -> None:
    detector = Detector.load(make_bundle(tmp_path / "bundle", levels=("P4",)), threads=1)
    assert detect(detector, 5, 2).trace.exit_level == "P4"
    assert detect(detector, 0, 2).trace.stop == StopReason.NOTHING_SELECTED


def test_nms_of_the_bundle(tmp_path: Path) -> None:
    plain = make_bundle(tmp_path / "plain")
    suppressing = make_bundle(tmp_path / "nms", nms_iou=0.1)
    assert len(detect(Detector.load(plain, threads=1), 0)) == MAX_DETECTIONS
    assert 0 < len(detect(Detector.load(suppressing, threads=1), 0)) < MAX_DETECTIONS


def test_batch_treats_each_image_as_it_would_be_alone(detector: Detector) -> None:
    images = [picture(0), picture(5, 2, size=(64, 100)), picture(4, size=(90, 64)), picture(20, 9)]
    together = detector(images, channel_order="rgb")
    assert [d.trace.exit_level for d in together] == ["P5", "P3", "P4", "P3"]
    for image, result in zip(images, together, strict=True):
        alone = detector(image, channel_order="rgb")
        assert_same(result, alone)
        assert result.trace.stop == alone.trace.stop


def test_list_gives_a_list(detector: Detector) -> None:
    single = detector([picture(3)], channel_order="rgb")
    assert isinstance(single, list)
    assert_same(single[0], detect(detector, 3))
    assert len(detector((picture(3), picture(2)))) == 2
    assert detector([]) == []


def test_times_belong_to_each(detector: Detector) -> None:
    first, second = detector([picture(3), picture(3)])
    first.times_ms.clear()
    assert second.times_ms


def test_paths_and_channel_orders(detector: Detector, tmp_path: Path) -> None:
    rgb = picture(5, 2)
    bgr = np.ascontiguousarray(rgb[..., ::-1])
    cv2.imwrite(str(tmp_path / "picture.png"), bgr)
    expected = detector(rgb, channel_order="rgb")
    assert expected.trace.exit_level == "P3"
    assert_same(detector(bgr), expected)
    assert_same(detector(tmp_path / "picture.png"), expected)
    assert_same(detector(str(tmp_path / "picture.png"), channel_order="rgb"), expected)
    for result in detector([tmp_path / "picture.png", bgr]):
        assert_same(result, expected)
    for image in (tmp_path / "picture.png", bgr):
        with pytest.raises(ConfigError, match="unknown channel_order 'xyz'"):
            detector(image, channel_order="xyz")  # type: ignore[call-overload]


def test_bad_images(detector: Detector, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="does not exist"):
        detector(tmp_path / "nowhere.png")
    with pytest.raises(ImageError, match="pass a list"):
        detector(np.zeros((2, 64, 64, 3), dtype=np.uint8))
    with pytest.raises(ImageError, match="got NoneType"):
        detector(None)  # type: ignore[call-overload]
    with pytest.raises(ImageError, match="expected an image as a path or a numpy array"):
        detector([None])  # type: ignore[list-item]


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_the_bytes_of_a_file_are_no_list_of_images(detector: Detector, kind: Callable[[bytes], Any]) -> None:
    encoded = cv2.imencode(".png", picture(0)[..., ::-1])[1].tobytes()
    for content in (encoded, b""):
        for given in (kind(content), [kind(content)]):
            with pytest.raises(ImageError, match=f"got {kind.__name__}; give the path") as refused:
                detector(given)
            assert "decode_image(data, name)" in str(refused.value)
        with pytest.raises(ImageError, match=f"got {kind.__name__}; give the path"):
            next(detector.stream(kind(content)))
    decoded = decode_image(encoded, "picture")  # as the sentence says
    assert_same(detector(decoded, channel_order="rgb"), detector(picture(0), channel_order="rgb"))


def test_empty_paths(detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which `Path` takes for the working directory, even where that is a bundle."""
    make_bundle(tmp_path / "bundle")
    monkeypatch.chdir(tmp_path / "bundle")
    for given in ("", [""]):
        with pytest.raises(ImageError, match="the path of an image is empty; name an image file"):
            detector(given)
    with pytest.raises(BundleNotFoundError, match="an empty path names nothing"):
        Detector.load("")
    with pytest.raises(CheckpointError, match="an empty path names nothing"):
        local_checkpoint("")
    with pytest.raises(BundleNotFoundError, match="an empty path names nothing"):
        local_model("")
    with pytest.raises(OutputError, match="the path to write a picture to is empty"):
        detector(picture(0)).save("", picture(0))


def test_forward(detector: Detector) -> None:
    images = batch(picture(0), picture(5, 0, 2))
    raw = detector.forward(images, np.array([[64, 64], [48, 40]], dtype=np.int32))
    assert isinstance(raw, RawOutput)
    assert raw.anchor_count.tolist() == [20, 21]
    assert raw.logits.shape == (2, 21, len(CLASSES))
    assert raw.boxes.shape == raw.anchors.shape == (2, 21, 4)
    assert {raw.logits.dtype, raw.boxes.dtype, raw.anchors.dtype} == {np.dtype(np.float32)}
    np.testing.assert_allclose(raw.boxes[1] * [40, 48, 40, 48], raw.anchors[1], rtol=1e-5)
    np.testing.assert_allclose(raw.anchors[0, 20], [64, 64, 64, 64])
    assert [trace.anchor_count for trace in raw.trace] == [20, 21]
    assert raw.trace[0].exit_level == "P5"
    # In pixels of the images given, clipped to what of them is valid.
    assert raw.trace[1].levels[0].patch_boxes[-1].tolist() == [0, 0, 40, 48]
    assert raw.trace[1].levels[1].patch_boxes.tolist() == [[0, 0, 32, 32]] * 3


def test_forward_is_what_calling_does(detector: Detector) -> None:
    raw = detector.forward(batch(picture(5, 2)), np.array([[64, 64]]))
    result = detect(detector, 5, 2)
    assert raw.trace[0].to_dict() == result.trace.to_dict()
    best = 1 / (1 + np.exp(-raw.logits[0].max()))
    assert result.confidence[0] == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize(
    ("images", "sizes"),
    [
        (np.zeros((1, 64, 64, 3), np.float32), np.array([[64, 64]])),
        (np.zeros((1, 3, 64, 64), np.float64), np.array([[64, 64]])),
        (np.zeros((1, 3, 64, 64), np.float32), np.array([[65, 64]])),
        (np.zeros((1, 3, 64, 64), np.float32), np.array([64, 64])),
        (np.zeros((0, 3, 64, 64), np.float32), np.zeros((0, 2), np.int64)),
    ],
)
def test_forward_refuses_what_is_no_batch(detector: Detector, images: Any, sizes: Any) -> None:
    with pytest.raises(ImageError, match="expected"):
        detector.forward(images, sizes)


def test_input_arrays_are_not_changed(detector: Detector) -> None:
    image, images = picture(5, 2), batch(picture(5, 2))
    before = image.copy(), images.copy()
    detector(image)
    detector.forward(images, np.array([[64, 64]]))
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(images, before[1])


def test_concurrent_calls_give_what_serial_calls_do(detector: Detector) -> None:
    images = [picture(red, green, size=(64, 64 + 8 * green)) for red in range(0, 20, 3) for green in range(4)]
    serial = [detector(image, channel_order="rgb") for image in images]
    with ThreadPoolExecutor(8) as pool:
        concurrent = list(pool.map(lambda image: detector(image, channel_order="rgb"), images * 3))
    for actual, expected in zip(concurrent, serial * 3, strict=True):
        assert_same(actual, expected)


def test_context_manager_closes(bundle: Bundle) -> None:
    with Detector.load(bundle, threads=1) as detector:
        detect(detector, 0)
    calls: list[Callable[[], object]] = [
        lambda: detect(detector, 0),
        lambda: detector.forward(batch(picture(0)), np.array([[64, 64]])),
        detector.__enter__,
    ]
    for call in calls:
        with pytest.raises(BackendError, match="the detector is closed"):
            call()


def test_closing_twice_does_no_harm(bundle: Bundle) -> None:
    detector = Detector.load(bundle, threads=1)
    detector.close()
    detector.close()
    assert detector.manifest.variant == "tiny"


def test_load_from_a_path(bundle: Bundle) -> None:
    for path in (bundle.path, str(bundle.path)):
        assert Detector.load(path, threads=1).manifest == bundle.manifest
    with pytest.raises(BundleNotFoundError, match="there is no bundle"):
        Detector.load(bundle.path / "nowhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "slow"}, "unknown mode 'slow'; expected 'exact' or 'fast'"),
        ({"max_level": "P2"}, "unknown max_level 'P2'; expected 'P5', 'P4' or 'P3'"),
        ({"deadline_ms": 0}, "deadline_ms is 0; expected more than 0 milliseconds"),
        ({"deadline_ms": -3.5}, "deadline_ms is -3.5"),
        ({"deadline_ms": float("nan")}, "deadline_ms is nan"),
        ({"backend": "caffe"}, "unknown backend 'caffe'; the backends are onnxruntime, onnxruntime-cuda"),
        ({"threads": 0}, "threads is 0"),
    ],
)
def test_options_that_make_no_sense(bundle: Bundle, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Detector.load(bundle, **options)


def test_exact_mode_of_a_fast_bundle(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", mode="fast")
    with pytest.raises(ConfigError, match=r"exported for mode 'fast' .* `asag-export --mode exact`"):
        Detector.load(bundle, mode="exact")


@pytest.mark.parametrize(("levels", "max_level"), [((), "P4"), (("P4",), "P3")])
def test_level_the_bundle_does_not_have(tmp_path: Path, levels: Any, max_level: Any) -> None:
    bundle = make_bundle(tmp_path / "bundle", levels=levels)
    with pytest.raises(ConfigError, match=f"max_level '{max_level}' is beyond the bundle"):
        Detector.load(bundle, max_level=max_level)
