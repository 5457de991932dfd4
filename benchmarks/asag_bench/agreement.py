"""Whether what is timed finds what the exported network finds: each backend beside the one that was checked.

A bundle's parity report says that its graphs compute what PyTorch does in ONNX Runtime on the CPU.  Of
another backend, or of a quantised bundle, it says nothing: that is seen here, on the pictures that are timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asag_bench.peers import rule_of
from asag_bench.plan import Candidate, Plan
from asag_bench.samples import Picture, Samples
from asag_bench.subjects import DetectorSubject
from asag_deploy.backends import DEFAULT_BACKEND, open_network
from asag_deploy.detections import Detections
from asag_deploy.postprocess import Found

LEAST = 0.98
"""Of detections that float32 must have in common, as in the exporter's parity gate."""

_SCORE, _OVERLAP, _PIXELS = 0.01, 0.9, 0.01


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Of one subject with the reference."""

    pictures: int
    same_stops: int
    """Pictures that stop at the same level."""
    detections: float
    """Mean share of a picture's detections in the reference that the subject has too: the same class, scores
    within 0.01, boxes that overlap by more than 0.9."""

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
    reference = DetectorSubject(DEFAULT_BACKEND, bundle, network, rule_of(bundle.manifest, plan.mode))
    pictures = list({picture.name: picture for s in samples.strata for picture in s.pictures}.values())
    expected = _detect(reference, pictures)
    name = f"{DEFAULT_BACKEND} {bundle.manifest.precision}"
    return name, {subject.name: _compare(expected, _detect(subject, pictures)) for subject in detectors}


def in_common(expected: Detections | Found, found: Detections | Found) -> float:
    """Share of the expected detections that were found, from 0 to 1; 1 if none is expected."""
    if len(expected.confidence) == 0:
        return 1.0
    near = np.abs(expected.confidence[:, None] - found.confidence) < _SCORE
    same_class = expected.class_id[:, None] == found.class_id
    apart = np.abs(expected.xyxy[:, None] - found.xyxy).max(axis=-1)
    # A box without area overlaps nothing, not even itself.
    same_place = (_overlap(expected.xyxy, found.xyxy) > _OVERLAP) | (apart < _PIXELS)
    return float((near & same_class & same_place).any(axis=1).mean())


def _detect(subject: DetectorSubject, pictures: Sequence[Picture]) -> list[Detections]:
    detector = subject.detector()
    return [detector(picture.image, channel_order="rgb") for picture in pictures]


def _compare(expected: Sequence[Detections], found: Sequence[Detections]) -> Agreement:
    pairs = list(zip(expected, found, strict=True))
    return Agreement(
        pictures=len(pairs),
        same_stops=sum(one.trace.exit_level == other.trace.exit_level for one, other in pairs),
        detections=float(np.mean([in_common(one, other) for one, other in pairs])),
    )


def _overlap(boxes: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float32]:
    """Intersection over union of each of (N, 4) with each of (M, 4), x1, y1, x2, y2: (N, M)."""
    low = np.maximum(boxes[:, None, :2], others[:, :2])
    high = np.minimum(boxes[:, None, 2:], others[:, 2:])
    shared = np.prod(np.maximum(high - low, 0), axis=-1)
    areas, other_areas = (np.prod(b[:, 2:] - b[:, :2], axis=-1) for b in (boxes, others))
    union = areas[:, None] + other_areas - shared
    overlap: NDArray[np.float32] = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return overlap
