"""The parity gate lets through what computes the same, and nothing else."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from asag_deploy.backends import open_network
from asag_deploy.backends.network import Network
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import ProbeLevel, Probing
from asag_deploy.errors import BundleCorruptError
from asag_deploy.loop.stages import LevelOutputs
from asag_deploy.loop.stopping import StopRule
from asag_export.gate import gate
from asag_export.gate.checks import BATCH_OF_ONE, IDENTICAL_ROWS, OTHER_SHAPES
from asag_export.gate.gate import run_gate
from asag_export.gate.parity import ParityReport
from asag_training.network.model import Asag, build
from asag_training.network.stage_plan import build_stages, probing_plan
from asag_training.network.stages import TorchNetwork
from support.bundle_edits import edit_graph, replace_graph
from support.small_network import small_checkpoint

PROBING = probing_plan(small_checkpoint().config)


@pytest.fixture(scope="module")
def model() -> Asag:
    checkpoint = small_checkpoint()
    return build(checkpoint.config, checkpoint.state).requires_grad_(False)


@pytest.fixture
def few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """One image, probed as far as it wants, is enough to see that something is wrong."""
    monkeypatch.setattr(gate, "_rules", lambda probing: {"to the end": StopRule()})
    monkeypatch.setattr(gate, "_SIZES", (((256, 320),),))


def judge(
    model: Asag, network: Network, probing: Probing = PROBING, head: str = "main", precision: Any = "fp32"
) -> ParityReport:
    return run_gate(build_stages(model, probing, head), network, probing, backend="test", precision=precision)


def torch_network(model: Asag, head: str = "main") -> TorchNetwork:
    return TorchNetwork(build_stages(model, PROBING, head))


def failed(report: ParityReport) -> set[str]:
    return {f"{row.stage}.{row.output}" for row in report.stages if not row.passed}


class Tampered(TorchNetwork):
    """The network in PyTorch, but for one output of one stage, or of one of the steps between them."""

    def __init__(self, model: Asag, stage: str, output: str, change: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__(build_stages(model, PROBING))
        self.where, self.change = (stage, output), change

    def stage(self, name: str) -> Any:
        run = super().stage(name)

        def tampered(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            outputs = run(inputs)
            if name == self.where[0]:
                outputs[self.where[1]] = self.change(outputs[self.where[1]].contiguous().clone())
            return outputs

        return tampered

    def select(
        self, probing: Probing, level: ProbeLevel, before: LevelOutputs, image_size: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        origins, counts = super().select(probing, level, before, image_size)
        outputs = {"origins": origins, "counts": counts}
        if self.where[0] == f"select_{level.level.lower()}":
            outputs[self.where[1]] = self.change(outputs[self.where[1]].contiguous().clone())
        return outputs["origins"], outputs["counts"]


def test_network_agrees_with_itself(model: Asag) -> None:
    report = judge(model, torch_network(model))
    assert report.passed
    assert all(row.difference == 0 for row in report.stages)
    assert all(run.same_stops and run.agreement == 1 for run in report.runs)
    judged = {(row.stage, row.output) for row in report.stages}
    steps = {(f"select_{level}", output) for level in ("p4", "p3") for output in ("origins", "counts")}
    assert judged == steps | {(s.name, output) for s in build_stages(model, PROBING) for output in s.outputs}
    stops = {stop for run in report.runs for stop in run.stops}
    assert stops >= {"max level", "last level", "nothing selected"}
    cases = [run.case for run in report.runs]
    assert len(set(cases)) == len(cases)
    assert {case.rpartition(" ")[2] for case in cases} == {"P5", "P4", "P3", "fast"}
    assert any("+" in case for case in cases)
    assert [check.name for check in report.checks] == [IDENTICAL_ROWS, BATCH_OF_ONE]
    graphs = {stage.name for stage in build_stages(model, PROBING)}
    assert all({row.stage for row in check.rows} == graphs for check in report.checks)


@pytest.mark.usefixtures("few_cases")
def test_a_batch_that_mixes_its_images_fails(model: Asag) -> None:
    """All else is as it should be for a single image, and the check names the graph and the output."""

    def mix(tensor: torch.Tensor) -> torch.Tensor:
        tensor[1:] += 0.1 * tensor[:1]
        return tensor

    report = judge(model, Tampered(model, "backbone", "p4", mix))
    assert not report.passed
    assert failed(report) == set()
    assert all(run.passed for run in report.runs)
    wrong = [(check, row.stage, row.output) for check, row in report.failures()]
    assert wrong == [(IDENTICAL_ROWS, "backbone", "p4")]


def add(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Add to one entry."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] += value
        return tensor

    return change


def flip(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[0] = ~tensor.view(-1)[0]
    return tensor


@pytest.mark.usefixtures("few_cases")
@pytest.mark.parametrize(
    ("stage", "output", "change"),
    [
        ("normalize", "image", add(1e-3)),
        *(("backbone", f"p{i}", add(0.1)) for i in (2, 3, 4, 5)),
        ("backbone", "anchors", add(0.1)),
        ("backbone", "selected", flip),
        ("select_p4", "origins", add(1)),
        ("select_p4", "counts", add(1)),
        ("select_p3", "origins", add(1)),
        ("backbone", "counts", add(1)),
        ("probe_p4", "anchors", add(0.1)),
        ("probe_p4", "selected", flip),
        ("probe_p4", "counts", add(1)),
        ("probe_p3", "anchors", add(0.1)),
        ("probe_p3", "counts", lambda counts: counts + 1),
        ("decoder", "logits", add(3e-3)),
        ("decoder", "boxes", add(1e-3)),
        ("decoder", "anchors", add(0.1)),
        ("decoder", "anchor_count", lambda count: count - 1),
        ("decoder", "det_scores", add(1e-3)),
        ("decoder", "det_labels", add(1)),
        ("decoder", "det_labels", lambda labels: labels + 100),
        ("decoder", "det_boxes", add(1e-3)),
        ("decoder", "det_boxes", lambda boxes: boxes[..., [1, 0, 3, 2]]),
        ("decoder", "boxes", lambda boxes: boxes * torch.nan),
        ("decoder", "proposal_scores", add(1e-3)),
        ("decoder", "proposal_boxes", add(1e-3)),
        ("backbone", "p2", lambda p2: p2[:, :-1]),
        ("select_p4", "origins", lambda origins: origins[:, :-1]),
    ],
)
def test_every_output_is_judged(model: Asag, stage: str, output: str, change: Any) -> None:
    report = judge(model, Tampered(model, stage, output, change))
    assert not report.passed
    assert f"{stage}.{output}" in failed(report)


@pytest.mark.parametrize(("side", "passes"), [(2, True), (200, False)])
def test_boxes_are_as_right_as_pixels_can_be(
    model: Asag, monkeypatch: pytest.MonkeyPatch, side: int, passes: bool
) -> None:
    """A ten thousandth of an image's side is a lot, but not of 2 pixels: coordinates are rounded by more."""
    monkeypatch.setattr("asag_export.gate.gate._SIZES", (((side, side),),))
    for output in ("boxes", "proposal_boxes"):
        report = judge(model, Tampered(model, "decoder", output, add(1e-4)))
        assert (f"decoder.{output}" not in failed(report)) == passes


