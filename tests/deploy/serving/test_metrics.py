"""What the server counts, as Prometheus reads it."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from asag_deploy import Detector
from asag_deploy._version import __version__
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.errors import ConfigError
from asag_deploy.serving.app import make_app
from asag_deploy.serving.limits import Limits
from support.served import IMAGE, SECONDS, GatedDetector, Served, in_threads, png, serving, until
from support.tiny_bundle import make_bundle, picture


def scraped(server: Served) -> dict[tuple[str, tuple[str, ...]], float]:
    """Every sample, by its name and the values of its labels in the order of their names."""
    status, text, headers = server.ask_plainly("GET", "/metrics")
    assert status == 200
    assert str(headers["Content-Type"]).startswith("text/plain; version=")
    return {
        (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_what_probing_does_is_counted(tmp_path: Path) -> None:
    """Of images alone: what their requests make of them changes nothing but how deep is probed."""
    bundle: Bundle = make_bundle(tmp_path / "bundle")
    with Detector.load(bundle) as real:
        deep = real(picture(4, 2), channel_order="rgb")
        settings = {"bundle": bundle.fingerprint}
        with serving(real, settings=settings) as server:
            before = scraped(server)
            assert before["asag_exit_level_total", ("P3",)] == 0
            for query in ("", "?threshold=0", "?threshold=1"):
                assert server.detect(png(picture(4, 2)), query)[0] == 200
            assert server.detect(png(picture(4, 2)), "?max_level=P5")[0] == 200
            after = scraped(server)
    assert deep.trace.exit_level == "P3"
    assert after["asag_exit_level_total", ("P3",)] == 3
    assert after["asag_exit_level_total", ("P5",)] == 1
    assert after["asag_stop_total", ("max level",)] == 1
    assert after["asag_patches_sum", ()] == 3 * sum(level.patches for level in deep.trace.levels) + 5
    assert after["asag_patches_count", ()] == 4
    assert after["asag_anchors_count", ()] == 4
    assert after["asag_anchors_sum", ()] >= 3 * deep.trace.anchor_count
    sure = int((deep.confidence >= 0.3).sum())
    assert after["asag_detections_sum", ()] >= 3 * sure > 0
    assert after["asag_scores_count", ()] == after["asag_detections_sum", ()]
    assert after["asag_best_scores_count", ()] == 4
    for stage in ("preprocess", "backbone", "decoder", "total", "queue", "decode"):
        assert after["asag_stage_seconds_count", (stage,)] == 4
    assert after["asag_stage_seconds_count", ("probe_p4",)] == 3
    key = ("onnxruntime", bundle.fingerprint, "fp32", "tiny", __version__)
    assert after["asag_build_info", key] == 1


def test_requests_and_refusals_are_counted(detector: GatedDetector) -> None:
    with serving(detector, max_bytes=10_000) as server:
        server.detect(IMAGE)
        server.detect(b"no image")
        server.detect(IMAGE, "?threshold=2")
        server.detect(bytes(20_000))
        server.ask("GET", "/nowhere")
        server.ask("GET", "/v2/models/other/ready")
        server.ask("DELETE", "/detect")
        server.ask("GET", "/v2/models/other/versions/1/infer")
        assert server.say(b"no HTTP\r\n\r\n").startswith(b"HTTP/1.1 400 ")
        seen = scraped(server)
    for endpoint, status in (
        ("/detect", "200"),
        ("/detect", "422"),
        ("/detect", "400"),
        ("/detect", "413"),
        ("other", "404"),
        ("/v2/models/{model}/ready", "404"),
        ("/detect", "405"),
        ("/v2/models/{model}/versions/{version}/infer", "405"),
        ("none", "400"),
    ):
        assert seen["asag_requests_total", (endpoint, status)] == 1, (endpoint, status)
    for reason in ("not_an_image", "bad_parameter", "content_too_large", "bad_request"):
        assert seen["asag_refusals_total", (reason,)] == 1, reason
    assert seen["asag_refusals_total", ("not_found",)] == 2
    assert seen["asag_request_seconds_count", ("/detect",)] == 5


def test_those_who_wait_are_seen_also_when_the_server_is_full(detector: GatedDetector) -> None:
    detector.gate.clear()
    with serving(detector, queue=2) as server:
        threads, _ = in_threads(3, lambda: server.detect(IMAGE))
        until(lambda: scraped(server)["asag_requests_in_flight", ()] == 3)
        until(lambda: scraped(server)["asag_queue_length", ()] == 2)
        assert server.detect(IMAGE)[0] == 503
        assert scraped(server)["asag_refusals_total", ("busy",)] == 1
        detector.gate.set()
        for thread in threads:
            thread.join(SECONDS)
        seen = scraped(server)
    assert seen["asag_requests_in_flight", ()] == seen["asag_queue_length", ()] == 0


def test_scraping_harms_nobody(detector: GatedDetector) -> None:
    """From several sides, while images are detected in."""
    with serving(detector, requests=2) as server:
        statuses: list[int] = []

        def scrape() -> None:
            for _ in range(20):
                statuses.append(server.ask_plainly("GET", "/metrics")[0])

        scrapers = [threading.Thread(target=scrape) for _ in range(3)]
        for thread in scrapers:
            thread.start()
        statuses += [server.detect(IMAGE)[0] for _ in range(20)]
        for thread in scrapers:
            thread.join(SECONDS)
        assert set(statuses) == {200}
        assert len(statuses) == 80
        assert scraped(server)["asag_patches_count", ()] == 20


def test_two_servers_count_apart(detector: GatedDetector) -> None:
    with serving(detector) as one, serving(GatedDetector()) as other:
        one.detect(IMAGE)
        assert scraped(one)["asag_requests_total", ("/detect", "200")] == 1
        assert ("asag_requests_total", ("/detect", "200")) not in scraped(other)


def test_a_client_that_has_gone_is_no_refusal(detector: GatedDetector) -> None:
    detector.gate.clear()
    with serving(detector) as server:
        threads, _ = in_threads(1, lambda: server.detect(IMAGE))
        until(lambda: detector.running == 1)
        server.leave(b"POST /detect HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(IMAGE) + IMAGE)
        until(lambda: ("asag_requests_total", ("/detect", "499")) in scraped(server))
        detector.gate.set()
        threads[0].join(SECONDS)
        assert not any(name == "asag_refusals_total" for name, _ in scraped(server))


def test_without_prometheus_client(monkeypatch: pytest.MonkeyPatch, detector: GatedDetector) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigError, match=r"pip install 'asag-deploy\[serve\]'"):
        make_app(detector, Limits(), backend="onnxruntime", threshold=0.3)


def test_whether_it_is_ready_is_seen(detector: GatedDetector) -> None:
    detector.gate.clear()
    with serving(detector, settings={"warm_up": True}) as server:
        assert scraped(server)["asag_ready", ()] == 0
        assert server.ask("GET", "/v2/health/ready")[0] == 503
        detector.gate.set()
        until(lambda: server.ask("GET", "/v2/health/ready")[0] == 200)
        assert scraped(server)["asag_ready", ()] == 1
