"""Networks that differ from the published ones by plain settings pass the parity gate too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from asag_deploy.detector import Detector
from asag_evaluation.data.doodles import draw_doodles
from asag_export.bundle_export import export_bundle
from support.small_network import small_checkpoint

FEW: dict[str, Any] = {
    "backbone_depth": 26,
    "heads": 2,
    "first_level_anchors": 10,
    "patch_anchors": 5,
    "anchor_cap": 200,
    "num_classes": 3,
}


@pytest.mark.slow
def test_layers_in_sequence_and_anchors_that_stay(tmp_path: Path) -> None:
    """Of a light network, which has no P2."""
    checkpoint = small_checkpoint("asag-a-lite-s", decoder_layers=2, replace_anchors=False, **FEW)
    exported = export_bundle(checkpoint, tmp_path / "bundle", levels="p4-p6")
    assert exported.parity.passed
    names = {tensor.name for tensor in exported.bundle.manifest.graph("decoder").inputs}
    assert not {"selected_p5", "selected_p4", "probed", "p2"} & names

    picture = draw_doodles(256, 320, seed=0)
    with Detector.load(exported.bundle) as detector:
        found = detector(picture, channel_order="rgb")
    runs = found.trace.levels
    assert found.trace.exit_level != "P5"
    # Nothing gave way: all that passed reached the decoder, up to the cap.
    assert found.trace.anchor_count == min(sum(run.anchors for run in runs), FEW["anchor_cap"])
    assert runs[0].anchors > FEW["first_level_anchors"]


@pytest.mark.slow
def test_layers_in_sequence_of_the_other_decoder(tmp_path: Path) -> None:
    checkpoint = small_checkpoint("asag-s-r50-100", decoder_layers=2, **FEW)
    exported = export_bundle(checkpoint, tmp_path / "bundle", head="aux_0", levels="p5-p6")
    assert exported.parity.passed
    assert exported.bundle.manifest.head == "aux_0"
