"""What the server says of itself and its one model, and how it answers, in the Open Inference Protocol."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import numpy as np

from asag_deploy._version import __version__
from asag_deploy.bundle.manifest import Manifest
from asag_deploy.detections import Detections
from asag_deploy.errors import ConfigError
from asag_deploy.serving.endpoints import VERSION
from asag_deploy.serving.limits import RefusedError
from asag_deploy.serving.options import MOST_DEADLINE_MS
from asag_deploy.serving.tensors import INPUT, OUTPUTS
from asag_deploy.serving.texts import shown

TIMEOUT = "timeout"
"""A request's parameter by which clients name a deadline in microseconds."""
SERVER = {"name": "asag-serve", "version": __version__, "extensions": ["binary_tensor_data"]}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


_TIMES = f"expected a number of microseconds, {MOST_DEADLINE_MS * 1000:.0f} at most, or 0 for none"


class Model:
    """The model that is served, by its name."""

    def __init__(self, name: str | None, manifest: Manifest) -> None:
        """Take its name, None for the variant's; raises ConfigError if it cannot stand in an address."""
        self.name = manifest.variant if name is None else name
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"--model-name is '{shown(self.name)}'; it must be of letters, digits, dots, dashes and "
                "underscores"
            )
        self._manifest = manifest

    def check(self, path_params: dict[str, str]) -> None:
        """Raise RefusedError if a request is for another model, or another version."""
        asked, version = path_params["model"], path_params.get("version", VERSION)
        if asked != self.name:
            raise RefusedError(
                HTTPStatus.NOT_FOUND, f"there is no model '{shown(asked)}'; there is '{self.name}' alone"
            )
        if version != VERSION:
            raise RefusedError(
                HTTPStatus.NOT_FOUND,
                f"there is no version '{shown(version)}' of '{self.name}'; there is {VERSION} alone",
            )

    def metadata(self) -> dict[str, Any]:
        """Describe its inputs, outputs and classes."""
        categories = self._manifest.categories
        return {
            "name": self.name,
            "versions": [VERSION],
            "platform": "asag",
            "inputs": [{"name": INPUT, "datatype": "BYTES", "shape": [-1]}],
            "outputs": [
                {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)} for spec in OUTPUTS
            ],
            "properties": {
                "classes": json.dumps([category.name for category in categories]),
                "category_ids": json.dumps([category.id for category in categories]),
            },
        }

    def head(self, request_id: str | None) -> dict[str, Any]:
        """Return what stands in a response beside its outputs."""
        head = {"model_name": self.name, "model_version": VERSION}
        return head if request_id is None else {**head, "id": request_id}


def tensors_of(found: Sequence[Detections]) -> dict[str, Any]:
    """Return the outputs for the images of a request, by name."""
    return {
        "boxes": np.concatenate([each.xyxy for each in found]),
        "scores": np.concatenate([each.confidence for each in found]),
        "labels": np.concatenate([each.class_id for each in found]),
        "counts": np.array([len(each) for each in found], dtype=np.int64),
        "trace": [json.dumps(each.trace.to_dict(), separators=(",", ":")) for each in found],
    }


def named(images: Sequence[bytes]) -> list[tuple[bytes, str]]:
    """Return the image files of a request, each with what sentences call it."""
    return [(data, f"image {i} of {len(images)}") for i, data in enumerate(images, start=1)]


def deadline_name(options: Sequence[tuple[str, Any]]) -> str:
    """Return what a request calls its deadline."""
    return TIMEOUT if any(name == TIMEOUT for name, _ in options) else "deadline_ms"


def with_deadline(options: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Return a request's parameters with `timeout`, in microseconds, as the deadline that it is here.

    0 is none, as clients have it.  Raises RefusedError for what is no number.
    """
    names = {name for name, _ in options}
    if {TIMEOUT, "deadline_ms"} <= names:
        raise _bad_timeout("is given, and so is deadline_ms; give one of them")
    return [
        pair
        for name, value in options
        for pair in (_as_deadline(value) if name == TIMEOUT else [(name, value)])
    ]


def _as_deadline(value: object) -> list[tuple[str, float]]:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise _bad_timeout(f"is of the wrong type; {_TIMES}")
    if not 0 <= value <= MOST_DEADLINE_MS * 1000:
        raise _bad_timeout(f"is {value!r:.40}; {_TIMES}")
    return [("deadline_ms", value / 1000)] if value else []


def _bad_timeout(what: str) -> RefusedError:
    return RefusedError(HTTPStatus.BAD_REQUEST, f"{TIMEOUT} {what}", reason="bad_parameter")
