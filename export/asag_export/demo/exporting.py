"""What every part of the demo begins with: the export of a checkpoint, and what its gate found."""

from __future__ import annotations

import time
from pathlib import Path

from asag_deploy import Bundle


def export(
    step: str, path: Path, output: Path, *, limits: tuple[str, ...] = (), in_full: bool = True
) -> Bundle:
    """Export a checkpoint to `output`/bundle, under the number `step`, and print the gate's report.

    limits: settings of the network to change, such as `anchor_cap=600`; in_full: print all of the report, not
    only what it comes to.
    """
    from asag_export.bundle_export import export_bundle
    from asag_export.gate.parity import format_report
    from asag_training.checkpoints import load_checkpoint
    from asag_training.checkpoints.checkpoint import change_settings

    checkpoint = change_settings(load_checkpoint(path), limits)
    print(f"{step} Exporting {checkpoint.config.variant} to {output / 'bundle'}", flush=True)
    start = time.perf_counter()
    exported = export_bundle(checkpoint, output / "bundle", overwrite=True)
    print(f"   done in {time.perf_counter() - start:.0f} s")
    if in_full:
        print("   " + format_report(exported.parity).replace("\n", "\n   "))
    else:
        outputs = len(exported.parity.stages)
        print(
            f"   passed: all {outputs} outputs of its graphs are what PyTorch computes, within the tolerances"
        )
    return exported.bundle
