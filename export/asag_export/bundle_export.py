"""A checkpoint becomes a bundle."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from asag_deploy import __version__
from asag_deploy.backends import open_network
from asag_deploy.bundle import Bundle, write_bundle
from asag_deploy.engines.adapter import FORMATS as ENGINE_FORMATS
from asag_deploy.engines.build import BuildOptions
from asag_deploy.engines.shapes import Batches
from asag_deploy.errors import ConfigError, ParityError
from asag_deploy.manifest import Manifest, Mode, Precision, Preprocessing
from asag_export.engine_gate import EngineParity, engines_can_run, gate_engines
from asag_export.gate import run_gate
from asag_export.gate_checks import usual_shapes
from asag_export.graphs import DEFAULT_OPSET, check_opset, export_stage
from asag_export.mixed import with_half_features
from asag_export.parity import ParityReport
from asag_export.prepare import FULL_PRECISION, prepare
from asag_training.checkpoints import Checkpoint, select_head
from asag_training.config import MAIN_HEAD
from asag_training.model import build
from asag_training.plan import build_stages, postprocessing_plan, probing_plan

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")
FORMATS = ("onnx", *ENGINE_FORMATS)

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Export:
    """What came of an export."""

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
    chosen = select_head(checkpoint, head or checkpoint.head_names[-1])
    config = chosen.config
    probing = probing_plan(config, levels, mode)
    preprocessing = preprocessing or chosen.preprocessing or Preprocessing()
    model = build(config, chosen.state)
    exported = build_stages(prepare(model, precision), probing, preprocessing=preprocessing)

    with write_bundle(output_dir, overwrite=overwrite) as writer:
        for stage in exported:
            progress(f"exporting {stage.name}")
            proto, inputs, outputs = export_stage(stage, config, probing, precision=precision, opset=opset)
            full: Precision | None = "fp32" if stage.name in FULL_PRECISION else None
            writer.add_graph(
                stage.name, proto.SerializeToString(), inputs=inputs, outputs=outputs, precision=full
            )
        manifest = Manifest(
            producer=f"asag-deploy {__version__}",
            variant=config.variant,
            head=chosen.head or MAIN_HEAD,
            precision=precision,
            opset=opset,
            trained=chosen.trained,
            categories=chosen.categories,
            preprocessing=preprocessing,
            probing=probing,
            postprocessing=postprocessing_plan(config),
            graphs=(),
        )
        reference = build_stages(model, probing, preprocessing=preprocessing)

        def judge(bundle: Bundle) -> ParityReport:
            progress("comparing with PyTorch")
            network = open_network(None, bundle)
            usual = usual_shapes(bundle.manifest, Batches() if engines is None else engines.batches)
            return run_gate(
                reference, network, probing, backend="onnxruntime", precision=precision, usual=usual
            )

        def in_float32(name: str) -> Bundle:
            progress(f"exporting {name} in float32")
            stages = build_stages(prepare(model, "fp32"), probing, preprocessing=preprocessing)
            (stage,) = (stage for stage in stages if stage.name == name)
            full = export_stage(stage, config, probing, precision="fp32", opset=opset)
            proto, inputs, outputs = with_half_features(*full)
            writer.add_graph(
                name, proto.SerializeToString(), inputs=inputs, outputs=outputs, precision="fp32"
            )
            return writer.finish(manifest)

        report = judge(writer.finish(manifest))
        found: EngineParity | None = None
        if engines is not None and report.passed and engines_can_run(engines):
            progress(f"comparing {engines.engine_format} with PyTorch")
            found = gate_engines(
                reference,
                writer.finish(manifest),
                engines,
                probing,
                precision=precision,
                in_float32=in_float32,
            )
            if found.full_precision:
                report = judge(writer.finish(manifest))  # other graphs than those that were judged
        parity = report.to_dict() | ({"engines": found.to_dict()} if found is not None else {})
        writer.finish(dataclasses.replace(manifest, parity=parity))
        failed = report if not report.passed or found is None else found.report
        if not failed.passed and not keep_failed:
            raise ParityError(_failure(failed, Path(output_dir)))
    return Export(bundle=Bundle.open(output_dir), parity=report, engines=found)


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
