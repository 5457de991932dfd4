"""Export a checkpoint to a bundle: export the stages, write them, judge them, and fall back to float32."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from asag_deploy import __version__
from asag_deploy.backends import open_network
from asag_deploy.bundle.bundle import Bundle, BundleWriter, write_bundle
from asag_deploy.bundle.manifest import Manifest, Mode, Precision, Preprocessing
from asag_deploy.engines.build import BuildOptions
from asag_deploy.engines.shapes import Batches
from asag_deploy.errors import ConfigError, ParityError
from asag_export.choices import DEFAULT_OPSET, PRECISIONS
from asag_export.gate.checks import usual_shapes
from asag_export.gate.engines import EngineParity, engines_can_run, judge_engines, stages_to_fall_back
from asag_export.gate.gate import run_gate
from asag_export.gate.parity import ParityReport
from asag_export.half_precision import with_half_features
from asag_export.stage_export import FULL_PRECISION, check_opset, export_stage, prepare_for_export
from asag_training.checkpoints import Checkpoint, select_head
from asag_training.network.config import MAIN_HEAD
from asag_training.network.model import Asag, build
from asag_training.network.stage_plan import build_stages, postprocessing_plan, probing_plan
from asag_training.network.stages import StageModule

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Export:
    """Result of an export."""

    bundle: Bundle
    parity: ParityReport
    engines: EngineParity | None = None
    """What the gate found on engines; None if none were asked for, or no GPU here can run them."""


def export_bundle(
    checkpoint: Checkpoint,
    output_dir: str | os.PathLike[str],
    *,
    head: str | None = None,
    levels: str = "p3-p6",
    mode: Mode = "exact",
    precision: Precision = "fp32",
    opset: int = DEFAULT_OPSET,
    preprocessing: Preprocessing | None = None,
    engines: BuildOptions | None = None,
    overwrite: bool = False,
    keep_failed: bool = False,
    progress: Progress = lambda step: None,
) -> Export:
    """Export a checkpoint to a bundle at `output_dir` and prove that it computes the same.

    head: which of the parallel decoders, None for the main one; levels: the manual stop (`p3-p6`, `p4-p6`,
    `p5-p6`); mode: `fast` keeps 15 patches a level at most; engines: built and compared as well, if a GPU
    here can run them, where stages that fail in float16 stay in float32; progress: told what is being done.

    The bundle appears only when everything has succeeded, the parity gate included; with `keep_failed` one
    that fails the gate is kept for inspection, its manifest saying so.  Raises ConfigError for options that
    make no sense, CheckpointError for an unknown head, ExportError if a stage cannot be exported, ParityError
    if the gate fails, OutputError if the bundle cannot be written.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"unknown precision '{precision}'; choose one of {', '.join(PRECISIONS)}")
    check_opset(opset)
    checkpoint = select_head(checkpoint, head or checkpoint.head_names[-1])
    manifest = Manifest(
        producer=f"asag-deploy {__version__}",
        variant=checkpoint.config.variant,
        head=checkpoint.head or MAIN_HEAD,
        precision=precision,
        opset=opset,
        trained=checkpoint.trained,
        categories=checkpoint.categories,
        preprocessing=preprocessing or checkpoint.prepared,
        probing=probing_plan(checkpoint.config, levels, mode),
        postprocessing=postprocessing_plan(checkpoint.config),
        graphs=(),
    )
    with write_bundle(output_dir, overwrite=overwrite) as writer:
        parity, on_engines = _export_and_judge(checkpoint, manifest, engines, writer, progress)
        told = parity.to_dict() | ({"engines": on_engines.to_dict()} if on_engines is not None else {})
        writer.finish(dataclasses.replace(manifest, parity=told))
        last = parity if not parity.passed or on_engines is None else on_engines.report
        if not last.passed and not keep_failed:
            raise ParityError(_failure(last, Path(output_dir)))
    return Export(bundle=Bundle.open(output_dir), parity=parity, engines=on_engines)


def _export_and_judge(
    checkpoint: Checkpoint,
    manifest: Manifest,
    engines: BuildOptions | None,
    writer: BundleWriter,
    progress: Progress,
) -> tuple[ParityReport, EngineParity | None]:
    """Export all stages, write them and judge them; do it again in float32 for those that fail on engines."""
    model = build(checkpoint.config, checkpoint.state)
    reference = _stages(model, manifest)
    wanted = {stage.name for stage in reference}
    may_fall_back = wanted - set(FULL_PRECISION) if manifest.precision == "fp16" else set()
    in_float32: dict[str, str] = {}
    on_engines: EngineParity | None = None
    while True:
        precision: Precision = "fp32" if in_float32 else manifest.precision
        for stage in _stages(prepare_for_export(model, precision), manifest):
            if stage.name not in wanted:
                continue
            progress(f"exporting {stage.name}" + (" in float32" if in_float32 else ""))
            exported = export_stage(
                stage, checkpoint.config, manifest.probing, precision=precision, opset=manifest.opset
            )
            proto, inputs, outputs = with_half_features(*exported) if in_float32 else exported
            own: Precision | None = "fp32" if stage.name in (*FULL_PRECISION, *in_float32) else None
            content = proto.SerializeToString()
            writer.add_graph(stage.name, content, inputs=inputs, outputs=outputs, precision=own)
        bundle = writer.finish(manifest)

        progress("comparing with PyTorch")
        parity = run_gate(
            reference,
            open_network(None, bundle),
            manifest.probing,
            backend="onnxruntime",
            precision=manifest.precision,
            usual=usual_shapes(bundle.manifest, Batches() if engines is None else engines.batches),
        )
        if engines is None or not parity.passed or not engines_can_run(engines):
            return parity, on_engines

        progress(f"comparing {engines.engine_format} with PyTorch")
        report, layers = judge_engines(reference, bundle, engines)
        on_engines = EngineParity(report=report, full_precision=dict(in_float32), layers=layers)
        failing = stages_to_fall_back(report, may_fall_back - set(in_float32))
        if not failing:
            return parity, on_engines
        wanted, in_float32 = set(failing), in_float32 | failing


def _stages(model: Asag, manifest: Manifest) -> list[StageModule]:
    return build_stages(model, manifest.probing, preprocessing=manifest.preprocessing)


def _failure(report: ParityReport, output_dir: Path) -> str:
    check, worst = next(report.failures(), ("", None))
    if worst is None:
        where = "the loop's stops or the detections differ end to end"
    else:
        where = (
            f"output '{worst.output}' of graph '{worst.stage}' differs by {worst.difference:.3g} "
            f"where {worst.tolerance:.3g} is allowed" + (f" (the check '{check}')" if check else "")
        )
    return (
        f"the exported bundle does not compute what the checkpoint computes with {report.backend}: {where}; "
        f"nothing was written to '{output_dir}'; export again with --keep-failed to inspect it"
    )
