"""From a network's settings to its stages and the parameters of the loop."""

from __future__ import annotations

from typing import Any

import pytest

from asag_deploy.bundle.manifest import Preprocessing
from asag_deploy.errors import ConfigError
from asag_training.network.config import MANUAL_STOPS, VARIANTS, AsagConfig, variant_config
from asag_training.network.model import build
from asag_training.network.stage_plan import build_stages, postprocessing_plan, probing_plan
from asag_training.network.stages import NormalizeStage
from support.small_network import small_config

CONFIG = variant_config("asag-a-r50-100")


@pytest.mark.parametrize(
    ("levels", "mode", "capacities"),
    [
        ("p3-p6", "exact", {"P4": 128, "P3": 256}),
        ("p4-p6", "exact", {"P4": 128}),
        ("p5-p6", "exact", {}),
        ("p3-p6", "fast", {"P4": 15, "P3": 15}),
        ("p4-p6", "fast", {"P4": 15}),
        ("p5-p6", "fast", {}),
    ],
)
def test_levels_and_modes(levels: str, mode: Any, capacities: dict[str, int]) -> None:
    probing = probing_plan(CONFIG, levels, mode)
    assert {level.level: level.capacity for level in probing.levels} == capacities
    assert [level.stride for level in probing.levels] == [16, 8][: len(capacities)]
    assert {level.anchors_per_patch for level in probing.levels} <= {20}
    assert (probing.mode, probing.patch_size) == (mode, 15)
    assert (probing.anchor_floor, probing.anchor_cap, probing.max_patches) == (5, 200, None)


@pytest.mark.parametrize(("mode", "capacity"), [("exact", 60), ("fast", 15)])
def test_crowdhuman_probes_sixty_patches_at_most(mode: Any, capacity: int) -> None:
    probing = probing_plan(variant_config("asag-s-r50-crowdhuman"), "p3-p6", mode)
    assert [level.capacity for level in probing.levels] == [capacity, capacity]
    assert probing.max_patches == 60
    assert [level.anchors_per_patch for level in probing.levels] == [50, 50]


def test_more_candidates_are_considered_than_a_variant_predicts_first() -> None:
    for config in VARIANTS.values():
        assert probing_plan(config).max_candidates > 5 * config.first_level_anchors


def test_unknown_levels_and_mode() -> None:
    with pytest.raises(ConfigError, match="unknown levels 'p2-p6'; choose one of p3-p6, p4-p6, p5-p6"):
        probing_plan(CONFIG, "p2-p6")
    with pytest.raises(ConfigError, match="unknown mode 'quick'; choose exact or fast"):
        probing_plan(CONFIG, mode="quick")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("variant", "limit", "nms"),
    [("asag-a-r50-100", 100, None), ("asag-a-r101-300", 100, 0.7), ("asag-s-r50-crowdhuman", 600, 0.8)],
)
def test_postprocessing(variant: str, limit: int, nms: float | None) -> None:
    plan = postprocessing_plan(variant_config(variant))
    assert (plan.max_detections, plan.nms_iou) == (limit, nms)


@pytest.mark.parametrize("levels", MANUAL_STOPS)
def test_stages(levels: str) -> None:
    config = small_config(heads=1)
    preprocessing = Preprocessing(mean=(1.0, 2.0, 3.0))
    stages = build_stages(build(config), probing_plan(config, levels), preprocessing=preprocessing)
    probes = [f"probe_{level.lower()}" for level in MANUAL_STOPS[levels]]
    assert [stage.name for stage in stages] == ["normalize", "backbone", *probes, "decoder"]
    assert not any(stage.training for stage in stages)
    normalize, backbone, *_, decoder = stages
    assert isinstance(normalize, NormalizeStage)
    assert normalize.mean.flatten().tolist() == [1, 2, 3]
    # A stage that no level follows decides nothing.
    assert ("selected" in backbone.outputs) == bool(probes)
    for i, stage in enumerate(stages[2:-1], start=1):
        assert ("selected" in stage.outputs) == (i < len(probes))
    wanted = {
        "p3-p6": ["anchors_p5", "selected_p5", "anchors_p4", "selected_p4", "anchors_p3", "probed"],
        "p4-p6": ["anchors_p5", "selected_p5", "anchors_p4", "probed"],
        "p5-p6": ["anchors_p5"],
    }
    assert list(decoder.inputs[4:-2]) == wanted[levels]


def test_stages_of_a_head_that_is_not_there() -> None:
    config: AsagConfig = small_config(heads=1)
    with pytest.raises(ConfigError, match="no decoder head 'aux_0' in this network; its heads are main"):
        build_stages(build(config), probing_plan(config), "aux_0")
