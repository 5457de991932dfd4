"""What the parity gate found, as data and as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from asag_deploy.bundle.manifest import Precision
from asag_evaluation.metrics.overlaps import iou

LEAST_IN_COMMON = 0.98
"""Share of detections that two runs of one network in float32 have in common, end to end."""

_SCORE, _OVERLAP = 0.01, 0.9


@dataclass(frozen=True, kw_only=True)
class StageParity:
    """The worst that one output of one graph showed over all cases."""

    stage: str
    output: str
    difference: float
    """Largest absolute difference; for decisions, how many entries differed."""
    tolerance: float
    cases: int
    passed: bool


@dataclass(frozen=True, kw_only=True)
class RunParity:
    """One image or batch, end to end."""

    case: str
    stops: tuple[str, ...]
    """Why each image stopped, as PyTorch decided."""
    same_stops: bool
    agreement: float
    """Share of PyTorch's detections that the bundle has too: same class, IoU over 0.9, score within 0.01."""
    passed: bool


@dataclass(frozen=True, kw_only=True)
class Check:
    """Something that must hold of every graph, whatever PyTorch computes."""

    name: str
    """One of the names in `asag_export.gate.checks`."""
    rows: tuple[StageParity, ...]
    """The worst output of each graph."""

    @property
    def passed(self) -> bool:
        """Whether it holds."""
        return all(row.passed for row in self.rows)


@dataclass(kw_only=True)
class ParityReport:
    """Result of the gate."""

    backend: str
    precision: Precision
    stages: list[StageParity] = field(default_factory=list)
    runs: list[RunParity] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether the bundle may be used."""
        parts: list[StageParity | RunParity | Check] = [*self.stages, *self.runs, *self.checks]
        return all(part.passed for part in parts)

    def failures(self) -> Iterator[tuple[str, StageParity]]:
        """Yield each row that failed with the name of its check, empty for the comparison with PyTorch."""
        yield from (("", row) for row in self.stages if not row.passed)
        for check in self.checks:
            yield from ((check.name, row) for row in check.rows if not row.passed)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values, for the manifest."""
        return {
            "passed": self.passed,
            "backend": self.backend,
            "precision": self.precision,
            "stages": [dict(vars(row)) for row in self.stages],
            "runs": [{**vars(run), "stops": list(run.stops)} for run in self.runs],
            "checks": [
                {"name": check.name, "passed": check.passed, "rows": [dict(vars(row)) for row in check.rows]}
                for check in self.checks
            ],
        }


def largest_difference(expected: NDArray[Any], actual: NDArray[Any]) -> float:
    """Return the largest absolute difference; infinite if the shapes differ or a value is not finite."""
    if expected.shape != actual.shape or not np.isfinite(actual).all():
        return float("inf")
    return float(np.abs(expected.astype(np.float64) - actual).max(initial=0.0))


class Found(NamedTuple):
    """The detections of one image: n scores, classes, and boxes (n, 4) x1, y1, x2, y2 in any unit."""

    scores: NDArray[Any]
    classes: NDArray[Any]
    boxes: NDArray[Any]


def in_common(expected: Found, found: Found) -> float:
    """Return the share of the expected detections that were found, from 0 to 1; 1 if none is expected.

    One is found if another has its class, a score within 0.01 and a box that overlaps by more than 0.9.
    """
    if len(expected.scores) == 0:
        return 1.0
    near = np.abs(expected.scores[:, None] - found.scores) < _SCORE
    same_class = expected.classes[:, None] == found.classes
    # A box without area overlaps nothing, not even itself.
    same_box = np.isclose(expected.boxes[:, None], found.boxes, rtol=1e-4, atol=1e-6).all(axis=-1)
    same_place = same_box | (iou(expected.boxes, found.boxes) > _OVERLAP)
    return float((near & same_class & same_place).any(axis=1).mean())


def format_report(report: ParityReport) -> str:
    """Write the report as plain text: every output of every graph, the checks, then the runs end to end."""
    lines = [
        f"Parity with PyTorch, {report.backend}, {report.precision} (decisions: entries that differ)",
        f"  {'graph':<10} {'output':<14} {'difference':>11} {'allowed':>9} {'cases':>6}",
    ]
    lines += [_row(row) for row in report.stages]
    for check in report.checks:
        holds = [row.stage for row in check.rows if row.passed]
        lines.append(f"  {check.name:<14} holds for {', '.join(holds) or 'no graph'}")
        lines += [_row(row) for row in check.rows if not row.passed]
    lines.append(f"  {'end to end':<26} {'stops':<8} {'same detections':>16}")
    for run in report.runs:
        verdict = "" if run.passed else "  FAILED"
        same = "same" if run.same_stops else "differ"
        lines.append(f"  {run.case:<26} {same:<8} {run.agreement:>16.1%}{verdict}   ({', '.join(run.stops)})")
    lines.append("  passed" if report.passed else "  FAILED")
    return "\n".join(lines)


def _row(row: StageParity) -> str:
    verdict = "" if row.passed else "  FAILED"
    numbers = f"{row.difference:>11.2e} {row.tolerance:>9.1e} {row.cases:>6}"
    return f"  {row.stage:<10} {row.output:<14} {numbers}{verdict}"
