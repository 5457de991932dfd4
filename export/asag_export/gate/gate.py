"""The parity gate: does an exported bundle compute what the network computes?

Three questions are put to a bundle, the first two of every case.

*Stage by stage*: given the same inputs, does each graph give the same outputs?  Floating outputs are compared
within a stated tolerance.  Decisions (which anchors are selected, how many) are compared
exactly, with what PyTorch decides on the *graph's own* anchors: so a score that lies on a threshold cannot
make a correct graph fail, and a wrong decision cannot hide behind a tolerance.  So are the patches that the
backend keeps of those asked for between two graphs.

*End to end*: does the loop stop for the same reason at the same level, and are the detections the same?

*The backend by itself*: see `asag_export.gate.checks`.

The cases cover every manual stop and the natural ones, single images and a batch of different sizes, and
probes of patches that no image asked for, so that no graph goes untested when the images stop early.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from asag_deploy.backends.hooked_network import HookedNetwork
from asag_deploy.backends.network import Network
from asag_deploy.bundle.manifest import Precision, ProbeLevel, Probing
from asag_deploy.loop.probing import Probed, detect, stage_name
from asag_deploy.loop.stages import FEATURE_TENSORS, LevelOutputs
from asag_deploy.loop.stopping import FAST_MAX_PATCHES, FAST_MIN_SELECTED, StopRule
from asag_evaluation.data.doodles import draw_doodles
from asag_export.gate.checks import IMAGES, Shapes, batch_checks, shapes_check
from asag_export.gate.parity import (
    LEAST_IN_COMMON,
    Found,
    ParityReport,
    RunParity,
    StageParity,
    in_common,
    largest_difference,
)
from asag_training.network.anchor_generator import STRIDES
from asag_training.network.boxes import cxcywh_to_xyxy
from asag_training.network.stages import SelectingStage, StageModule, TorchNetwork

Arrays = dict[str, NDArray[Any]]

_SIZES: tuple[tuple[tuple[int, int], ...], ...] = (
    ((320, 416),),
    ((225, 190),),
    ((2, 2),),  # too small for any anchor, so that probing stops at once and the floor decides
    ((256, 320), (320, 224)),
)
"""Heights and widths of the cases' images; the last case is a batch."""

_RELATIVE_TOLERANCE: dict[Precision, float] = {"fp32": 5e-5, "fp16": 1e-2}
"""Of the largest magnitude of an output."""
_SAMPLED_TOLERANCE = 2e-4
"""For float32 outputs that come of sampling: coordinates of 400 pixels are rounded by 3e-5 pixels, and the
maps of trained networks can be steep.  It is what the reference cases allow, 1e-3, on logits of 5."""
_SAMPLED = ("logits",)
_OF_IMAGE = ("boxes", "proposal_boxes")
"""Boxes relative to the image."""
_PIXELS_ROUNDED = 5e-4
"""Pixels: what a few roundings make of coordinates of some hundred pixels.  Anchors can be much larger than
an image, and of one of 2 pixels that is more than the other tolerances allow; of usual ones it is nothing."""
_ABSOLUTE_TOLERANCE: dict[Precision, float] = {"fp32": 1e-5, "fp16": 1e-3}
_AGREEMENT: dict[Precision, float] = {"fp32": LEAST_IN_COMMON, "fp16": 0.0}
"""Detections that must be the same end to end.  Half precision moves scores across thresholds, so what it
costs is reported rather than judged here; the stages' tolerances are what it has to hold."""

_EXACT = ("anchor_count",)
_RANKED = ("det_labels", "det_boxes")
"""Ranked by score, and equal scores in any order: each must be one of the graph's own queries and classes."""

_PAIR_TOLERANCE = 1e-5
"""For scores, and for boxes relative to the image."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The batches that engines are built for."""

    size_divisor: int
    """Heights and widths are multiples of it."""
    longer_side: int
    """The most that either may be, in pixels, before it is rounded up."""
    images: int
    """The most there can be in a batch."""

    def allow(self, sizes: Sequence[tuple[int, int]]) -> bool:
        """Return whether a batch of images of these sizes can be given to the engines."""
        return len(sizes) <= self.images and max(max(size) for size in sizes) <= self.longer_side


