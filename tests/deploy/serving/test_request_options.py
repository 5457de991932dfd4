"""What a request may ask for, by query, form or JSON, and when its deadline passes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from asag_deploy import Detector
from asag_deploy.images.reading import decode_image
from asag_deploy.serving import options, service
from asag_deploy.serving.batching import Batching
from asag_deploy.serving.limits import RefusedError
from asag_deploy.serving.options import PARAMETERS, Defaults, checked, read_asked
from support.detection_samples import make_detections
from support.served import IMAGE, SECONDS, GatedDetector, Served, in_threads, png, serving, until
from support.tiny_bundle import ANCHOR_CAP, make_bundle, picture, tiny_manifest

DEEP = png(picture(4, 2))
"""The tiny network goes to P3 in it."""


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Detector]:
    with Detector.load(make_bundle(tmp_path_factory.mktemp("serving") / "bundle")) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def served(real: Detector) -> Iterator[Served]:
    with serving(real) as server:
        yield server


@pytest.mark.parametrize(
    ("query", "asked"),
    [
        ("max_level=P4", {"max_level": "P4"}),
        ("mode=fast&threshold=0", {"mode": "fast", "threshold": 0}),
        ("anchor_cap=6&threshold=0", {"anchor_cap": 6, "threshold": 0}),
        ("max_detections=2&threshold=0", {"max_detections": 2, "threshold": 0}),
        ("threshold=0.9&max_detections=1", {"threshold": 0.9, "max_detections": 1}),
    ],
)
def test_answer_is_that_of_the_detector_asked_so(
    served: Served, real: Detector, query: str, asked: dict[str, Any]
) -> None:
    """Also of number and threshold, which are applied to what has been found."""
    status, answer = served.detect(DEEP, f"?{query}")
    expected = real(picture(4, 2), channel_order="rgb", **{"threshold": 0.3, **asked}).to_json()
    assert status == 200
    assert {**answer, "times_ms": None} == {**expected, "times_ms": None}
    assert answer["trace"] != served.detect(DEEP)[1]["trace"] or "max_detections" in asked


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("deadline_ms=0", "deadline_ms is '0', which is not a number above 0"),
        ("deadline_ms=-1", "deadline_ms is '-1'"),
        ("deadline_ms=inf", "deadline_ms is 'inf'"),
        ("deadline_ms=nan", "deadline_ms is 'nan'"),
        ("deadline_ms=1_000", "deadline_ms is '1_000', which is not a number above 0"),
        ("threshold=%200.5", "threshold is ' 0.5', which is not a number between 0 and 1"),
        ("threshold=0.%D9%A5", "threshold is '0.\u0665', which"),
        ("max_detections=0_1", "max_detections is '0_1', which is not a whole number"),
        ("anchor_cap=%D9%A6", "anchor_cap is '\u0666', which"),
        ("max_level=P2", "max_level is 'P2', which is not one of P5, P4, P3"),
        ("max_level=p4", "max_level is 'p4'"),
        ("mode=slow", "mode is 'slow', which is not one of exact, fast"),
        (f"anchor_cap={ANCHOR_CAP + 1}", f"not a whole number between 5 and {ANCHOR_CAP}"),
        ("anchor_cap=4", "anchor_cap is '4'"),
        ("anchor_cap=6.0", "anchor_cap is '6.0'"),
        ("max_detections=0", "max_detections is '0', which is not a whole number between 1 and 10"),
        ("max_detections=" + "9" * 1000, "max_detections is '9999"),
        ("max_level=", "max_level is ''"),
        ("tresh=1", "unknown parameter 'tresh'; there are threshold, mode, max_level, deadline_ms, max_det"),
        ("mode=fast&mode=fast", "mode is given more than once"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(served: Served, query: str, sentence: str) -> None:
    status, answer = served.detect(DEEP, f"?{query}")
    assert (status, list(answer)) == (400, ["error"])
    assert sentence in answer["error"]
    assert len(answer["error"].splitlines()) == 1


def test_a_bundle_is_asked_for_no_more_than_it_has() -> None:
    manifest = tiny_manifest(levels=("P4",), mode="fast")
    fixed = dataclasses.replace(manifest.probing, cap_can_be_lowered=False)
    manifest = dataclasses.replace(manifest, probing=fixed)
    schemas = {p.name: p.schema(manifest) for p in PARAMETERS}
    with pytest.raises(RefusedError, match=f"not {ANCHOR_CAP}, the only value that this bundle takes"):
        checked("anchor_cap", schemas["anchor_cap"], "6")
    assert schemas["max_level"]["enum"] == ["P5", "P4"]
    assert schemas["mode"]["enum"] == ["fast"]


def test_the_servers_own_values_hold_where_a_request_names_none() -> None:
    defaults = Defaults(threshold=0.2, deadline_ms=50, max_detections=2)
    asked = read_asked([("max_level", "P4")], tiny_manifest(), defaults)
    assert (asked.threshold, asked.deadline_ms, asked.max_detections) == (0.2, 50, 2)
    assert (asked.call, asked.given) == ({"max_level": "P4"}, {"max_level": "P4"})
    assert len(asked.of(make_detections())) == 2
    more = read_asked([("max_detections", "3"), ("threshold", "0")], tiny_manifest(), defaults)
    assert len(more.of(make_detections())) == 3


def test_a_deadline_that_passes_before_its_turn(detector: GatedDetector) -> None:
    detector.gate.clear()
    with serving(detector) as server:
        threads, results = in_threads(1, lambda: server.detect(IMAGE)[0])
        until(lambda: detector.running == 1)
        status, told, headers = server.ask("POST", "/detect?deadline_ms=20", IMAGE)
        assert (status, headers["Retry-After"]) == (503, "1")
        assert "the 20 ms of deadline_ms had passed before the network had time" in told["error"]
        detector.gate.set()
        threads[0].join(SECONDS)
        assert results == [200]
        assert detector.calls == 1
        assert server.ask("GET", "/health")[1]["requests"] == 0


def test_a_deadline_that_passes_while_the_body_is_awaited(detector: GatedDetector) -> None:
    head = "POST /detect?deadline_ms=20 HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc"
    with serving(detector) as server:
        assert server.say(head.encode()).startswith(b"HTTP/1.1 503 ")


def test_a_deadline_that_passes_where_all_places_are_taken(detector: GatedDetector) -> None:
    detector.gate.clear()
    with serving(detector, queue=0) as server:
        threads, _ = in_threads(1, lambda: server.detect(IMAGE)[0])
        until(lambda: detector.running == 1)
        assert "deadline_ms had passed" in server.detect(IMAGE, "?deadline_ms=1")[1]["error"]
        detector.gate.set()
        threads[0].join(SECONDS)


def test_the_detector_gets_what_is_left_of_a_deadline(detector: GatedDetector) -> None:
    with serving(detector, settings={"deadline_ms": 30_000}) as server:
        assert server.detect(IMAGE)[0] == 200
        assert server.detect(IMAGE, "?deadline_ms=20000")[0] == 200
    own, asked = (call["deadline_ms"] for call in detector.asked)
    assert 0 < asked < 20_000 < own < 30_000


def test_no_deadline_is_none(detector: GatedDetector) -> None:
    with serving(detector) as server:
        server.detect(IMAGE, f"?mode=exact&anchor_cap={ANCHOR_CAP}&threshold=0.5")
    assert detector.asked == [{"mode": "exact", "anchor_cap": ANCHOR_CAP}]


@pytest.mark.parametrize("batch", [1, 2])
def test_a_deadline_that_passes_while_the_image_is_decoded(
    monkeypatch: pytest.MonkeyPatch, real: Detector, batch: int
) -> None:
    """Here that takes an hour.  Its turn has come; but with batches, it still waits for the network."""
    late = [0.0]

    def decode(*given: Any, **options: Any) -> Any:
        late[0] = 3600.0
        return decode_image(*given, **options)

    monkeypatch.setattr(options, "time", SimpleNamespace(perf_counter=lambda: time.perf_counter() + late[0]))
    monkeypatch.setattr(service, "decode_image", decode)
    with serving(real, settings={"batching": Batching(images=batch)}) as server:
        status, answer = server.detect(DEEP, "?deadline_ms=60000")
    if batch > 1:
        assert (status, "deadline_ms had passed" in answer["error"]) == (503, True)
        return
    assert status == 200
    assert answer["trace"]["stop"] == "deadline"
    assert answer["trace"]["exit_level"] == "P5"


@pytest.mark.parametrize("batch", [1, 2])
def test_the_greatest_deadline_lifts_that_of_the_server(detector: GatedDetector, batch: int) -> None:
    """As if there were none: with batches, such images go together."""
    settings = {"deadline_ms": 50.0, "batching": Batching(images=batch, wait_ms=60_000)}
    with serving(detector, settings=settings) as server:
        task = partial(server.detect, IMAGE, f"?deadline_ms={options.MOST_DEADLINE_MS:.0f}")
        threads, results = in_threads(batch, task)
        for thread in threads:
            thread.join(SECONDS)
    assert [status for status, _ in results] == [200] * batch
    assert detector.asked == [{}]
    assert detector.batches == [batch]


def test_a_server_told_the_most_detections(tmp_path: Path, real: Detector) -> None:
    with serving(real, settings={"max_detections": 1, "threshold": 0.0}) as server:
        assert len(server.detect(DEEP)[1]["detections"]) == 1
        assert len(server.detect(DEEP, "?max_detections=2")[1]["detections"]) == 2
