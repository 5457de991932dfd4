"""ASAG object detection without PyTorch: load an exported bundle, detect, and see how the network looked.

Example:
    from asag_deploy import Detector

    with Detector.load("bundle") as detector:
        detections = detector("street.jpg")
        print(detections.names, detections.trace.exit_level)
"""

from asag_deploy import _start as _start  # first of all: the rest takes a while to import
from asag_deploy._version import __version__
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import Category
from asag_deploy.call_options import CallOptions
from asag_deploy.detections import Detections
from asag_deploy.detector import Detector, RawOutput
from asag_deploy.errors import (
    AsagError,
    BackendError,
    BundleCorruptError,
    BundleError,
    BundleNotFoundError,
    BundleVersionError,
    CaptureError,
    CheckpointError,
    ConfigError,
    DataError,
    DownloadError,
    EngineError,
    EngineMissingError,
    EngineStaleError,
    EngineUnfitError,
    ExportError,
    FieldError,
    GpuMemoryError,
    ImageError,
    OutputError,
    ParityError,
    SourceError,
    TrainingError,
)
from asag_deploy.loop.trace import LevelCandidates, LevelTrace, ProbingTrace, StopReason
from asag_deploy.telemetry import silence_onnxruntime as _silence_onnxruntime

__all__ = [
    "AsagError",
    "BackendError",
    "Bundle",
    "BundleCorruptError",
    "BundleError",
    "BundleNotFoundError",
    "BundleVersionError",
    "CallOptions",
    "CaptureError",
    "Category",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Detections",
    "Detector",
    "DownloadError",
    "EngineError",
    "EngineMissingError",
    "EngineStaleError",
    "EngineUnfitError",
    "ExportError",
    "FieldError",
    "GpuMemoryError",
    "ImageError",
    "LevelCandidates",
    "LevelTrace",
    "OutputError",
    "ParityError",
    "ProbingTrace",
    "RawOutput",
    "SourceError",
    "StopReason",
    "TrainingError",
    "__version__",
]

_silence_onnxruntime()  # nothing above imports it: that takes a detector