@pytest.mark.usefixtures("few_cases")
def test_one_failure_is_one_too_many(model: Asag) -> None:
    """The stage is right whenever it is asked again."""
    left = iter([True])

    def first_time(tensor: torch.Tensor) -> torch.Tensor:
        return add(1.0)(tensor) if next(left, False) else tensor

    report = judge(model, Tampered(model, "backbone", "p2", first_time))
    assert failed(report) == {"backbone.p2"}
    assert not report.passed
    (row,) = (row for row in report.stages if not row.passed)
    assert row.cases > 1
    assert row.difference == pytest.approx(1.0, abs=1e-3)


@pytest.mark.usefixtures("few_cases")
@pytest.mark.parametrize(
    ("output", "change"),
    [
        ("det_scores", lambda scores: scores + 0.02),
        ("det_labels", lambda labels: (labels + 1) % 80),
        ("det_boxes", lambda boxes: boxes + 1),
    ],
)
def test_detections_are_compared_end_to_end(model: Asag, output: str, change: Any) -> None:
    (run,) = judge(model, Tampered(model, "decoder", output, change)).runs
    assert run.same_stops
    assert run.agreement < 0.2
    assert not run.passed


@pytest.mark.usefixtures("few_cases")
def test_stops_are_compared_end_to_end(model: Asag) -> None:
    (run,) = judge(model, Tampered(model, "backbone", "counts", torch.zeros_like)).runs
    assert "nothing selected" not in run.stops
    assert not run.same_stops
    assert not run.passed


