"""What the server counts and measures, for Prometheus to fetch from `/metrics`.

Beside the usual figures of a service these are the ones by which it shows that its images have changed: how
deep the network probes, how many patches and anchors it needs, how much it finds and how sure it is.  They
are taken before a request's own threshold, so that they speak of the images alone.

prometheus-client is imported when the first `Metrics` is made; each has a registry of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from asag_deploy._version import __version__
from asag_deploy.bundle.manifest import FIRST_LEVEL, Manifest
from asag_deploy.detections import Detections
from asag_deploy.errors import ConfigError
from asag_deploy.extras import missing
from asag_deploy.loop.trace import StopReason
from asag_deploy.serving.exchange import Exchange

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_PATCHES = (4, 5, 6, 8, 10, 15, 20, 30, 40, 60, 80)
_ANCHORS = (10, 25, 50, 75, 100, 150, 200, 250, 300)
_DETECTIONS = (0, 1, 2, 3, 5, 10, 20, 50, 100)
_SCORES = tuple(number / 20 for number in range(1, 20))
_GONE = "499"
"""Where a client has gone before it was answered, as other servers have it."""


class Metrics:
    """The figures of one server.  Its methods are for the event loop's thread."""

    def __init__(self, manifest: Manifest, *, backend: str, bundle: str, threshold: float) -> None:
        """Make the figures; raises ConfigError if prometheus-client is missing.

        bundle: what tells the bundle from others; threshold: from which confidence detections are counted.
        """
        try:
            from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
        except ImportError as error:
            raise ConfigError(missing(error, "asag-serve", purpose="serving")) from None
        self._threshold = threshold
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)

        def counter(name: str, text: str, labels: Sequence[str] = ()) -> Any:
            return Counter(f"asag_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Any:
            return Histogram(f"asag_{name}", text, labels, buckets=buckets, registry=self.registry)

        def gauge(name: str, text: str, labels: Sequence[str] = ()) -> Any:
            return Gauge(f"asag_{name}", text, labels, registry=self.registry)

        of_request = ("endpoint",)
        self._requests = counter("requests", "Requests, by endpoint and status", (*of_request, "status"))
        self._request_seconds = histogram(
            "request_seconds", "From a request's arrival to the end of its answer", _SECONDS, of_request
        )
        self._refusals = counter("refusals", "Requests that were refused, by reason", ("reason",))
        self._stage_seconds = histogram(
            "stage_seconds",
            "Time of each stage of a detection and of its total, of decoding the file, and in the queue",
            _SECONDS,
            ("stage",),
        )
        self._batch_images = histogram(
            "batch_images", "Images that went through the network together", (1, 2, 4, 8, 16)
        )
        self._exit_level = counter("exit_level", "Images, by the deepest level that was probed", ("level",))
        self._stop = counter("stop", "Images, by why probing went no further", ("reason",))
        self._patches = histogram("patches", "Patches of an image that were predicted on", _PATCHES)
        self._anchors = histogram("anchors", "Anchors of an image that reached the decoder", _ANCHORS)
        self._detections = histogram(
            "detections", "Detections of an image at the server's own threshold", _DETECTIONS
        )
        self._scores = histogram(
            "scores", "Confidence of the detections at the server's own threshold", _SCORES
        )
        self._best_scores = histogram(
            "best_scores", "Greatest confidence in an image, below the threshold too", _SCORES
        )
        self.in_flight = gauge(
            "requests_in_flight", "Requests whose images are read, wait or are detected in"
        )
        self.ready = gauge("ready", "1 while requests may be sent, as /v2/health/ready has it; 0 otherwise")
        self.queue_length = gauge("queue_length", "Images that wait for the network")
        self.lost_log_lines = counter(
            "access_log_lost_lines", "Lines of the access log that could not be written"
        )
        gauge(
            "build_info", "What is served", ("version", "variant", "backend", "precision", "bundle")
        ).labels(__version__, manifest.variant, backend, manifest.precision, bundle).set(1)
        self._begin_at_zero(manifest)

    def _begin_at_zero(self, manifest: Manifest) -> None:
        """Show what has not happened yet, so that its first time is seen as a rise."""
        for level in (FIRST_LEVEL, *(level.level for level in manifest.probing.levels)):
            self._exit_level.labels(level)
        for reason in StopReason:
            self._stop.labels(reason.value)

    def answered(self, exchange: Exchange, seconds: float) -> None:
        """Count a request that has come to its end after so long."""
        status = _GONE if exchange.client_gone else str(exchange.status)
        self._requests.labels(exchange.endpoint, status).inc()
        self._request_seconds.labels(exchange.endpoint).observe(seconds)
        if exchange.refused is not None:
            self._refusals.labels(exchange.refused.reason).inc()

    def turned_away(self, status: int, reason: str) -> None:
        """Count a connection that was answered before there was a request."""
        self._requests.labels("none", str(status)).inc()
        self._refusals.labels(reason).inc()

    def detected(self, found: Detections, *, queue_ms: float, decode_ms: float) -> None:
        """Count an image that was detected in, whatever its request makes of it."""
        for stage, milliseconds in {**found.times_ms, "queue": queue_ms, "decode": decode_ms}.items():
            self._stage_seconds.labels(stage).observe(milliseconds / 1000)
        trace = found.trace
        self._exit_level.labels(trace.exit_level).inc()
        self._stop.labels(trace.stop.value).inc()
        self._patches.observe(sum(level.patches for level in trace.levels))
        self._anchors.observe(trace.anchor_count)
        scores = found.confidence[found.confidence >= self._threshold].tolist()
        self._detections.observe(len(scores))
        for score in scores:
            self._scores.observe(score)
        self._best_scores.observe(float(found.confidence[0]) if len(found) else 0.0)

    def batched(self, images: int) -> None:
        """Count a batch of so many images."""
        self._batch_images.observe(images)

    def text(self) -> tuple[bytes, str]:
        """Return everything in Prometheus' text format, and the media type of that."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self.registry), CONTENT_TYPE_LATEST
