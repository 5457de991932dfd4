"""A checkpoint becomes a bundle."""

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
from asag_deploy.engines.adapter import FORMATS as ENGINE_FORMATS
from asag_deploy.engines.build import BuildOptions
from asag_deploy.engines.shapes import Batches
from asag_deploy.errors import ConfigError, ParityError
from asag_export.gate.checks import usual_shapes
from asag_export.gate.engines import EngineParity, engines_can_run, gate_engines
from asag_export.gate.gate import run_gate
from asag_export.gate.parity import ParityReport
from asag_export.graphs import DEFAULT_OPSET, ExportedStage, check_opset, export_stage
from asag_export.half_precision import with_half_features
from asag_export.prepare import FULL_PRECISION, prepare
from asag_training.checkpoints import Checkpoint, select_head
from asag_training.network.config import MAIN_HEAD, AsagConfig
from asag_training.network.model import Asag, build
from asag_training.network.stage_plan import build_stages, postprocessing_plan, probing_plan
from asag_training.network.stages import StageModule

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
    manifest = Manifest(
        producer=f"asag-deploy {__version__}",
        variant=config.variant,
        head=chosen.head or MAIN_HEAD,
        precision=precision,
        opset=opset,
        trained=chosen.trained,
        categories=chosen.categories,
        preprocessing=preprocessing or chosen.preprocessing or Preprocessing(),
        probing=probing,
        postprocessing=postprocessing_plan(config),
        graphs=(),
    )
    model = build(config, chosen.state)
    with write_bundle(output_dir, overwrite=overwrite) as writer:
        making = _Making(model, config, manifest, writer, progress)
        making.write_graphs()
        batches = Batches() if engines is None else engines.batches
        report = making.judge(batches)
        found: EngineParity | None = None
        if engines is not None and report.passed and engines_can_run(engines):
            found = making.judge_engines(engines)
            if found.full_precision:
                report = making.judge(batches)  # other graphs than those that were judged
        parity = report.to_dict() | ({"engines": found.to_dict()} if found is not None else {})
        writer.finish(dataclasses.replace(manifest, parity=parity))
        failed = report if not report.passed or found is None else found.report
        if not failed.passed and not keep_failed:
            raise ParityError(_failure(failed, Path(output_dir)))
    return Export(bundle=Bundle.open(output_dir), parity=report, engines=found)


class _Making:
    """A bundle in the making: its graphs are written and judged, and some perhaps written again."""

    def __init__(
        self, model: Asag, config: AsagConfig, manifest: Manifest, writer: BundleWriter, progress: Progress
    ) -> None:
        self._model, self._config, self._manifest = model, config, manifest
        self._writer, self._progress = writer, progress
        self._reference = self._stages(model)

    def write_graphs(self) -> None:
        """Every stage in the precision of the manifest."""
        precision = self._manifest.precision
        for stage in self._stages(prepare(self._model, precision)):
            self._progress(f"exporting {stage.name}")
            own: Precision | None = "fp32" if stage.name in FULL_PRECISION else None
            self._add(stage.name, self._export(stage, precision), own)

    def judge(self, batches: Batches) -> ParityReport:
        """The graphs, run by ONNX Runtime, against the network in PyTorch."""
        bundle = self._writer.finish(self._manifest)
        self._progress("comparing with PyTorch")
        return run_gate(
            self._reference,
            open_network(None, bundle),
            self._manifest.probing,
            backend="onnxruntime",
            precision=self._manifest.precision,
            usual=usual_shapes(bundle.manifest, batches),
        )

    def judge_engines(self, engines: BuildOptions) -> EngineParity:
        """Engines of the graphs, on the GPU here, against the network in PyTorch."""
        self._progress(f"comparing {engines.engine_format} with PyTorch")
        return gate_engines(
            self._reference,
            self._writer.finish(self._manifest),
            engines,
            self._manifest.probing,
            precision=self._manifest.precision,
            in_float32=self._in_float32,
        )

    def _in_float32(self, name: str) -> Bundle:
        """The bundle with the stage of that name in float32 between features in half precision."""
        self._progress(f"exporting {name} in float32")
        (stage,) = (stage for stage in self._stages(prepare(self._model, "fp32")) if stage.name == name)
        self._add(name, with_half_features(*self._export(stage, "fp32")), "fp32")
        return self._writer.finish(self._manifest)

    def _stages(self, model: Asag) -> list[StageModule]:
        return build_stages(model, self._manifest.probing, preprocessing=self._manifest.preprocessing)

    def _export(self, stage: StageModule, precision: Precision) -> ExportedStage:
        opset = self._manifest.opset
        return export_stage(stage, self._config, self._manifest.probing, precision=precision, opset=opset)

    def _add(self, name: str, exported: ExportedStage, precision: Precision | None) -> None:
        proto, inputs, outputs = exported
        content = proto.SerializeToString()
        self._writer.add_graph(name, content, inputs=inputs, outputs=outputs, precision=precision)


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
