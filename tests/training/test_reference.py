"""The network and its losses are those of the public implementation on the same weights, images and targets.

Each part is computed once for all tests of a case.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from asag_deploy.backends.hooked_network import HookedNetwork
from asag_deploy.loop.probing import Probed, detect
from asag_deploy.loop.stages import FEATURES
from asag_deploy.loop.stopping import StopRule
from asag_training.losses.config import LossConfig
from asag_training.losses.criterion import Criterion, Losses
from asag_training.losses.targets import Targets
from asag_training.network.model import Asag, build
from asag_training.network.stage_plan import build_stages, probing_plan
from asag_training.network.stages import DecoderStage, TorchNetwork
from asag_training.run.training_pass import training_pass
from reference_cases import BOXES, LOGITS, NAMES, ReferenceCase, load_case

pytestmark = pytest.mark.slow


TOLERANCE = 1e-4
STATISTICS = {"avg_patch_level_2": "avg_patch_P4", "avg_patch_level_3": "avg_patch_P3"}
"""What has another name here."""
UNCOMPARED = {"avg_patch_level_0", "avg_patch_level_1"}
"""Calls of the first level, which is always 1."""


class Computed(NamedTuple):
    """A case as we compute it."""

    model: Asag
    features: list[Tensor]
    """P2 to P5 of the batch."""
    probed: Probed
    decoder_inputs: Mapping[str, Tensor]


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest) -> ReferenceCase:
    return load_case(request.param)


@pytest.fixture(scope="module")
def computed(case: ReferenceCase) -> Computed:
    model = build(case.config, case.state())
    seen: dict[str, tuple[Mapping[str, Tensor], Mapping[str, Tensor]]] = {}
    probing = probing_plan(case.config, case.levels)
    network = HookedNetwork(
        TorchNetwork(build_stages(model, probing)),
        after=lambda name, inputs, outputs: seen.update({name: (inputs, outputs)}),
    )
    probed = detect(network, probing, StopRule(), torch.from_numpy(case.images()), case.sizes)
    features = [seen["backbone"][1][name] for name in FEATURES[:4]]
    return Computed(model, features, probed, seen["decoder"][0])


@pytest.fixture(scope="module")
def losses(case: ReferenceCase, computed: Computed) -> Losses:
    """In evaluation mode."""
    targets = [
        Targets(
            torch.from_numpy(case.arrays[f"target{i}_boxes"]),
            torch.from_numpy(case.arrays[f"target{i}_labels"]),
        )
        for i in range(len(case.sizes))
    ]
    model, image = computed.model, torch.from_numpy(case.images())
    with torch.no_grad(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(model, "features", lambda image, image_size: computed.features)
        output = training_pass(
            model,
            image,
            torch.from_numpy(case.sizes),
            settings=None,
            epoch=0,
            generator=None,
            levels=case.levels,
        )
    return Criterion(LossConfig(), model.config.patch_size)(output, targets, training=False)


def test_pyramid(case: ReferenceCase, computed: Computed) -> None:
    for level, feature in zip(("P2", "P3", "P4", "P5"), computed.features, strict=True):
        nchw = feature.permute(0, 3, 1, 2).numpy()
        np.testing.assert_allclose(nchw.mean(axis=(2, 3)), case.arrays[f"{level}_mean"], atol=1e-4)
        np.testing.assert_allclose(nchw[:, ::16, ::9, ::9], case.arrays[f"{level}_sample"], atol=1e-3)


def test_first_level(case: ReferenceCase, computed: Computed) -> None:
    with torch.no_grad():
        sizes = torch.from_numpy(case.sizes)
        raw = computed.model.anchor_generator.first_level(computed.features[-1], sizes).raw
    expected = np.concatenate([case.arrays["level1_raw"], case.arrays["level0_raw"]], axis=1)
    np.testing.assert_allclose(raw[..., :4].numpy(), expected[..., :4], atol=BOXES)
    np.testing.assert_allclose(raw[..., 4].numpy(), expected[..., 4], atol=LOGITS)


def test_probed_patches(case: ReferenceCase, computed: Computed) -> None:
    probed = computed.probed
    recorded = [level for level, i in (("P4", 2), ("P3", 3)) if f"level{i}_raw" in case.arrays]
    assert [level.level for level in probed.levels[1:]] == recorded
    for level, index in zip(probed.levels[1:], (2, 3), strict=False):
        of_image = case.arrays[f"level{index}_image"]
        for image, count in enumerate(level.patches.tolist()):
            origins = level.origins[image : image + 1, :count]  # type: ignore[index]
            rows = of_image == image
            np.testing.assert_array_equal(origins[0].numpy(), case.arrays[f"level{index}_origin"][rows])
            feature = computed.features[{"P4": 2, "P3": 1}[level.level]][image : image + 1]
            size = torch.from_numpy(case.sizes[image : image + 1])
            probe, patches = computed.model.anchor_generator.probe, torch.tensor([count])
            with torch.no_grad():
                cells = torch.tensor(feature.shape[1:3])
                raw = probe(level.level, feature, cells, size, origins, patches).raw
            expected = case.arrays[f"level{index}_raw"][rows]
            np.testing.assert_allclose(raw[0, ..., :4].numpy(), expected[..., :4], atol=BOXES)
            np.testing.assert_allclose(raw[0, ..., 4].numpy(), expected[..., 4], atol=LOGITS)


def test_padded_anchors(case: ReferenceCase, computed: Computed) -> None:
    outputs = computed.probed.outputs
    anchors = outputs["anchors"].numpy()
    counts = outputs["anchor_count"].numpy()
    np.testing.assert_array_equal(counts, case.arrays["anchors_valid"].sum(axis=1))
    side = case.sizes[:, None, [1, 0, 1, 0]]
    np.testing.assert_allclose(anchors / side, case.arrays["anchors"] / side, atol=BOXES)


def test_relation_block(case: ReferenceCase, computed: Computed) -> None:
    anchors = torch.from_numpy(case.arrays["anchors"])
    valid = torch.from_numpy(case.arrays["anchors_valid"])
    with torch.no_grad():
        proposals, _ = computed.model.relate(computed.features, anchors, valid, torch.from_numpy(case.sizes))
    np.testing.assert_allclose(proposals.logits.numpy(), case.arrays["relation_logits"], atol=LOGITS)
    np.testing.assert_allclose(proposals.boxes.numpy(), case.arrays["relation_boxes"], atol=BOXES)


def test_every_head(case: ReferenceCase, computed: Computed) -> None:
    assert case.config.head_names == ("aux_0", "aux_1", "aux_2", "main")
    levels = [level.level for level in probing_plan(case.config, case.levels).levels]
    for head in case.config.head_names:
        decoder = DecoderStage(computed.model, head, levels)
        with torch.no_grad():
            logits, boxes, *_ = decoder(*(computed.decoder_inputs[name] for name in decoder.inputs))
        np.testing.assert_allclose(logits.numpy(), case.arrays[f"{head}_logits"], atol=LOGITS)
        np.testing.assert_allclose(boxes.numpy(), case.arrays[f"{head}_boxes"], atol=BOXES)
    assert torch.equal(logits, computed.probed.outputs["logits"])  # the main one comes last


def test_detections(case: ReferenceCase, computed: Computed) -> None:
    outputs = computed.probed.outputs
    scores, boxes = outputs["det_scores"].numpy(), outputs["det_boxes"].numpy()
    for image, (height, width) in enumerate(case.sizes.tolist()):
        expected = case.arrays[f"detections{image}_scores"]
        np.testing.assert_allclose(scores[image], expected, atol=1e-4)
        # Ranks of equal scores are anybody's, so boxes are compared as a set.
        found = boxes[image] * [width, height, width, height]
        distance = np.abs(found[:, None] - case.arrays[f"detections{image}_boxes"][None]).max(axis=-1)
        assert (distance.min(axis=0) < 0.05).mean() > 0.97


def test_a_case_stops_at_once_and_falls_to_the_floor() -> None:
    case = load_case("asag_a_early_stop")
    assert case.levels == "p3-p6"
    assert "level2_raw" not in case.arrays
    assert case.arrays["anchors_valid"].sum(axis=1).tolist() == [case.config.anchor_floor]


def recorded(case: ReferenceCase, kind: str) -> dict[str, float]:
    prefix = f"{kind}/"
    return {
        name.removeprefix(prefix): float(value)
        for name, value in case.arrays.items()
        if name.startswith(prefix)
    }


def test_every_part(case: ReferenceCase, losses: Losses) -> None:
    expected = {name: value for name, value in recorded(case, "loss").items() if name.startswith("loss_")}
    assert set(losses) == set(expected)
    assert len(expected) == 18
    for name, value in expected.items():
        assert float(losses[name]) == pytest.approx(value, rel=TOLERANCE), name


def test_weights_and_total(case: ReferenceCase, losses: Losses) -> None:
    weights = recorded(case, "weight")
    assert losses.weights == weights
    parts = recorded(case, "loss")
    total = math.fsum(weights[name] * parts[name] for name in weights)
    assert float(losses.total) == pytest.approx(total, rel=TOLERANCE)


def test_statistics(case: ReferenceCase, losses: Losses) -> None:
    expected = {name: value for name, value in recorded(case, "loss").items() if not name.startswith("loss_")}
    found = losses.to_host()
    for name in expected.keys() - UNCOMPARED:
        ours = found[STATISTICS.get(name, name)]
        assert ours == pytest.approx(expected[name], rel=TOLERANCE, abs=1e-6), name
