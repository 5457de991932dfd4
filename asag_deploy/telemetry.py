"""Libraries that report to their makers how they are used: here they do not.

ONNX Runtime would leave a number of this machine and a queue of reports in the user's home folder as soon as
it is imported, and OpenVINO a number of the user.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_OPENVINO = "openvino_telemetry"


def silence_onnxruntime() -> None:
    """Keep ONNX Runtime silent once it is imported, unless ORT_DISABLE_TELEMETRY is set, to 0 perhaps."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


@contextmanager
def silent_openvino() -> Iterator[None]:
    """Let the body import OpenVINO as if its package of reports was not installed, which it does without."""
    if _OPENVINO in sys.modules:  # the program itself has imported it
        yield
        return
    sys.modules[_OPENVINO] = None  # type: ignore[assignment]  # Python's word for what cannot be imported
    try:
        yield
    finally:
        del sys.modules[_OPENVINO]
