"""What the gate asks of a backend by itself: batches whose images touch each other, shapes that never ran."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from asag_deploy.backends.network import Network
from asag_deploy.engines.shapes import Batches
from asag_deploy.loop.stages import Array
from asag_export.gate.checks import (
    BATCH_OF_ONE,
    IDENTICAL_ROWS,
    OTHER_SHAPES,
    Shapes,
    batch_checks,
    shapes_check,
    usual_shapes,
)
from asag_export.gate.parity import Check, StageParity
from support.engine_bundle import make_engine_bundle

Floats = NDArray[np.float32]


class Doubling(Network):
    """A network of one stage on the host: twice a row, if that is over 1, a length, and something ranked."""

    def __init__(self, change: Callable[[dict[str, NDArray[Any]]], None] = lambda outputs: None):
        self.change = change
        self.shapes: list[dict[str, tuple[int, ...]]] = []

    def stage(self, name: str) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
        def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
            self.shapes.append({key: array.shape for key, array in inputs.items()})
            rows: Floats = 2 * inputs["rows"]
            outputs = {"twice": rows, "over": rows > 1, "length": np.full(len(rows), inputs["slots"].size)}
            self.change(outputs)
            return {**outputs, "det_labels": np.arange(len(rows))}

        return run

    def upload(self, array: NDArray[Any]) -> NDArray[Any]:
        return array

    def download(self, array: NDArray[Any]) -> NDArray[Any]:
        return array


def judge(network: Doubling, images: int = 3) -> dict[str, StageParity]:
    inputs: dict[str, NDArray[Any]] = {"rows": np.array([[0.25, 1.0]], np.float32), "slots": np.arange(5)}
    checks = batch_checks(network, {"double": inputs}, lambda output, value: 0.01, images)
    rows = {}
    for check in checks:
        (rows[check.name],) = check.rows
        assert check.passed is rows[check.name].passed
    assert list(rows) == [IDENTICAL_ROWS, BATCH_OF_ONE]
    return rows


def test_a_network_that_treats_every_image_alike() -> None:
    network = Doubling()
    assert all(row.passed and row.difference == 0 for row in judge(network).values())
    assert network.shapes == [{"rows": (1, 2), "slots": (5,)}, {"rows": (3, 2), "slots": (5,)}]


@pytest.mark.parametrize(("by", "passes"), [(0.0005, True), (0.002, False), (np.nan, False)])
def test_an_image_that_another_one_touches(by: float, passes: bool) -> None:
    """A tenth of the tolerance is allowed."""

    def change(outputs: dict[str, NDArray[Any]]) -> None:
        outputs["twice"][1:, :1] += np.float32(by)

    rows = judge(Doubling(change))
    assert rows[IDENTICAL_ROWS].passed is passes
    assert (rows[IDENTICAL_ROWS].stage, rows[IDENTICAL_ROWS].output) == ("double", "twice")
    assert rows[IDENTICAL_ROWS].tolerance == pytest.approx(0.001)
    assert rows[BATCH_OF_ONE].passed


def test_a_decision_that_another_image_changes() -> None:
    def change(outputs: dict[str, NDArray[Any]]) -> None:
        outputs["over"][-1] = ~outputs["over"][-1]

    row = judge(Doubling(change))[IDENTICAL_ROWS]
    assert (row.output, row.difference, row.tolerance, row.passed) == ("over", 2, 0, False)


@pytest.mark.parametrize(("by", "passes"), [(0.009, True), (0.011, False)])
def test_a_batch_that_changes_all_its_images(by: float, passes: bool) -> None:
    def change(outputs: dict[str, NDArray[Any]]) -> None:
        if len(outputs["twice"]) > 1:
            outputs["twice"] = outputs["twice"] + np.float32(by)

    rows = judge(Doubling(change), images=2)
    assert rows[IDENTICAL_ROWS].passed
    assert rows[BATCH_OF_ONE].passed is passes
    assert rows[BATCH_OF_ONE].difference == pytest.approx(by, rel=1e-3)


USUAL: dict[str, Shapes] = {"backbone": {"image": (1, 3, 800, 1088)}}


@pytest.mark.parametrize(
    ("ran", "others"),
    [([(1, 3, 800, 1088)], 0), ([(1, 3, 800, 1088), (1, 3, 320, 416)], 1), ([(2, 3, 800, 1088)], 1)],
)
def test_shapes(ran: Sequence[tuple[int, ...]], others: int) -> None:
    check = shapes_check({"backbone": [{"image": shape} for shape in ran]}, USUAL)
    assert check.name == OTHER_SHAPES
    assert check.passed is (others > 0)
    assert [(row.stage, row.cases, row.difference) for row in check.rows] == [
        ("backbone", others, others == 0)
    ]


def test_usual_shapes_are_those_of_the_profiles(tmp_path: Path) -> None:
    bundle = make_engine_bundle(tmp_path / "bundle")
    usual = usual_shapes(bundle.manifest, Batches(usual=2, most=4))
    assert set(usual) == {graph.name for graph in bundle.manifest.graphs}
    assert usual["backbone"]["image"][:2] == (2, 3)


def test_a_check_holds_if_all_its_rows_do() -> None:
    row = StageParity(stage="a", output="b", difference=0, tolerance=0, cases=1, passed=True)
    assert Check(name="check", rows=()).passed
    assert Check(name="check", rows=(row,)).passed
