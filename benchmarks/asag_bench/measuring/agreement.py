"""Whether what is timed finds what the exported network finds: each backend beside the one that was checked.

A bundle's parity report says that its graphs compute what PyTorch does in ONNX Runtime on the CPU.  Of
another backend, or of a quantised bundle, it says nothing: that is seen here, on the pictures that are timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from asag_bench.measuring.plan import Candidate, Plan
from asag_bench.measuring.samples import Picture, Samples
from asag_bench.runners.peers import rule_of
from asag_bench.runners.subjects import DetectorSubject
from asag_deploy.backends import DEFAULT_BACKEND, open_network
from asag_deploy.detections import Detections
from asag_export.gate.parity import Found, in_common


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Of one subject with the reference."""

    pictures: int
    same_stops: int
    """Pictures that stop at the same level."""
    detections: float
    """Mean share of a picture's detections in the reference that the subject has too: see `in_common`."""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return dict(vars(self))


def measure_agreement(
    plan: Plan, chosen: Sequence[Candidate], detectors: Sequence[DetectorSubject], samples: Samples
) -> tuple[str, dict[str, Agreement]]:
    """What is compared with, in words, and every detector's agreement with it on the pictures that are timed.

    The reference is ONNX Runtime on the CPU with the first float32 bundle, or with the first if none is.
    """
    bundles = [candidate.bundle for candidate in chosen]
    bundle = next((b for b in bundles if b.manifest.precision == "fp32"), bundles[0])
    network = open_network(DEFAULT_BACKEND, bundle, plan.threads)
    reference = DetectorSubject(
        DEFAULT_BACKEND, bundle.manifest, network, rule_of(bundle.manifest, plan.mode)
    )
    pictures = list({picture.name: picture for s in samples.strata for picture in s.pictures}.values())
    expected = _detect(reference, pictures)
    name = f"{DEFAULT_BACKEND} {bundle.manifest.precision}"
    return name, {subject.name: _compare(expected, _detect(subject, pictures)) for subject in detectors}


def _detect(subject: DetectorSubject, pictures: Sequence[Picture]) -> list[Detections]:
    detector = subject.detector()
    return [detector(picture.image, channel_order="rgb") for picture in pictures]


def _found(detections: Detections) -> Found:
    return Found(scores=detections.confidence, classes=detections.class_id, boxes=detections.xyxy)


def _compare(expected: Sequence[Detections], found: Sequence[Detections]) -> Agreement:
    pairs = list(zip(expected, found, strict=True))
    return Agreement(
        pictures=len(pairs),
        same_stops=sum(one.trace.exit_level == other.trace.exit_level for one, other in pairs),
        detections=float(np.mean([in_common(_found(one), _found(other)) for one, other in pairs])),
    )
