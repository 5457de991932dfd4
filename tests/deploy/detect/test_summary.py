"""The summary of a run: every phase of every image, in the order of a detection."""

from __future__ import annotations

import dataclasses

import pytest

from asag_deploy.detect.summary import Summary
from support.detection_samples import make_detections

SHALLOW = ("preprocess", "backbone", "decoder", "total")
DEEPER = ("preprocess", "backbone", "probe_p4", "decoder", "total")
DEEPEST = ("preprocess", "backbone", "probe_p4", "probe_p3", "decoder", "total")


@pytest.mark.parametrize("images", [(SHALLOW, DEEPEST), (DEEPER, DEEPEST, SHALLOW), (DEEPEST, SHALLOW)])
def test_phases_stand_in_their_order_whatever_comes_first(images: tuple[tuple[str, ...], ...]) -> None:
    summary = Summary()
    for phases in images:
        summary.add(dataclasses.replace(make_detections(), times_ms=dict.fromkeys(phases, 2.0)))
    rows = [line.split() for line in summary.text(threshold=0.3, batch=1).splitlines() if line.count(".") > 1]
    assert [row[0] for row in rows] == list(DEEPEST)
    assert {row[0]: int(row[-1]) for row in rows} == {
        phase: sum(phase in phases for phases in images) for phase in DEEPEST
    }
