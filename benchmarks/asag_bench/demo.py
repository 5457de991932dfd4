"""`make bench`: what the network that comes with the project costs on this machine, and how well it detects.

It is exported, and measured on scenes it has not seen, with every backend that the processor has and the
references that need nothing else; that takes a few minutes.
"""

from __future__ import annotations

from pathlib import Path

from asag_bench.measuring.plan import Plan
from asag_bench.measuring.run import run
from asag_bench.reports.report import check_report, on_screen, write_report
from asag_bench.result import Options
from asag_deploy.backends import BACKENDS
from asag_evaluation.data.coco import VAL_SPLIT
from asag_evaluation.data.scenes import write_scenes
from asag_evaluation.plots import check_plots
from asag_export.bundle_export import export_bundle
from asag_export.demo.networks import CHECKPOINT, SEED
from asag_training.checkpoints import load_checkpoint

ON_CPU = ("onnxruntime", "openvino", "openvino-bf16")
REFERENCES = ("torch", "unsplit", "always-probe", "adamixer-6")
_SIZE = 320


def bench_demo(output_dir: Path, *, scenes: int, duration: float, command: str) -> None:
    """Export, draw and measure; print and write what was found.

    scenes: how many pictures.  duration: most seconds for an image group.

    Raises what exporting and measuring do.
    """
    check_plots("asag-bench")
    check_report(output_dir)
    print(f"1. Exporting the network to {output_dir / 'bundle'}", flush=True)
    export_bundle(load_checkpoint(CHECKPOINT), output_dir / "bundle", overwrite=True)
    data = output_dir / f"scenes-{scenes}"
    if not (data / VAL_SPLIT).exists():
        print(f"2. Drawing {scenes} scenes that the network has never seen", flush=True)
        write_scenes(data, count=scenes, seed=SEED, size=_SIZE, split=VAL_SPLIT)
    backends = tuple(name for name in ON_CPU if BACKENDS[name].problem() is None)
    plan = Plan(
        command=command,
        bundles=(output_dir / "bundle",),
        data=data,
        checkpoint=CHECKPOINT,
        options=Options(backends=backends, references=REFERENCES, duration_s=duration),
    )
    print(f"3. Measuring {', '.join(backends)} and {', '.join(REFERENCES)}\n", flush=True)
    result = run(plan)
    write_report(result, output_dir, plots=True)
    print(on_screen(result))
    print(f"\nTable: {output_dir / 'result.md'}, plots: {output_dir}/*.png")
