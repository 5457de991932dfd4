"""The loop of adaptive probing over a network that does as it is told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from asag_deploy.backends.network import Network
from asag_deploy.bundle.manifest import Level, ProbeLevel, Probing
from asag_deploy.loop.probing import Probed, detect, passed_on
from asag_deploy.loop.stages import PATCHES_COLUMN, LevelOutputs
from asag_deploy.loop.stopping import StopRule
from asag_deploy.loop.trace import StopReason

Arrays = dict[str, NDArray[Any]]
Row = tuple[int, int, int, int]

CAPACITY: dict[Level, int] = {"P4": 20, "P3": 12}
FIRST_ANCHORS = 10
PATCH_ANCHORS = 2


class ScriptedNetwork(Network):
    """Stages that report the counts they are given, an image a row, and note what they were called with.

    So does its `select`, whose origins are the number of the level that asks.
    """

    def __init__(
        self, counts: dict[Level, list[Row]], *, patch_bucket: int = 1, query_bucket: int = 1
    ) -> None:
        self.patch_bucket = patch_bucket
        self.query_bucket = query_bucket
        self.counts = counts
        self.batch = len(counts["P5"])
        self.calls: list[tuple[str, Arrays]] = []
        self.downloaded: list[tuple[int, ...]] = []
        self.selected: list[tuple[Level, tuple[int, ...]]] = []

    def stage(self, name: str) -> Any:
        return lambda inputs: self._run(name, dict(inputs))

    def upload(self, array: NDArray[Any]) -> NDArray[Any]:
        return array

    def download(self, array: NDArray[Any]) -> NDArray[Any]:
        self.downloaded.append(array.shape)
        return array

    def select(
        self, probing: Probing, level: ProbeLevel, before: LevelOutputs, image_size: NDArray[Any]
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        asking: Level = "P5" if level.level == "P4" else "P4"
        self.selected.append((level.level, before.selected.shape))
        filled = before.counts.copy()
        patches = np.array(self.counts[asking])[:, PATCHES_COLUMN]
        filled[:, PATCHES_COLUMN] = patches * (before.counts[:, 0] > 0)
        return np.full((self.batch, level.capacity, 2), int(asking[1]), dtype=np.int64), filled

    def inputs_of(self, name: str) -> Arrays:
        (inputs,) = [inputs for called, inputs in self.calls if called == name]
        return inputs

    @property
    def called(self) -> list[str]:
        return [name for name, _ in self.calls]

    def _run(self, name: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        self.calls.append((name, dict(inputs)))
        if name == "decoder":
            return {"anchor_count": np.zeros(self.batch, dtype=np.int64)}
        if name == "backbone":
            features = {f"p{i}": np.full((1, 2, 3, 1), i) for i in (2, 3, 4, 5)}
            return {**features, **self._choose("P5", FIRST_ANCHORS, np.ones(self.batch, dtype=np.bool_))}
        level: Level = "P4" if name == "probe_p4" else "P3"
        # A real graph finds nothing on an image that has no patches.
        return self._choose(level, len(inputs["slots"]) * PATCH_ANCHORS, inputs["patch_count"] > 0)

    def _choose(self, level: Level, anchors: int, real: NDArray[np.bool_]) -> Arrays:
        counts = np.array(self.counts[level], dtype=np.int64) * real[:, None]
        counts[:, PATCHES_COLUMN] = 0
        outputs: Arrays = {"anchors": np.full((self.batch, anchors, 5), 1, np.float32), "counts": counts}
        if level != "P3":
            outputs["selected"] = np.ones((self.batch, anchors), dtype=np.bool_)
        return outputs


def probing(levels: tuple[Level, ...] = ("P4", "P3")) -> Probing:
    return Probing(
        mode="exact",
        patch_size=15,
        levels=tuple(
            ProbeLevel(level=level, stride=16, capacity=CAPACITY[level], anchors_per_patch=PATCH_ANCHORS)
            for level in levels
        ),
        max_candidates=64,
        patch_nms_iou=0.25,
        anchor_floor=5,
        anchor_cap=50,
    )


def run(
    network: ScriptedNetwork, rule: StopRule | None = None, levels: tuple[Level, ...] = ("P4", "P3")
) -> Probed:
    sizes = np.full((network.batch, 2), 64, dtype=np.int64)
    return detect(network, probing(levels), rule or StopRule(), np.zeros(1, np.float32), sizes)


def test_stops_at_once_when_nothing_is_selected() -> None:
    network = ScriptedNetwork({"P5": [(0, 0, 7, 7)]})
    probed = run(network)
    assert network.called == ["backbone", "decoder"]
    assert probed.stop == [StopReason.NOTHING_SELECTED]
    assert [level.level for level in probed.levels] == ["P5"]
    assert probed.levels[0].patches.tolist() == [5]
    assert probed.probed.tolist() == [[False, False]]
    assert network.inputs_of("decoder")["query_slots"].tolist() == list(range(7))


def test_stops_after_p4_when_nothing_is_selected_there() -> None:
    network = ScriptedNetwork({"P5": [(4, 3, 9, 5)], "P4": [(0, 0, 6, 6)]})
    probed = run(network)
    assert network.called == ["backbone", "probe_p4", "decoder"]
    assert probed.stop == [StopReason.NOTHING_SELECTED]
    assert probed.probed.tolist() == [[True, False]]
    # Four anchors asked, three patches were left of them, and what P5 passes on is what did not ask.
    assert network.inputs_of("probe_p4")["patch_count"].tolist() == [3]
    assert [count.tolist() for count in passed_on(probed.levels, probed.probed)] == [[5], [6]]
    assert len(network.inputs_of("decoder")["query_slots"]) == 11


def test_runs_to_the_last_level() -> None:
    network = ScriptedNetwork({"P5": [(4, 3, 9, 5)], "P4": [(2, 1, 6, 4)], "P3": [(0, 0, 2, 2)]})
    probed = run(network)
    assert network.called == ["backbone", "probe_p4", "probe_p3", "decoder"]
    assert probed.stop == [StopReason.LAST_LEVEL]
    assert probed.probed.tolist() == [[True, True]]
    assert [level.patches.tolist() for level in probed.levels] == [[5], [3], [1]]
    assert [count.tolist() for count in passed_on(probed.levels, probed.probed)] == [[5], [4], [2]]
    assert sorted(probed.times_ms) == ["backbone", "decoder", "probe_p3", "probe_p4"]


def test_each_probe_gets_its_feature_map_and_the_patches_of_the_level_before() -> None:
    network = ScriptedNetwork({"P5": [(4, 3, 9, 5)], "P4": [(2, 1, 6, 4)], "P3": [(0, 0, 2, 2)]})
    probed = run(network)
    p4, p3 = network.inputs_of("probe_p4"), network.inputs_of("probe_p3")
    assert (p4["feature"].max(), p3["feature"].max()) == (4, 3)
    assert p4["feature_size"].tolist() == p3["feature_size"].tolist() == [2, 3]
    assert (p4["patches"].max(), p3["patches"].max()) == (5, 4)
    assert (p4["slots"].tolist(), p3["slots"].tolist()) == ([0, 1, 2], [0])
    assert probed.levels[0].origins is None
    assert probed.levels[1].origins is p4["patches"]


def test_reads_only_the_counts_between_the_stages() -> None:
    network = ScriptedNetwork({"P5": [(4, 3, 9, 5)], "P4": [(2, 1, 6, 4)], "P3": [(0, 0, 2, 2)]})
    run(network)
    assert network.downloaded == [(1, 4)] * 3


@pytest.mark.parametrize(
    ("max_level", "called"), [("P5", []), ("P4", ["probe_p4"]), ("P3", ["probe_p4", "probe_p3"])]
)
def test_max_level(max_level: Level, called: list[str]) -> None:
    network = ScriptedNetwork({"P5": [(4, 3, 9, 5)], "P4": [(2, 1, 6, 4)], "P3": [(0, 0, 2, 2)]})
    probed = run(network, StopRule(max_level=max_level))
    assert network.called == ["backbone", *called, "decoder"]
    assert probed.stop == [StopReason.LAST_LEVEL if max_level == "P3" else StopReason.MAX_LEVEL]


def test_an_image_that_needs_no_more_stopped_by_itself_whatever_the_max_level() -> None:
    probed = run(ScriptedNetwork({"P5": [(0, 0, 7, 7), (2, 2, 7, 5)]}), StopRule(max_level="P5"))
    assert probed.stop == [StopReason.NOTHING_SELECTED, StopReason.MAX_LEVEL]


def test_deadline_that_passes_during_p4(monkeypatch: pytest.MonkeyPatch) -> None:
    network = ScriptedNetwork({"P5": [(4, 3, 9, 5)], "P4": [(2, 1, 6, 4)]})
    monkeypatch.setattr("time.perf_counter", lambda: 10.0 if "probe_p4" in network.called else 1.0)
    probed = run(network, StopRule(deadline=5.0))
    assert network.called == ["backbone", "probe_p4", "decoder"]
    assert probed.stop == [StopReason.DEADLINE]
    # P4 asked for a closer look and did not get it, so its selected anchors are passed on after all.
    assert [count.tolist() for count in passed_on(probed.levels, probed.probed)] == [[5], [6]]


def test_deadline_that_has_passed_still_gives_the_first_level() -> None:
    network = ScriptedNetwork({"P5": [(4, 3, 9, 5), (0, 0, 8, 8)]})
    probed = run(network, StopRule(deadline=0.0))
    assert network.called == ["backbone", "decoder"]
    assert probed.stop == [StopReason.DEADLINE, StopReason.NOTHING_SELECTED]


def test_fast_stops_when_two_are_selected() -> None:
    network = ScriptedNetwork({"P5": [(2, 2, 9, 7)]})
    probed = run(network, StopRule(min_selected=3, max_patches=15))
    assert network.called == ["backbone", "decoder"]
    assert probed.stop == [StopReason.FEW_SELECTED]


def test_fast_goes_on_when_three_are_selected() -> None:
    network = ScriptedNetwork({"P5": [(3, 1, 9, 6)], "P4": [(0, 0, 2, 2)]})
    probed = run(network, StopRule(min_selected=3, max_patches=15))
    assert probed.levels[1].patches.tolist() == [1]
    assert probed.stop == [StopReason.NOTHING_SELECTED]


def test_fast_cuts_sixteen_patches_to_fifteen_and_says_so() -> None:
    network = ScriptedNetwork({"P5": [(16, 16, 20, 4)], "P4": [(0, 0, 30, 30)]})
    probed = run(network, StopRule(min_selected=3, max_patches=15))
    assert probed.levels[1].patches.tolist() == [15]
    assert probed.levels[1].patches_dropped.tolist() == [1]
    assert len(network.inputs_of("probe_p4")["slots"]) == 15


def test_capacity_overflow_is_reported() -> None:
    network = ScriptedNetwork({"P5": [(30, 27, 40, 10)], "P4": [(14, 13, 40, 26)], "P3": [(0, 0, 24, 24)]})
    probed = run(network)
    assert [level.patches.tolist() for level in probed.levels] == [[5], [20], [12]]
    assert [level.patches_dropped.tolist() for level in probed.levels] == [[0], [7], [1]]


def test_image_of_a_batch_that_stops_while_another_goes_on() -> None:
    network = ScriptedNetwork(
        {
            "P5": [(0, 0, 7, 7), (4, 3, 9, 5), (2, 2, 6, 4)],
            "P4": [(9, 9, 9, 9), (3, 2, 6, 3), (0, 0, 4, 4)],
            "P3": [(0, 0, 9, 9), (0, 0, 4, 4), (0, 0, 9, 9)],
        }
    )
    probed = run(network)
    assert network.inputs_of("probe_p4")["patch_count"].tolist() == [0, 3, 2]
    assert network.inputs_of("probe_p3")["patch_count"].tolist() == [0, 2, 0]
    assert probed.probed.tolist() == [[False, False], [True, True], [True, False]]
    assert network.inputs_of("decoder")["probed"] is probed.probed
    assert probed.stop == [
        StopReason.NOTHING_SELECTED,
        StopReason.LAST_LEVEL,
        StopReason.NOTHING_SELECTED,
    ]
    passed = [count.tolist() for count in passed_on(probed.levels, probed.probed)]
    assert passed == [[7, 5, 4], [0, 3, 4], [0, 4, 0]]
    assert len(network.inputs_of("decoder")["query_slots"]) == 12


@pytest.mark.parametrize("stopped", [0, 1])
def test_image_that_stopped_has_no_patches_dropped(stopped: int) -> None:
    rows = [(40, 40, 50, 10), (40, 40, 50, 10)]
    rows[stopped] = (1, 40, 50, 10)
    network = ScriptedNetwork({"P5": rows, "P4": [(0, 0, 5, 5)] * 2})
    probed = run(network, StopRule(min_selected=3))
    assert probed.levels[1].patches_dropped[stopped] == 0
    assert probed.levels[1].patches_dropped[1 - stopped] == 20


def test_levels_that_are_not_run_are_zeros_to_the_decoder() -> None:
    network = ScriptedNetwork({"P5": [(0, 0, 7, 7)] * 2})
    run(network)
    decoder = network.inputs_of("decoder")
    for level in ("p4", "p3"):
        assert decoder[f"anchors_{level}"].shape == (2, PATCH_ANCHORS, 5)
        assert decoder[f"anchors_{level}"].dtype == np.float32
        assert not decoder[f"anchors_{level}"].any()
    assert decoder["selected_p4"].dtype == np.bool_
    assert not decoder["selected_p4"].any()


def test_first_level_alone_needs_no_probes() -> None:
    network = ScriptedNetwork({"P5": [(0, 0, 7, 7)]})
    probed = run(network, levels=())
    assert network.called == ["backbone", "decoder"]
    assert probed.stop == [StopReason.MAX_LEVEL]
    assert probed.probed.shape == (1, 0)
    assert not [name for name in network.inputs_of("decoder") if name.endswith(("_p4", "_p3"))]


def test_bundle_that_ends_with_p4() -> None:
    network = ScriptedNetwork({"P5": [(4, 3, 9, 5)], "P4": [(0, 0, 6, 6)]})
    probed = run(network, levels=("P4",))
    assert network.called == ["backbone", "probe_p4", "decoder"]
    assert probed.stop == [StopReason.MAX_LEVEL]
    assert [count.tolist() for count in passed_on(probed.levels, probed.probed)] == [[5], [6]]


@pytest.mark.parametrize(("patches", "slots"), [(1, 8), (8, 8), (9, 16), (17, 20), (20, 20)])
def test_patches_are_rounded_up_to_the_bucket_but_not_beyond_the_capacity(patches: int, slots: int) -> None:
    network = ScriptedNetwork({"P5": [(patches, patches, 30, 9)], "P4": [(0, 0, 5, 5)]}, patch_bucket=8)
    probed = run(network)
    assert len(network.inputs_of("probe_p4")["slots"]) == slots
    assert probed.levels[1].patches.tolist() == [patches]


@pytest.mark.parametrize(("passing", "queries"), [(0, 32), (7, 32), (33, 50), (70, 50)])
def test_queries_are_rounded_up_to_the_bucket_but_not_beyond_the_cap(passing: int, queries: int) -> None:
    network = ScriptedNetwork({"P5": [(0, 0, passing, passing)]}, query_bucket=32)
    run(network)
    assert len(network.inputs_of("decoder")["query_slots"]) == queries


def test_anchors_beyond_patch_nms_are_reported() -> None:
    probed = run(ScriptedNetwork({"P5": [(70, 3, 5, 5)], "P4": [(0, 0, 5, 5)]}))
    assert probed.levels[1].patches.tolist() == [3]
    assert probed.levels[1].patches_dropped.tolist() == [70 - probing().max_candidates]
