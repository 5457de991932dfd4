"""What an export may be asked for; the command line names it before anything heavy is imported."""

from __future__ import annotations

from asag_deploy.bundle.manifest import Precision
from asag_deploy.engines.adapter import FORMATS as ENGINE_FORMATS

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")
FORMATS = ("onnx", *ENGINE_FORMATS)
OPSETS = range(18, 24)
DEFAULT_OPSET = 20