@pytest.mark.usefixtures("few_cases")
def test_another_head_fails(model: Asag) -> None:
    report = judge(model, torch_network(model, "aux_0"))
    assert failed(report) >= {"decoder.logits", "decoder.boxes"}
    assert {name.split(".")[0] for name in failed(report)} == {"decoder"}


@pytest.mark.usefixtures("few_cases")
@pytest.mark.parametrize(
    ("setting", "value", "wrong"),
    [
        ("score_low", 0.12, {"backbone.selected", "backbone.counts"}),
        ("score_high", 0.5, {"backbone.selected", "backbone.counts"}),
        ("score_pass", 0.12, {"backbone.counts", "probe_p3.counts", "decoder.anchor_count"}),
        ("min_anchor_side", 12.0, {"backbone.anchors", "probe_p3.anchors"}),
        ("anchor_cap", 50, {"decoder.anchor_count"}),
    ],
)
def test_another_setting_fails(model: Asag, setting: str, value: float, wrong: set[str]) -> None:
    checkpoint = small_checkpoint()
    other = build(checkpoint.config.with_changes(**{setting: value}), checkpoint.state)
    assert failed(judge(model, torch_network(other))) >= wrong


@pytest.mark.usefixtures("few_cases")
def test_half_precision_may_move_scores_but_not_decisions(model: Asag) -> None:
    """As far as the gate is concerned: the weights are rounded, the decisions follow from the anchors."""
    rounded = build(model.config, {name: t.half().float() for name, t in model.state_dict().items()})
    assert judge(model, torch_network(rounded), precision="fp32").passed is False

    class Halved(TorchNetwork):
        def upload(self, array: np.ndarray) -> torch.Tensor:
            return super().upload(array.astype(np.float32) if array.dtype == np.float16 else array)

    halved = Halved(build_stages(rounded, PROBING))
    report = judge(model, halved, precision="fp16")
    assert report.passed, failed(report)
    assert max(row.difference for row in report.stages) > 0


@pytest.mark.usefixtures("few_cases")
def test_report_is_json(model: Asag) -> None:
    report = judge(model, torch_network(model))
    content = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert content["passed"] is True
    assert (content["backend"], content["precision"]) == ("test", "fp32")
    assert len(content["stages"]) == len(report.stages)
    assert set(content["stages"][0]) == {"stage", "output", "difference", "tolerance", "cases", "passed"}
    assert [run["case"] for run in content["runs"]] == [run.case for run in report.runs]
    assert [(check["name"], check["passed"], len(check["rows"])) for check in content["checks"]] == [
        (IDENTICAL_ROWS, True, 5),
        (BATCH_OF_ONE, True, 5),
    ]


@pytest.mark.slow
def test_the_exported_bundle_passes(model: Asag, small_bundle: Bundle) -> None:
    report = judge(model, open_network(None, small_bundle), small_bundle.manifest.probing)
    assert report.passed
    assert small_bundle.manifest.parity["passed"] is True
    judged = {(row["stage"], row["output"]) for row in small_bundle.manifest.parity["stages"]}
    assert judged == {(row.stage, row.output) for row in report.stages}
    assert all(run.same_stops and run.agreement > 0.98 for run in report.runs)
    checks = {check["name"]: check["passed"] for check in small_bundle.manifest.parity["checks"]}
    assert checks == {IDENTICAL_ROWS: True, BATCH_OF_ONE: True, OTHER_SHAPES: True}


