"""The exporter's parity gate on any backend of this machine.

    python -m asag_bench.gpu_machine.parity BUNDLE --backend onnxruntime-cuda [--checkpoint FILE]

Compares a bundle, stage by stage and end to end, with its network in PyTorch on the CPU in float32.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from asag_deploy.atomic import atomic_write
from asag_deploy.backends import open_network
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.command_line import OneSentenceParser, exit_code
from asag_deploy.engines.build import BuildOptions
from asag_deploy.errors import ParityError
from asag_export.gate.gate import Limits, run_gate
from asag_export.gate.parity import format_report
from asag_training.checkpoints import load_checkpoint, select_head, untrained_checkpoint
from asag_training.network.model import build
from asag_training.network.stage_plan import build_stages

PROGRAM = "parity"
_OF_ENGINES = "tensorrt"


def main(argv: Sequence[str] | None = None) -> int:
    """Judge; returns 0 if the gate passed, or 2 with the reason in one sentence on stderr."""

    def command() -> int:
        options = _parser().parse_args(argv)
        return judge(options.bundle, options.backend, options.checkpoint, options.output)

    return exit_code(PROGRAM, command)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = OneSentenceParser(prog=PROGRAM, description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("bundle", type=Path, metavar="BUNDLE", help="the bundle's folder")
    add("--backend", required=True, metavar="B", help="what runs it")
    add("--checkpoint", type=Path, metavar="FILE", help="what it was exported from (default: --untrained)")
    add("--output", type=Path, metavar="FILE", help="write the report here too")
    return parser


def judge(path: Path, backend: str, weights: Path | None, output: Path | None) -> int:
    """Put the gate to a bundle on a backend, print its report and write it.

    Raises BundleError, CheckpointError or BackendError if one cannot be used, ParityError if the gate fails.
    """
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    whole = untrained_checkpoint(manifest.variant) if weights is None else load_checkpoint(weights)
    checkpoint = select_head(whole, manifest.head)
    model = build(checkpoint.config, checkpoint.state).eval()
    preprocessing = manifest.preprocessing
    stages = build_stages(model, manifest.probing, checkpoint.head or "main", preprocessing)
    limits = Limits(
        size_divisor=preprocessing.size_divisor,
        longer_side=preprocessing.longer_side,
        images=BuildOptions().batches.most,
    )
    report = run_gate(
        stages,
        open_network(backend, bundle),
        manifest.probing,
        backend=backend,
        precision=manifest.precision,
        limits=limits if backend.startswith(_OF_ENGINES) else None,
    )
    if output is not None:
        with atomic_write(output) as file:
            file.write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
    print(format_report(report))
    if not report.passed:
        raise ParityError(f"the bundle at '{path}' failed the parity gate on {backend}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
