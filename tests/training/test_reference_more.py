"""The network against the public implementation on what the main reference cases leave out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from asag_deploy.loop.probing import detect
from asag_deploy.loop.stopping import StopRule
from asag_training.checkpoints.layout import expected_layout, infer_config
from asag_training.network.config import variant_config
from asag_training.network.model import build
from asag_training.network.stage_plan import build_stages, probing_plan
from asag_training.network.stages import TorchNetwork
from reference_cases import BOXES, LOGITS
from reference_weights import reference_image, reference_state_dict

pytestmark = pytest.mark.slow

HERE = Path(__file__).parents[1] / "reference"
CASES = sorted((HERE / "more_cases").glob("*.npz"))
VARIANTS = {"asag-s-crowdhuman": "asag-s-r50-crowdhuman"}


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_case(path: Path, tmp_path: Path) -> None:
    case = np.load(path)
    layout, seed, sizes = str(case["layout"]), int(case["seed"]), case["sizes"]
    variant = layout.replace("_", "-")
    config = variant_config(VARIANTS.get(variant, variant))
    shapes = HERE / f"layout_{layout}.json"
    if "patch_size" in case:
        config = config.with_changes(patch_size=int(case["patch_size"]), first_level_size=30)
        shapes = tmp_path / "layout.json"
        shapes.write_text(json.dumps(expected_layout(config)))
        found = infer_config(expected_layout(config))
        assert found is not None
        assert found.with_changes(variant=config.variant) == config
    state = reference_state_dict(shapes, seed, float(case["score_bias"]))
    model = build(config, {name: torch.from_numpy(array) for name, array in state.items()})
    height, width = sizes.max(axis=0)
    images = np.zeros((len(sizes), 3, height, width), dtype=np.float32)
    for i, (h, w) in enumerate(sizes):
        images[i, :, :h, :w] = reference_image(int(h), int(w), seed)

    probing = probing_plan(config)
    network = TorchNetwork(build_stages(model, probing))
    rule = StopRule(max_patches=probing.max_patches)
    probed = detect(network, probing, rule, torch.from_numpy(images), sizes)

    outputs = {name: network.download(array) for name, array in probed.outputs.items()}
    assert [int(level.patches.sum()) for level in probed.levels[1:]] == case["patches"].tolist()
    np.testing.assert_array_equal(outputs["anchor_count"], case["valid"].sum(axis=1))
    side = sizes[:, None, [1, 0, 1, 0]]
    np.testing.assert_allclose(outputs["anchors"] / side, case["anchors"] / side, atol=BOXES)
    np.testing.assert_allclose(outputs["logits"], case["logits"], atol=LOGITS)
    np.testing.assert_allclose(outputs["boxes"], case["boxes"], atol=BOXES)


def test_a_case_mixes_stops() -> None:
    """Otherwise nothing would be said about images that stop before others of their batch."""
    counts = np.load(HERE / "more_cases" / "batch_of_stops.npz")["valid"].sum(axis=1)
    assert len(set(counts.tolist())) > 1
