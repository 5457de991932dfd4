"""`Detector.stream` and concurrent requests, on a whole detector: the same as calling it image by image."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from asag_deploy import Bundle, Detections, Detector
from asag_deploy.backends import BACKENDS, open_network
from asag_deploy.backends.onnxruntime import threads_of_a_call
from asag_deploy.errors import BackendError, ConfigError, ImageError, SourceError
from support.detection_samples import assert_same
from support.tiny_bundle import make_bundle, picture
from support.videos import write_video

PICTURES = [
    picture(red, green, blue, size=size)
    for red, green, blue in ((0, 0, 0), (3, 0, 0), (6, 2, 1), (12, 5, 3))
    for size in ((64, 64), (64, 96), (50, 70))
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("stream") / "bundle")


@pytest.fixture(scope="module")
def detector(bundle: Bundle) -> Iterator[Detector]:
    with Detector.load(bundle, threads=1) as loaded:
        yield loaded


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("requests", [1, 3])
def test_the_same_as_image_by_image(bundle: Bundle, backend: str, requests: int) -> None:
    if BACKENDS[backend].problem() is not None:
        pytest.skip(str(BACKENDS[backend].problem()))
    with Detector.load(bundle, backend=backend, threads=1) as one_by_one:
        expected = [one_by_one(image, channel_order="rgb") for image in PICTURES]
    with Detector.load(bundle, backend=backend, requests=requests) as detector:
        found = list(detector.stream(PICTURES * 2, channel_order="rgb"))
        assert detector.requests == requests
    assert len({each.trace.exit_level for each in expected}) == 3
    assert_same(found, expected * 2)


@pytest.mark.parametrize("batch_size", [2, 5])
def test_batches_of_one_size_find_the_same(detector: Detector, batch_size: int) -> None:
    found = list(detector.stream(PICTURES, batch_size=batch_size, requests=2, channel_order="rgb"))
    for each, image in zip(found, PICTURES, strict=True):
        expected = detector(image, channel_order="rgb")
        np.testing.assert_allclose(each.xyxy, expected.xyxy, rtol=1e-6)
        np.testing.assert_allclose(each.confidence, expected.confidence, rtol=1e-6)
        assert each.trace.exit_level == expected.trace.exit_level


def test_names_arrays_folders_and_videos(detector: Detector, tmp_path: Path) -> None:
    images = [picture(3), picture(6, 2), picture(0)]
    for name, image in zip("abc", images, strict=True):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    writer = cv2.VideoWriter(str(tmp_path / "d.avi"), cv2.VideoWriter.fourcc(*"FFV1"), 10, (64, 64))
    for image in images[:2]:
        writer.write(image[..., ::-1].copy())
    writer.release()
    order = [*images, *images[:2]]
    expected = [detector(image, channel_order="rgb") for image in order]
    given: list[Any] = [tmp_path, str(tmp_path), [tmp_path]]
    for sources in (*given, iter([str(tmp_path / "*.png"), tmp_path / "d.avi"])):
        assert_same(list(detector.stream(sources)), expected)
    mixed: list[Any] = [images[0], tmp_path / "b.png"]
    assert_same(list(detector.stream(mixed, channel_order="rgb")), expected[:2])
    (only,) = detector.stream(images[2], channel_order="rgb")
    assert_same(only, expected[2])


def first_error(stream: Iterator[Detections]) -> tuple[int, Exception]:
    """How many results came before it."""
    count = 0
    try:
        for _ in stream:
            count += 1
    except Exception as error:
        return count, error
    raise AssertionError("nothing was raised")


def test_times_and_ends_of_videos(detector: Detector, tmp_path: Path) -> None:
    """Frames say when they are shown; what is missing is raised where it would come."""
    video = write_video(tmp_path / "a.mkv", frames=9)
    assert [each.time_s for each in detector.stream(video)] == pytest.approx([i / 10 for i in range(9)])
    data = video.read_bytes()
    video.write_bytes(data[: len(data) // 2])
    count, error = first_error(detector.stream(video))
    assert 0 < count < 9
    assert type(error) is SourceError
    assert f"broke off after {count} of 9 frames" in str(error)
    assert detector(picture(3)).time_s is None


def test_frames_of_animations(detector: Detector, tmp_path: Path) -> None:
    images = [Image.fromarray(picture(red)) for red in (3, 6, 0)]
    images[0].save(tmp_path / "a.webp", save_all=True, append_images=images[1:], duration=500, lossless=True)
    expected = [detector(np.asarray(image), channel_order="rgb") for image in images]
    assert_same(list(detector.stream(tmp_path / "a.webp")), expected[:1])
    found = list(detector.stream(tmp_path / "a.webp", frames="all"))
    assert_same(found, expected)
    assert [each.time_s for each in found] == [0, 0.5, 1.0]
    with pytest.raises(ConfigError, match="unknown frames 'some'"):
        detector.stream(tmp_path, frames="some")  # type: ignore[arg-type]


def test_bad_images_in_their_turn(detector: Detector, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken.avi"
    broken.write_bytes(b"no video")
    floats: NDArray[Any] = np.zeros((64, 64, 3), np.float32)
    cases: list[tuple[Any, type[Exception], str]] = [
        (tmp_path / "gone.png", ImageError, "gone.png' does not exist"),
        (floats, ImageError, "image 2 of the stream, counted from 0: expected a uint8 image"),
        (None, ImageError, "image 2 of the stream, counted from 0: expected an image as a path or a numpy"),
        (tmp_path / "empty", SourceError, "holds no images or videos"),
        (broken, SourceError, "broken.avi' has no frames"),
    ]
    for bad, kind, sentence in cases:
        count, error = first_error(detector.stream([picture(3), picture(0), bad, picture(3)], batch_size=2))
        assert count == 2
        assert type(error) is kind
        assert sentence in str(error)
        assert "\n" not in str(error)


def test_wrong_arguments_are_refused_at_once(detector: Detector, bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match="batch_size is 0"):
        detector.stream([], batch_size=0)
    with pytest.raises(ConfigError, match="unknown channel_order 'gbr'"):
        detector.stream([], channel_order="gbr")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="expected images or names of sources to stream, got int"):
        detector.stream(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="requests is 0; expected at least 1 call at a time"):
        Detector.load(bundle, requests=0)


def test_a_detector_that_is_closed_meanwhile(bundle: Bundle) -> None:
    detector = Detector.load(bundle, threads=1)
    stream = detector.stream(picture(3) for _ in range(50))
    next(stream)
    detector.close()
    count, error = first_error(stream)
    assert count < 5
    assert isinstance(error, BackendError)


def test_threads_are_divided_among_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool that all calls share, and the thread of each caller, are as many as there are cores."""
    assert threads_of_a_call(None, 1) is None
    assert threads_of_a_call(6, 1) == 6
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert [threads_of_a_call(None, requests) for requests in (2, 4, 8, 20)] == [7, 5, 1, 1]
    assert threads_of_a_call(4, 2) == 3


def test_onnxruntime_is_told(bundle: Bundle) -> None:
    network: Any = open_network("onnxruntime", bundle, threads=5, requests=3)
    session = network.stage("backbone")._session
    assert session.get_session_options().intra_op_num_threads == 3


def test_openvino_is_told_compiled_or_cached(bundle: Bundle) -> None:
    missing = BACKENDS["openvino"].problem()
    if missing is not None:
        pytest.skip(str(missing))
    cores = len(os.sched_getaffinity(0))  # it makes no more streams than that
    for requests in (2, 1, 2):
        network: Any = open_network("openvino", bundle, requests=requests)
        model = network.stage("decoder")._model
        assert model.get_property("NUM_STREAMS") == min(requests, cores)