def run_gate(
    stages: Sequence[StageModule],
    network: Network,
    probing: Probing,
    *,
    backend: str,
    precision: Precision,
    limits: Limits | None = None,
    usual: Mapping[str, Shapes] | None = None,
) -> ParityReport:
    """Compare `network` (the bundle as a backend runs it) with `stages` (the network in PyTorch, float32).

    limits: what the backend can take, where that is not everything; other cases are left out.  usual: the
    shapes that engines are tuned for (`asag_export.gate.checks.usual_shapes`), None not to ask about them.
    """
    reference = _Recorder(stages)
    gate = _Gate(reference, network, precision)
    report = ParityReport(backend=backend, precision=precision)
    for sizes in _SIZES:
        if limits is not None and not limits.allow(sizes):
            continue
        pixels, image_size = _pictures(sizes, 1 if limits is None else limits.size_divisor)
        image = reference.stage("normalize")({"pixels": pixels, "image_size": image_size})["image"]
        gate.compare_calls()
        for name, rule in _rules(probing).items():
            expected = detect(reference, probing, rule, image, image_size.numpy())
            gate.compare_calls()
            uploaded = network.upload(image.numpy())
            actual = detect(network, probing, rule, uploaded, image_size.numpy())
            case = f"{'+'.join(f'{h}x{w}' for h, w in sizes)} {name}"
            report.runs.append(_compare_runs(case, reference, network, expected, actual, precision))
        _probe_unasked(reference, probing, image, image_size)
        gate.compare_calls()
    report.stages = gate.rows()
    images = IMAGES if limits is None else min(IMAGES, limits.images)
    if images > 1:
        report.checks += batch_checks(network, gate.samples, gate.allowed, images)
    if usual is not None:
        report.checks.append(shapes_check(gate.ran, usual))
    return report


def tolerance(output: str, value: NDArray[Any], precision: Precision) -> float:
    """Return how much a floating output of that name and value may differ."""
    relative = _RELATIVE_TOLERANCE[precision]
    if output in _SAMPLED:
        relative = max(relative, _SAMPLED_TOLERANCE)
    largest = float(np.abs(value.astype(np.float64)).max(initial=0.0))
    return _ABSOLUTE_TOLERANCE[precision] + relative * largest


def _rules(probing: Probing) -> dict[str, StopRule]:
    """List every manual stop the bundle allows; the deepest leaves the natural stops to the images."""
    rules: dict[str, StopRule] = {"to P5": StopRule(max_level="P5", max_patches=probing.max_patches)}
    for level in probing.levels:
        rules[f"to {level.level}"] = StopRule(max_level=level.level, max_patches=probing.max_patches)
    if probing.levels:
        rules["fast"] = StopRule(min_selected=FAST_MIN_SELECTED, max_patches=FAST_MAX_PATCHES)
    return rules


