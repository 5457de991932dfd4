"""With and without replacing the anchors that asked for a closer look (paper, table 5a)."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from asag_deploy.loop.probing import Probed, detect, passed_on
from asag_deploy.loop.stopping import StopRule
from asag_training.network.model import Asag, build
from asag_training.network.stage_plan import build_stages, probing_plan
from asag_training.network.stages import TorchNetwork
from support.small_network import small_checkpoint

SIZE = torch.tensor([[320, 384], [256, 300]])


def network(*, replace: bool, **changes: Any) -> Asag:
    # The cap is out of reach, so that all that passes is seen.
    few = {"first_level_anchors": 10, "patch_anchors": 5, "anchor_cap": 2000, "heads": 1, "num_classes": 3}
    checkpoint = small_checkpoint(**{**few, "replace_anchors": replace, **changes})
    return build(checkpoint.config, checkpoint.state).requires_grad_(False)


@pytest.fixture(scope="module")
def image() -> Tensor:
    return torch.randn(2, 3, 320, 384, generator=torch.Generator().manual_seed(0))


def infer(model: Asag, image: Tensor) -> Probed:
    probing = probing_plan(model.config)
    return detect(TorchNetwork(build_stages(model, probing)), probing, StopRule(), image, SIZE.numpy())


def anchors_of(outputs: dict[str, Tensor], i: int) -> set[tuple[float, ...]]:
    return {tuple(anchor) for anchor in outputs["anchors"][i, : int(outputs["anchor_count"][i])].tolist()}


def test_anchors_that_asked_stay_and_pass(image: Tensor) -> None:
    with_, without = (infer(network(replace=replace), image) for replace in (True, False))
    assert with_.probed.all()
    assert [run.patches.tolist() for run in with_.levels] == [run.patches.tolist() for run in without.levels]
    for i in range(2):
        replaced, kept = anchors_of(with_.outputs, i), anchors_of(without.outputs, i)
        assert replaced < kept
        asked = set()
        for run in without.levels[:-1]:
            assert run.selected is not None
            asked |= {tuple(anchor[:4]) for anchor in run.anchors[i][run.selected[i]].tolist()}
        # eta_l is eta_f: what asks passes.  (Where too few are left without them, some pass in any case.)
        assert kept == replaced | asked
        assert len(asked - replaced) > len(asked) / 2
    for probed in (with_, without):
        passed = sum(passed_on(probed.levels, probed.probed))
        assert np.array_equal(passed, probed.outputs["anchor_count"].numpy())


def test_they_pass_by_their_score_as_others_do(image: Tensor) -> None:
    """Where eta_l is below eta_f, some of those that ask do not pass."""
    probed = infer(network(replace=False, score_low=0.05, score_pass=0.45), image)
    first = probed.levels[0]
    assert first.selected is not None
    asked = first.anchors[first.selected][:, 4]
    assert (asked < 0.45).any()
    assert first.counts.passing.tolist() == first.counts.passing_if_probed.tolist()
    assert (first.anchors[..., 4] > 0.45).sum(dim=1).clamp(min=5).tolist() == first.counts.passing.tolist()


def test_the_decoder_asks_for_nothing_it_does_not_need() -> None:
    model = network(replace=False)
    decoder = build_stages(model, probing_plan(model.config))[-1]
    assert not {"selected_p5", "selected_p4", "probed"} & set(decoder.inputs)
    assert {"anchors_p5", "anchors_p4", "anchors_p3"} <= set(decoder.inputs)


def test_it_is_a_setting_of_the_network() -> None:
    config = small_checkpoint().config
    assert config.replace_anchors
    assert not dataclasses.replace(config, replace_anchors=False).replace_anchors
