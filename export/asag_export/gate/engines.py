"""The parity gate on engines, where a GPU can run them, and what is done about a stage that fails in float16.

An engine may compute otherwise than the graph it was built from: by other kernels, which sum up in another
order or in half precision.  A stage that fails is built again in float32, and all are judged again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from asag_deploy.backends import BACKENDS, open_network
from asag_deploy.backends.tensorrt.backend import EngineNetwork
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import Precision, Probing
from asag_deploy.engines.build import BuildOptions, build_engines
from asag_deploy.engines.inspector import Layers
from asag_deploy.engines.targets import parse_target
from asag_deploy.engines.targets import this_gpu as find_gpu
from asag_export.gate.checks import OTHER_SHAPES, usual_shapes
from asag_export.gate.gate import Limits, run_gate
from asag_export.gate.parity import ParityReport, StageParity
from asag_training.network.stages import StageModule

Attempt = Callable[[frozenset[str]], ParityReport]
"""Builds everything with these stages in float32, and puts the gate to it."""


@dataclass(frozen=True, kw_only=True)
class EngineParity:
    """What the gate found on engines in the end."""

    report: ParityReport
    full_precision: dict[str, str] = field(default_factory=dict)
    """The stages that stayed in float32, and why, in the order in which that was found necessary."""
    layers: dict[str, Layers | None] = field(default_factory=dict)
    """What the engine of each stage was built of, as the library's inspector says."""

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values, for the manifest."""
        more = {"full_precision": dict(self.full_precision), "layers": dict(self.layers)}
        return {**self.report.to_dict(), **more}


def fall_back(stages: Sequence[str], attempt: Attempt) -> EngineParity:
    """Try all `stages` in float16, then without those that fail, until the gate passes or none is left.

    Where every stage passes by itself but not all of them together, the one that came nearest to its
    tolerance goes next.
    """
    kept: dict[str, str] = {}
    report = attempt(frozenset())
    while not report.passed and len(kept) < len(stages):
        reasons = _why(report, [stage for stage in stages if stage not in kept])
        if not reasons:
            break
        kept.update(reasons)
        report = attempt(frozenset(kept))
    return EngineParity(report=report, full_precision=kept)


def engines_can_run(options: BuildOptions) -> bool:
    """Whether this machine can run the engines that `options` ask for."""
    gpu = find_gpu()
    if gpu is None or BACKENDS[options.engine_format].problem() is not None:
        return False
    return not options.gpus or gpu.capability in {parse_target(text) for text in options.gpus}


def gate_engines(
    reference: Sequence[StageModule],
    bundle: Bundle,
    options: BuildOptions,
    probing: Probing,
    *,
    precision: Precision,
    in_float32: Callable[[str], Bundle],
) -> EngineParity:
    """Build the engines of a bundle and compare them on this machine's GPU with the network in PyTorch.

    reference: the network's stages, float32; in_float32: exports the stage of that name again, to compute in
    float32, and gives the bundle that it is then in.  A bundle in float32 is judged as it is.
    """
    preprocessing = bundle.manifest.preprocessing
    limits = Limits(
        size_divisor=preprocessing.size_divisor,
        longer_side=preprocessing.longer_side,
        images=options.batches.most,
    )
    done: set[str] = set()
    current = bundle
    layers: dict[str, Layers | None] = {}

    def attempt(kept: frozenset[str]) -> ParityReport:
        nonlocal current, layers
        for stage in sorted(kept - done):
            current = in_float32(stage)
            done.add(stage)
        build_engines(current, options)
        network = open_network(options.engine_format, current)
        layers = network.layers() if isinstance(network, EngineNetwork) else {}
        name = options.engine_format
        usual = usual_shapes(current.manifest, options.batches)
        return run_gate(
            reference, network, probing, backend=name, precision=precision, limits=limits, usual=usual
        )

    names = [graph.name for graph in bundle.manifest.graphs if graph.name != "normalize"]
    found = fall_back(names if precision == "fp16" else [], attempt)
    return dataclasses.replace(found, layers=layers)


def _why(report: ParityReport, stages: Sequence[str]) -> dict[str, str]:
    """The stages to be kept in float32 next, with the reason."""
    rows = [row for row in report.stages if row.stage in stages]
    failed: dict[str, str] = {}
    wrong = [
        (check, row) for check, row in report.failures() if row.stage in stages and check != OTHER_SHAPES
    ]
    for check, row in sorted(wrong, key=lambda item: _telling(item[1]), reverse=True):
        where = f", which is the check '{check}'" if check else ""
        failed.setdefault(
            row.stage,
            f"'{row.output}' differs by {row.difference:.3g} where {row.tolerance:.3g} is allowed{where}",
        )
    if failed:
        return failed
    judged = [row for row in rows if row.tolerance > 0]
    if not judged or all(run.passed for run in report.runs):
        return {}
    worst = max(judged, key=_badness)
    return {
        worst.stage: f"end to end the detections differ, and its '{worst.output}' comes nearest to what is "
        f"allowed ({worst.difference:.3g} of {worst.tolerance:.3g})"
    }


def _telling(row: StageParity) -> tuple[bool, float]:
    """What to name first: a number that is off says more than the decisions that follow from it."""
    return row.tolerance > 0, _badness(row)


def _badness(row: StageParity) -> float:
    """The difference as a share of what is allowed."""
    return row.difference / row.tolerance if row.tolerance > 0 else float("inf")
