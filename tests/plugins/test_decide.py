"""The stop decision of the kernels against the host's, which every other backend is run by."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from asag_deploy import kernels
from asag_deploy.bundle.manifest import ProbeLevel
from asag_deploy.errors import BackendError
from asag_deploy.kernels import KernelLibrary
from asag_deploy.loop.probing import patch_limit, patches_of
from asag_deploy.loop.stages import Counts
from asag_deploy.loop.stopping import Decisions, StopRule
from support.tiny_bundle import tiny_manifest

RULES = (StopRule(), StopRule(min_selected=3, max_patches=15), StopRule(min_selected=0, max_patches=2))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("batch", [0, 1, 7, 600])
def test_decides_as_the_host_does(host: KernelLibrary, rule: StopRule, batch: int) -> None:
    probing = tiny_manifest().probing
    rng = np.random.default_rng(batch)
    decisions = Decisions(batch)
    probed = np.ones((batch, len(probing.levels)), dtype=np.bool_)  # what was there before must not matter
    for i, level in enumerate(probing.levels):
        counts = rng.integers(0, 30, (batch, 4)) * rng.integers(0, 2, (batch, 1))
        patches, goes_on = np.full(batch, -1), np.full(1, -1, dtype=np.int32)
        kernels.decide(
            host,
            *(counts, probed, patches, goes_on),
            level=i,
            min_selected=rule.min_selected,
            max_patches=patch_limit(rule, level),
        )
        of_host = Counts(*counts.T)
        running = decisions.who_goes_on(rule, level.level, of_host)
        np.testing.assert_array_equal(probed[:, i], running)
        np.testing.assert_array_equal(patches, patches_of(probing, rule, level, of_host, running)[0])
        assert goes_on.tolist() == [int(running.any())]


def test_a_batch_whose_images_all_stop(host: KernelLibrary) -> None:
    counts = np.array([[2, 2, 20, 18], [0, 0, 20, 20]])
    probed, patches, goes_on = np.ones((2, 1), np.bool_), np.ones(2, np.int64), np.ones(1, np.int32)
    kernels.decide(host, counts, probed, patches, goes_on, level=0, min_selected=3, max_patches=15)
    assert not probed.any()
    assert (patches.tolist(), goes_on.tolist()) == ([0, 0], [0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": 2}, "level is 2, expected 0 to 1"),
        ({"min_selected": -1}, "min_selected is -1, expected 0 to 16777216"),
        ({"max_patches": -3}, "max_patches is -3, expected 0 to 16777216"),
    ],
)
def test_refuses(host: KernelLibrary, options: dict[str, int], message: str) -> None:
    arrays = (np.zeros((1, 4), np.int64), np.zeros((1, 2), np.bool_), np.zeros(1, np.int64))
    with pytest.raises(BackendError, match=message):
        kernels.decide(
            host,
            *arrays,
            np.zeros(1, np.int32),
            **{"level": 0, "min_selected": 1, "max_patches": 5, **options},
        )


def test_only_cuda_has_graphs(host: KernelLibrary) -> None:
    arrays = (np.zeros((1, 4), np.int64), np.zeros((1, 2), np.bool_), np.zeros(1, np.int64))
    settings: dict[str, Any] = {"level": 0, "min_selected": 1, "max_patches": 5, "graph": 4096}
    with pytest.raises(BackendError, match=r"was given a CUDA graph, but .*\.so runs on the CPU; load "):
        kernels.add_decide(host, *arrays, np.zeros(1, np.int32), **settings)


def test_the_limit_is_the_smaller_of_capacity_and_rule() -> None:
    level = ProbeLevel(level="P4", stride=16, capacity=18, anchors_per_patch=2)
    limits = [patch_limit(StopRule(max_patches=most), level) for most in (None, 5, 40)]
    assert limits == [18, 5, 18]