def _pictures(sizes: Sequence[tuple[int, int]], divisor: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw scenes of these sizes as one batch, padded to multiples of `divisor`, and give their sizes too."""
    height, width = (-(-max(side) // divisor) * divisor for side in zip(*sizes, strict=True))
    pixels = np.zeros((len(sizes), height, width, 3), dtype=np.uint8)
    for i, (h, w) in enumerate(sizes):
        pixels[i, :h, :w] = draw_doodles(h, w, seed=i)
    return torch.from_numpy(pixels), torch.tensor(sizes)


def _probe_unasked(
    reference: _Recorder, probing: Probing, image: torch.Tensor, image_size: torch.Tensor
) -> None:
    """Probe a few patches on every level, and select patches for it, whether or not an image asks for any."""
    outputs = features = reference.stage("backbone")({"image": image, "image_size": image_size})
    for level in probing.levels:
        every = torch.ones_like(outputs["selected"])
        asked = LevelOutputs(outputs["anchors"], every, outputs["counts"])
        reference.select(probing, level, asked, image_size)
        count = min(5, level.capacity)
        cells = image_size.max(dim=0).values // STRIDES[level.level]  # height, width
        room = (cells.flip(0) - probing.patch_size).clamp(min=1)
        generator = torch.Generator().manual_seed(0)
        patches = torch.rand(len(image), level.capacity, 2, generator=generator) * room
        feature = features[level.level.lower()]
        outputs = reference.stage(stage_name(level))(
            {
                "feature": feature,
                "feature_size": torch.tensor(feature.shape[1:3]),
                "image_size": image_size,
                "patches": patches.long(),
                "patch_count": torch.arange(count, count + len(image)).clamp(max=count),
                "slots": torch.arange(count),
            }
        )


class _Selection(NamedTuple):
    """One call of `Network.select` and what it found."""

    probing: Probing
    level: ProbeLevel
    before: LevelOutputs
    image_size: torch.Tensor
    found: tuple[torch.Tensor, ...]
    """origins, counts"""


class _Recorder(HookedNetwork):
    """The network in PyTorch, remembering every call of a stage and every choice of patches."""

    def __init__(self, stages: Sequence[StageModule]) -> None:
        super().__init__(TorchNetwork(stages), after=lambda *call: self.calls.append(call))
        self.modules = {stage.name: stage for stage in stages}
        self.calls: list[tuple[str, Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]] = []
        self.selections: list[_Selection] = []

    def select(
        self, probing: Probing, level: ProbeLevel, before: LevelOutputs, image_size: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found = super().select(probing, level, before, image_size)
        self.selections.append(_Selection(probing, level, before, image_size, found))
        return found


class _Gate:
    """Replays recorded calls on another network and keeps the worst of every output."""

    def __init__(self, reference: _Recorder, network: Network, precision: Precision) -> None:
        self.reference, self.network, self.precision = reference, network, precision
        self.worst: dict[tuple[str, str], StageParity] = {}
        self.samples: dict[str, Arrays] = {}
        """The inputs of the first call of each graph that was for one image."""
        self.ran: dict[str, list[Shapes]] = {}
        """The shapes of the inputs of every call."""

    def compare_calls(self) -> None:
        """Replay what was recorded since the last time."""
        for name, inputs, expected in self.reference.calls:
            stage = self.reference.modules[name]
            given = {key: self._cast(key, inputs[key]) for key in stage.inputs}
            self._note_call(name, given)
            uploaded = {key: self.network.upload(array) for key, array in given.items()}
            outputs = self.network.stage(name)(uploaded)
            actual = {key: self.network.download(outputs[key]) for key in stage.outputs}
            self._compare(stage, expected, actual, smallest_side=int(inputs["image_size"].min()))
        self.reference.calls.clear()
        for selection in self.reference.selections:
            self._compare_selection(selection)
        self.reference.selections.clear()

    def rows(self) -> list[StageParity]:
        """List the worst of every output, in the order of the stages."""
        return list(self.worst.values())

    def allowed(self, output: str, value: NDArray[Any]) -> float:
        """Return the tolerance for a floating output of that name and value."""
        return tolerance(output, value, self.precision)

    def _note_call(self, name: str, given: Arrays) -> None:
        self.ran.setdefault(name, []).append({key: array.shape for key, array in given.items()})
        if len(given["image_size"]) == 1:
            self.samples.setdefault(name, given)

    def _cast(self, name: str, tensor: torch.Tensor) -> NDArray[Any]:
        """Convert an input to an array; feature maps come in the graphs' own precision."""
        half = name in FEATURE_TENSORS and self.precision == "fp16"
        return (tensor.half() if half else tensor).contiguous().numpy()

    def _compare_selection(self, selection: _Selection) -> None:
        before = LevelOutputs(*(self.network.upload(tensor.numpy()) for tensor in selection.before))
        image_size = self.network.upload(selection.image_size.numpy())
        found = self.network.select(selection.probing, selection.level, before, image_size)
        for name, expected, actual in zip(("origins", "counts"), selection.found, found, strict=True):
            difference = _entries_that_differ(expected.numpy(), self.network.download(actual))
            self._note(f"select_{selection.level.level.lower()}", name, difference, 0.0)

    def _compare(
        self, stage: StageModule, expected: Mapping[str, torch.Tensor], actual: Arrays, *, smallest_side: int
    ) -> None:
        decided: Arrays = {}
        if isinstance(stage, SelectingStage):
            choice = stage.choose(torch.from_numpy(actual["anchors"]))
            decided = dict(zip(stage.outputs[-len(choice) :], (c.numpy() for c in choice), strict=True))
        for name in stage.outputs:
            if name in _RANKED:
                self._note(stage.name, name, _detections_without_query(actual), 0.0)
            elif name in decided or name in _EXACT:
                target = decided.get(name, expected[name].numpy())
                self._note(stage.name, name, _entries_that_differ(target, actual[name]), 0.0)
            else:
                target = expected[name].numpy().astype(np.float64)
                difference = largest_difference(target, actual[name])
                rounded = _PIXELS_ROUNDED / smallest_side if name in _OF_IMAGE else 0.0
                self._note(stage.name, name, difference, self.allowed(name, target) + rounded)

    def _note(self, stage: str, output: str, difference: float, tolerance: float) -> None:
        known = self.worst.get((stage, output))
        passed = difference <= tolerance
        if known is not None:
            worse = known if known.difference - known.tolerance > difference - tolerance else None
            passed = passed and known.passed
            difference, tolerance = (worse.difference, worse.tolerance) if worse else (difference, tolerance)
        self.worst[stage, output] = StageParity(
            stage=stage,
            output=output,
            difference=difference,
            tolerance=tolerance,
            cases=1 + (known.cases if known else 0),
            passed=passed,
        )


def _entries_that_differ(expected: NDArray[Any], actual: NDArray[Any]) -> float:
    """Count the entries that differ; infinite if the shapes differ."""
    return float(np.count_nonzero(expected != actual)) if expected.shape == actual.shape else float("inf")


def _detections_without_query(outputs: Arrays) -> float:
    """Count the detections that are not what the same outputs say of some query and class."""
    scores = 1 / (1 + np.exp(-outputs["logits"].astype(np.float64)))  # (B, Q, classes)
    corners = cxcywh_to_xyxy(torch.from_numpy(outputs["boxes"])).numpy()
    missing = 0
    for image, labels in enumerate(outputs["det_labels"]):
        real = outputs["det_scores"][image] > 0
        of_class = labels[real] == np.arange(scores.shape[-1])[:, None]  # (classes, D)
        score = scores[image] @ of_class  # (Q, D), 0 for a class that does not exist
        same_score = np.abs(score - outputs["det_scores"][image][real]) < _PAIR_TOLERANCE
        apart = np.abs(corners[image][:, None] - outputs["det_boxes"][image][real]).max(axis=-1)
        missing += int(np.count_nonzero(~(same_score & (apart < _PAIR_TOLERANCE)).any(axis=0)))
    return float(missing)


def _compare_runs(
    case: str, reference: Network, network: Network, expected: Probed, actual: Probed, precision: Precision
) -> RunParity:
    same = expected.stop == actual.stop and np.array_equal(expected.probed, actual.probed)
    truth, found = (
        {name: net.download(run.outputs[name]) for name in ("det_scores", "det_labels", "det_boxes")}
        for net, run in ((reference, expected), (network, actual))
    )
    agreement = float(np.mean([_agreement(truth, found, i) for i in range(len(truth["det_scores"]))]))
    return RunParity(
        case=case,
        stops=tuple(reason.value for reason in expected.stop),
        same_stops=same,
        agreement=agreement,
        passed=(same or precision != "fp32") and agreement >= _AGREEMENT[precision],
    )


def _agreement(truth: Arrays, found: Arrays, image: int) -> float:
    """Return the share of one image's detections that both runs have."""

    def real(run: Arrays) -> Found:
        rows = run["det_scores"][image] > 0
        return Found(*(run[name][image][rows] for name in ("det_scores", "det_labels", "det_boxes")))

    return in_common(real(truth), real(found))
