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
from asag_deploy.errors import ConfigError, ParityError
from asag_deploy.manifest import Manifest, Mode, Precision, Preprocessing
from asag_export.gate import ParityReport, run_gate
from asag_export.graphs import DEFAULT_OPSET, OPSETS, export_stage
from asag_export.prepare import prepare
from asag_training.checkpoints import Checkpoint, select_head
from asag_training.config import MAIN_HEAD
from asag_training.model import build
from asag_training.plan import build_stages, postprocessing_plan, probing_plan

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")
FORMATS = ("onnx",)

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Export:
    """What came of an export."""

    bundle: Bundle
    parity: ParityReport


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
    overwrite: bool = False,
    keep_failed: bool = False,
    progress: Progress = lambda step: None,
) -> Export:
    """Export a checkpoint to a bundle at `output_dir` and prove that it computes the same.

    head: which of the parallel decoders, None for the main one; levels: the manual stop (`p3-p6`, `p4-p6`,
    `p5-p6`); mode: `fast` keeps 15 patches a level at most; progress: told what is being done, step by step.

    The bundle appears only when everything has succeeded, the parity gate included; with `keep_failed` one
    that fails the gate is kept for inspection, its manifest saying so.  Raises ConfigError for options that
    make no sense, CheckpointError for an unknown head, ExportError if a stage cannot be exported, ParityError
    if the gate fails, OutputError if the bundle cannot be written.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"unknown precision '{precision}'; choose one of {', '.join(PRECISIONS)}")
    if opset not in OPSETS:
        raise ConfigError(f"opset {opset} is not supported; choose {OPSETS.start} to {OPSETS.stop - 1}")
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
            writer.add_graph(stage.name, proto.SerializeToString(), inputs=inputs, outputs=outputs)
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
        progress("comparing with PyTorch")
        report = run_gate(
            build_stages(model, probing, preprocessing=preprocessing),
            open_network(None, writer.finish(manifest)),
            probing,
            backend="onnxruntime",
            precision=precision,
        )
        writer.finish(dataclasses.replace(manifest, parity=report.to_dict()))
        if not report.passed and not keep_failed:
            raise ParityError(_failure(report, Path(output_dir)))
    return Export(bundle=Bundle.open(output_dir), parity=report)


def _failure(report: ParityReport, output_dir: Path) -> str:
    failed = [row for row in report.stages if not row.passed]
    where = (
        f"output '{failed[0].output}' of graph '{failed[0].stage}' differs by {failed[0].difference:.3g} "
        f"where {failed[0].tolerance:.3g} is allowed"
        if failed
        else "the loop's stops or the detections differ end to end"
    )
    return (
        f"the exported bundle does not compute what the checkpoint computes: {where}; nothing was written to "
        f"'{output_dir}'; export again with --keep-failed to inspect it"
    )
