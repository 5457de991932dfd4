"""Every endpoint of the server: by this table requests are routed and the OpenAPI document is written."""

from __future__ import annotations

import re
from dataclasses import dataclass

VERSION = "1"
"""Of the one model that is served."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A path and a method that are answered."""

    method: str
    path: str
    """`{model}` and `{version}` stand for a segment."""
    handler: str
    """The method of `app.Handlers` that answers."""
    summary: str
    of_crowd: bool = False
    """Whether it is answered on connections beyond those that are let in: it watches the server."""


_MODEL, _VERSION = "/v2/models/{model}", "/v2/models/{model}/versions/{version}"


def _both(path: str, method: str, handler: str, summary: str) -> tuple[Endpoint, Endpoint]:
    """Return an endpoint of the model, and of its one version."""
    plain = Endpoint(method=method, path=_MODEL + path, handler=handler, summary=summary)
    versioned = Endpoint(
        method=method,
        path=_VERSION + path,
        handler=handler,
        summary=f"{summary}, by version (there is {VERSION})",
    )
    return plain, versioned


ENDPOINTS = (
    Endpoint(method="POST", path="/detect", handler="detect", summary="Detect in the image that the body is"),
    Endpoint(
        method="GET", path="/health", handler="health", summary="Whether the server listens", of_crowd=True
    ),
    Endpoint(
        method="GET",
        path="/metrics",
        handler="metrics",
        summary="Figures in Prometheus' format",
        of_crowd=True,
    ),
    Endpoint(method="GET", path="/openapi.json", handler="openapi", summary="This document"),
    Endpoint(method="GET", path="/v2", handler="v2_server", summary="What the server is"),
    Endpoint(
        method="GET",
        path="/v2/health/live",
        handler="v2_live",
        summary="Whether the server listens",
        of_crowd=True,
    ),
    Endpoint(
        method="GET",
        path="/v2/health/ready",
        handler="v2_ready",
        summary="Whether requests may be sent: it is warm, and not about to stop",
        of_crowd=True,
    ),
    *_both("", "GET", "v2_model", "Inputs and outputs of the model"),
    *_both("/ready", "GET", "v2_model_ready", "Whether the model may be asked"),
    *_both("/infer", "POST", "v2_infer", "Detect in images by the Open Inference Protocol"),
)
"""All there are."""
OF_CROWD = frozenset(endpoint.path for endpoint in ENDPOINTS if endpoint.of_crowd)


def known_path(path: str) -> str | None:
    """Return the path of the table that a request's is, whatever its method; None if it is none of them."""
    for endpoint in ENDPOINTS:
        if re.fullmatch(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(endpoint.path)), path):
            return endpoint.path
    return None


def listed() -> str:
    """Name what there is, for a sentence."""
    return "POST /detect, with an image as the body, GET /health, and the others that GET /openapi.json lists"