def judge_bundle(model: Asag, bundle: Bundle, head: str = "main") -> ParityReport:
    return judge(model, open_network(None, bundle), bundle.manifest.probing, head, bundle.manifest.precision)


@pytest.mark.slow
@pytest.mark.usefixtures("few_cases")
@pytest.mark.parametrize("name", ["normalize", "backbone", "probe_p4", "probe_p3", "decoder"])
def test_a_weight_that_was_altered_fails(
    model: Asag, small_bundle: Bundle, tmp_path: Path, name: str
) -> None:
    def alter(graph: onnx.ModelProto) -> None:
        """Half a percent on every other entry of the largest tensor: a norm would undo it on all of them."""
        tensors = [t for t in graph.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
        largest = max(tensors, key=lambda t: int(np.prod(t.dims)))
        values = numpy_helper.to_array(largest).copy()
        values.reshape(-1)[::2] *= 1.005
        largest.CopyFrom(numpy_helper.from_array(values, largest.name))

    report = judge_bundle(model, edit_graph(small_bundle, name, alter, tmp_path / "altered"))
    assert not report.passed
    assert {wrong.split(".")[0] for wrong in failed(report)} == {name}


@pytest.mark.usefixtures("few_cases")
def test_another_nms_threshold_fails(model: Asag) -> None:
    class Lenient(TorchNetwork):
        def select(self, probing: Probing, *given: Any) -> tuple[torch.Tensor, torch.Tensor]:
            return super().select(dataclasses.replace(probing, patch_nms_iou=0.6), *given)

    report = judge(model, Lenient(build_stages(model, PROBING)))
    assert {"select_p4.counts", "select_p4.origins"} <= failed(report)
    assert {name.partition("_")[0] for name in failed(report)} == {"select"}


@pytest.mark.usefixtures("few_cases")
def test_another_nms_threshold_fails_though_no_image_asks_for_patches(model: Asag) -> None:
    class Lenient(TorchNetwork):
        def select(self, probing: Probing, *given: Any) -> tuple[torch.Tensor, torch.Tensor]:
            return super().select(dataclasses.replace(probing, patch_nms_iou=0.6), *given)

    content = build(model.config.with_changes(score_low=0.98, score_high=0.99), model.state_dict())
    assert {run.stops for run in judge(content, TorchNetwork(build_stages(content, PROBING))).runs} == {
        ("nothing selected",)
    }
    report = judge(content, Lenient(build_stages(content, PROBING)))
    assert {"select_p4.counts", "select_p3.counts"} <= failed(report)
    assert {name.partition("_")[0] for name in failed(report)} == {"select"}


@pytest.mark.slow
@pytest.mark.usefixtures("few_cases")
def test_another_heads_decoder_fails(
    model: Asag, small_bundle: Bundle, half_bundle: Bundle, tmp_path: Path
) -> None:
    """`half_bundle` is of `aux_1`: it passes as that, even in half precision, and as nothing else."""
    assert judge_bundle(model, half_bundle, "aux_1").passed
    assert failed(judge_bundle(model, half_bundle, "main")) >= {"decoder.logits", "decoder.boxes"}


@pytest.mark.slow
def test_decoder_for_fewer_levels_is_refused(
    model: Asag, small_bundle: Bundle, half_bundle: Bundle, tmp_path: Path
) -> None:
    content = half_bundle.graph_path("decoder").read_bytes()
    swapped = replace_graph(small_bundle, "decoder", content, tmp_path / "swapped")
    with pytest.raises(
        BundleCorruptError, match=r"decoder\.onnx' is not the graph that manifest\.json describes"
    ):
        judge_bundle(model, swapped)
