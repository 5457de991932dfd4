"""The network computes what the public implementation computes on the same weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from asag_deploy.loop.probing import Probed, detect
from asag_deploy.loop.stopping import StopRule
from asag_training.network.config import MAIN_HEAD
from asag_training.network.model import Asag, build
from asag_training.network.stage_plan import build_stages, probing_plan
from asag_training.network.stages import TorchNetwork
from reference_cases import BOXES, LOGITS, NAMES, ReferenceCase, load_case

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest) -> ReferenceCase:
    return load_case(request.param)


@pytest.fixture(scope="module")
def model(case: ReferenceCase) -> Asag:
    return build(case.config, case.state())


@pytest.fixture(scope="module")
def features(case: ReferenceCase, model: Asag) -> list[torch.Tensor]:
    with torch.no_grad():
        return model.features(torch.from_numpy(case.images()))


def run(case: ReferenceCase, model: Asag, head: str = MAIN_HEAD) -> tuple[TorchNetwork, Probed]:
    probing = probing_plan(case.config, case.levels)
    network = TorchNetwork(build_stages(model, probing, head))
    return network, detect(network, probing, StopRule(), torch.from_numpy(case.images()), case.sizes)


def test_pyramid(case: ReferenceCase, features: list[torch.Tensor]) -> None:
    for level, feature in zip(("P2", "P3", "P4", "P5"), features, strict=True):
        nchw = feature.permute(0, 3, 1, 2).numpy()
        np.testing.assert_allclose(nchw.mean(axis=(2, 3)), case.arrays[f"{level}_mean"], atol=1e-4)
        np.testing.assert_allclose(nchw[:, ::16, ::9, ::9], case.arrays[f"{level}_sample"], atol=1e-3)


def test_first_level(case: ReferenceCase, model: Asag, features: list[torch.Tensor]) -> None:
    with torch.no_grad():
        raw = model.anchor_generator.first_level(features[-1], torch.from_numpy(case.sizes)).raw
    expected = np.concatenate([case.arrays["level1_raw"], case.arrays["level0_raw"]], axis=1)
    np.testing.assert_allclose(raw[..., :4].numpy(), expected[..., :4], atol=BOXES)
    np.testing.assert_allclose(raw[..., 4].numpy(), expected[..., 4], atol=LOGITS)


def test_probed_patches(case: ReferenceCase, model: Asag, features: list[torch.Tensor]) -> None:
    _, probed = run(case, model)
    recorded = [level for level, i in (("P4", 2), ("P3", 3)) if f"level{i}_raw" in case.arrays]
    assert [level.level for level in probed.levels[1:]] == recorded
    for level, index in zip(probed.levels[1:], (2, 3), strict=False):
        of_image = case.arrays[f"level{index}_image"]
        for image, count in enumerate(level.patches.tolist()):
            origins = level.origins[image : image + 1, :count]  # type: ignore[index]
            rows = of_image == image
            np.testing.assert_array_equal(origins[0].numpy(), case.arrays[f"level{index}_origin"][rows])
            feature = features[{"P4": 2, "P3": 1}[level.level]][image : image + 1]
            size = torch.from_numpy(case.sizes[image : image + 1])
            probe, patches = model.anchor_generator.probe, torch.tensor([count])
            with torch.no_grad():
                cells = torch.tensor(feature.shape[1:3])
                raw = probe(level.level, feature, cells, size, origins, patches).raw
            expected = case.arrays[f"level{index}_raw"][rows]
            np.testing.assert_allclose(raw[0, ..., :4].numpy(), expected[..., :4], atol=BOXES)
            np.testing.assert_allclose(raw[0, ..., 4].numpy(), expected[..., 4], atol=LOGITS)


def test_padded_anchors(case: ReferenceCase, model: Asag) -> None:
    network, probed = run(case, model)
    anchors = network.download(probed.outputs["anchors"])
    counts = network.download(probed.outputs["anchor_count"])
    np.testing.assert_array_equal(counts, case.arrays["anchors_valid"].sum(axis=1))
    side = case.sizes[:, None, [1, 0, 1, 0]]
    np.testing.assert_allclose(anchors / side, case.arrays["anchors"] / side, atol=BOXES)


def test_relation_block(case: ReferenceCase, model: Asag, features: list[torch.Tensor]) -> None:
    anchors = torch.from_numpy(case.arrays["anchors"])
    valid = torch.from_numpy(case.arrays["anchors_valid"])
    with torch.no_grad():
        proposals, _ = model.relate(features, anchors, valid, torch.from_numpy(case.sizes))
    np.testing.assert_allclose(proposals.logits.numpy(), case.arrays["relation_logits"], atol=LOGITS)
    np.testing.assert_allclose(proposals.boxes.numpy(), case.arrays["relation_boxes"], atol=BOXES)


def test_every_head(case: ReferenceCase, model: Asag) -> None:
    assert case.config.head_names == ("aux_0", "aux_1", "aux_2", "main")
    for head in case.config.head_names:
        network, probed = run(case, model, head)
        logits, boxes = (network.download(probed.outputs[name]) for name in ("logits", "boxes"))
        np.testing.assert_allclose(logits, case.arrays[f"{head}_logits"], atol=LOGITS)
        np.testing.assert_allclose(boxes, case.arrays[f"{head}_boxes"], atol=BOXES)


def test_detections(case: ReferenceCase, model: Asag) -> None:
    network, probed = run(case, model)
    scores, boxes = (network.download(probed.outputs[name]) for name in ("det_scores", "det_boxes"))
    for image, (height, width) in enumerate(case.sizes.tolist()):
        expected = case.arrays[f"detections{image}_scores"]
        np.testing.assert_allclose(scores[image], expected, atol=1e-4)
        # Ranks of equal scores are anybody's, so boxes are compared as a set.
        found = boxes[image] * [width, height, width, height]
        distance = np.abs(found[:, None] - case.arrays[f"detections{image}_boxes"][None]).max(axis=-1)
        assert (distance.min(axis=0) < 0.05).mean() > 0.97


def test_early_stop_and_floor() -> None:
    case = load_case("asag_a_early_stop")
    network, probed = run(case, build(case.config, case.state()))
    assert [level.level for level in probed.levels] == ["P5"]
    assert network.download(probed.outputs["anchor_count"]).tolist() == [case.config.anchor_floor]
