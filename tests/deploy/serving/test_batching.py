"""Images of several requests that go through the network together."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from asag_deploy import Detector
from asag_deploy.errors import BackendError, ConfigError, ImageError
from asag_deploy.serving import options as serving_options
from asag_deploy.serving.batching import Batcher, Batching
from asag_deploy.serving.limits import RefusedError
from asag_deploy.serving.options import Deadline
from support.detection_samples import make_detections
from support.served import IMAGE, SECONDS, GatedDetector, Served, in_threads, png, serving, until
from support.tiny_bundle import make_bundle, picture

LONG = Batching(images=3, wait_ms=60_000)
"""A batch that is not full goes only when the network is told to."""


def together(server: Served, queries: list[str], images: list[bytes] | None = None) -> list[Any]:
    """Send requests at once; return their threads and answers."""
    files = [IMAGE] * len(queries) if images is None else images
    return [
        in_threads(1, partial(server.detect, image, query))
        for image, query in zip(files, queries, strict=True)
    ]


def answers(sent: list[Any]) -> list[Any]:
    for threads, _ in sent:
        threads[0].join(SECONDS)
    return [results[0] for _, results in sent]


def test_a_full_batch_goes_at_once(detector: GatedDetector) -> None:
    """Threshold and number may differ."""
    with serving(detector, settings={"batching": LONG}) as server:
        sent = together(server, ["?threshold=0", "?threshold=0.6", "?threshold=0&max_detections=2"])
        found = [len(answer["detections"]) for _, answer in answers(sent)]
        text = server.ask_plainly("GET", "/metrics")[1].decode()
    assert detector.batches == [3]
    assert found == [3, 1, 2]
    assert "asag_batch_images_sum 3.0" in text


def test_a_batch_goes_when_it_has_waited(detector: GatedDetector) -> None:
    with serving(detector, settings={"batching": Batching(images=3, wait_ms=1)}) as server:
        assert server.detect(IMAGE)[0] == 200
    assert detector.batches == [1]


@pytest.mark.parametrize("other", ["?mode=fast", "?deadline_ms=60000", ""])
def test_what_differs_is_not_mixed(detector: GatedDetector, other: str) -> None:
    """Options, a deadline, or the size at which an image reaches the network."""
    small = png(picture(3, size=(64, 96))) if not other else IMAGE
    with serving(detector, requests=2, settings={"batching": Batching(images=2, wait_ms=60_000)}) as server:
        sent = together(server, ["", other, "", other], [IMAGE, small, IMAGE, small])
        assert [status for status, _ in answers(sent)] == [200] * 4
    assert sorted(detector.batches) == ([1, 1, 2] if "deadline" in other else [2, 2])


def test_batches_fill_while_the_network_is_busy(detector: GatedDetector) -> None:
    detector.gate.clear()
    with serving(detector, settings={"batching": Batching(images=4, wait_ms=0)}) as server:
        sent = together(server, [""])
        until(lambda: detector.running == 1)
        sent += together(server, ["", "", ""])
        until(lambda: server.ask("GET", "/health")[1]["requests"] == 4)
        until(lambda: "asag_queue_length 0.0" in server.ask_plainly("GET", "/metrics")[1].decode())
        detector.gate.set()
        assert [status for status, _ in answers(sent)] == [200] * 4
    assert detector.batches[0] == 1
    assert sum(detector.batches) == 4
    assert len(detector.batches) < 4


def test_a_deadline_counts_the_wait_for_the_network(detector: GatedDetector) -> None:
    """One that passes is told while the network is busy; of another the detector gets what is left."""
    detector.gate.clear()
    with serving(detector, settings={"batching": Batching(images=4, wait_ms=0)}) as server:
        busy = together(server, [""])
        until(lambda: detector.running == 1)
        status, answer = server.detect(IMAGE, "?deadline_ms=100")
        assert (status, "100 ms of deadline_ms had passed" in answer["error"]) == (503, True)
        assert detector.running == 1
        patient = together(server, ["?deadline_ms=30000"])
        until(lambda: server.ask("GET", "/health")[1]["requests"] == 2)
        time.sleep(0.05)
        detector.gate.set()
        assert [status for status, _ in answers(busy + patient)] == [200, 200]
    assert detector.batches == [1, 1]
    assert 0 < detector.asked[1]["deadline_ms"] <= 29_950


def test_a_deadline_that_has_passed_when_the_network_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing has looked at the clock between: no network's time is taken for it."""
    late = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + late[0])
    monkeypatch.setattr(serving_options, "time", clock)
    calls: list[int] = []

    def detect(images: list[Any], options: Any) -> list[Any]:
        calls.append(len(images))
        gate.wait(SECONDS)
        late[0] = 3600.0
        return [make_detections(image.shape[:2]) for image in images]

    async def both() -> list[Any]:
        with ThreadPoolExecutor(1) as pool:
            batcher = Batcher(Batching(images=2, wait_ms=0), detect, pool=pool, batches=1)
            sent = []
            for milliseconds in (None, 60_000):
                deadline = Deadline(time.perf_counter(), milliseconds)
                sent.append(asyncio.ensure_future(batcher.detect(picture(3), (64, 64), {}, deadline)))
                await asyncio.sleep(0)
                while not calls:
                    await asyncio.sleep(0.001)
            gate.set()
            return await asyncio.gather(*sent, return_exceptions=True)

    gate = threading.Event()
    fine, refused = asyncio.run(both())
    assert len(fine)
    assert isinstance(refused, RefusedError)
    assert calls == [1]


