"""The parity gate on engines, where a GPU can run them, and which stages are better done in float32.

An engine may compute otherwise than the graph it was built from: by other kernels, which sum up in another
order or in half precision.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from asag_deploy.backends import BACKENDS, open_network
from asag_deploy.backends.tensorrt.backend import EngineNetwork
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.engines.build import BuildOptions, build_engines
from asag_deploy.engines.inspector import Layers
from asag_deploy.engines.targets import parse_target
from asag_deploy.engines.targets import this_gpu as find_gpu
from asag_export.gate.checks import OTHER_SHAPES, usual_shapes
from asag_export.gate.gate import Limits, run_gate
from asag_export.gate.parity import ParityReport, StageParity
from asag_training.network.stages import StageModule


@dataclass(frozen=True, kw_only=True)
class EngineParity:
    """Result of the gate on engines."""

    report: ParityReport
    full_precision: dict[str, str] = field(default_factory=dict)
    """The stages that stayed in float32, and why, in the order in which that was found necessary."""
    layers: dict[str, Layers | None] = field(default_factory=dict)
    """What the engine of each stage was built of, as the library's inspector says."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values, for the manifest."""
        more = {"full_precision": dict(self.full_precision), "layers": dict(self.layers)}
        return {**self.report.to_dict(), **more}


def engines_can_run(options: BuildOptions) -> bool:
    """Return whether this machine can run the engines that `options` ask for."""
    gpu = find_gpu()
    if gpu is None or BACKENDS[options.engine_format].problem() is not None:
        return False
    return not options.gpus or gpu.capability in {parse_target(text) for text in options.gpus}


def judge_engines(
    reference: Sequence[StageModule], bundle: Bundle, options: BuildOptions
) -> tuple[ParityReport, dict[str, Layers | None]]:
    """Build the engines of a bundle and compare them on this machine's GPU with the network in PyTorch.

    reference: the network's stages, float32.  Returns what the gate found, and what the engine of each stage
    was built of, as the library's inspector says.
    """
    manifest = bundle.manifest
    build_engines(bundle, options)
    network = open_network(options.engine_format, bundle)
    layers = network.layers() if isinstance(network, EngineNetwork) else {}
    report = run_gate(
        reference,
        network,
        manifest.probing,
        backend=options.engine_format,
        precision=manifest.precision,
        limits=Limits(
            size_divisor=manifest.preprocessing.size_divisor,
            longer_side=manifest.preprocessing.longer_side,
            images=options.batches.most,
        ),
        usual=usual_shapes(manifest, options.batches),
    )
    return report, layers


def stages_to_fall_back(report: ParityReport, stages: Collection[str]) -> dict[str, str]:
    """Choose which of `stages` compute in float32 from now on, each with the reason; none if the gate passed.

    They are those that failed.  Where every stage passes by itself but not all of them together, it is the
    one that came nearest to its tolerance.
    """
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
    """Order what to name first: a number that is off says more than the decisions that follow from it."""
    return row.tolerance > 0, _badness(row)


def _badness(row: StageParity) -> float:
    """Return the difference as a share of what is allowed."""
    return row.difference / row.tolerance if row.tolerance > 0 else float("inf")