def test_an_image_that_is_refused_harms_no_other(detector: GatedDetector) -> None:
    class Picky(GatedDetector):
        def __call__(self, images: Any, **options: Any) -> Any:
            super().__call__(images, **options)
            if any(image.shape[0] == 65 for image in images):
                raise ImageError("this one is odd")
            return [make_detections(image.shape[:2]) for image in images]

    picky = Picky()
    odd = png(picture(3, size=(65, 65)))  # it reaches the network as the others do
    with serving(picky, settings={"batching": LONG}) as server:
        found = answers(together(server, ["", "", ""], [IMAGE, odd, IMAGE]))
    assert [status for status, _ in found] == [200, 422, 200]
    assert found[1][1]["error"] == "this one is odd"


def test_a_failure_is_that_of_all(detector: GatedDetector) -> None:
    detector.error = BackendError("out of memory")
    with serving(detector, settings={"batching": LONG}) as server:
        assert {status for status, _ in answers(together(server, ["", "", ""]))} == {500}
        detector.error = None
        assert {status for status, _ in answers(together(server, ["", "", ""]))} == {200}


def test_what_cannot_be_read_takes_no_place_in_a_batch(detector: GatedDetector) -> None:
    with serving(detector, settings={"batching": Batching(images=2, wait_ms=60_000)}) as server:
        assert server.detect(b"no image")[0] == 422
        assert [status for status, _ in answers(together(server, ["", ""]))] == [200, 200]
    assert detector.batches == [2]


def test_answers_are_those_of_images_alone(tmp_path: Path) -> None:
    pictures = [picture(4, 2), picture(0), picture(3)]
    with Detector.load(make_bundle(tmp_path / "bundle")) as real:
        alone = [real(image, channel_order="rgb").filter(0.3).to_json() for image in pictures]
        with serving(real, settings={"batching": LONG}) as server:
            found = answers(together(server, ["", "", ""], [png(image) for image in pictures]))
    for (status, answer), expected in zip(found, alone, strict=True):
        assert status == 200
        assert {**answer, "times_ms": None} == {**expected, "times_ms": None}


def test_images_of_one_inference_request_are_a_batch(detector: GatedDetector) -> None:
    data = [base64.b64encode(IMAGE).decode()] * 3
    tensor = {"name": "image", "datatype": "BYTES", "shape": [3], "data": data}
    body = json.dumps({"inputs": [tensor]}).encode()
    with serving(detector, settings={"batching": LONG}) as server:
        assert server.ask("POST", "/v2/models/tiny/infer", body)[0] == 200
    assert detector.batches == [3]


@pytest.mark.parametrize("wrong", [{"images": 0}, {"images": 999}, {"wait_ms": -1}, {"wait_ms": math.nan}])
def test_batches_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        Batching(**wrong)
