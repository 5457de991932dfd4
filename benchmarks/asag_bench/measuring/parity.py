"""The exporter's parity gate on any backend of this machine.

It compares a bundle, stage by stage and end to end, with its network in PyTorch on the CPU in float32.
"""

from __future__ import annotations

from pathlib import Path

from asag_deploy.backends import check_runs_here, open_network
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.engines.build import BuildOptions
from asag_deploy.errors import ConfigError
from asag_deploy.loop.contract import check_stages
from asag_export.gate.gate import Limits, run_gate
from asag_export.gate.parity import ParityReport
from asag_training.checkpoints import load_checkpoint, select_head, untrained_checkpoint
from asag_training.network.model import build
from asag_training.network.stage_plan import build_stages
from asag_training.settings import WeightsChoice

_OF_ENGINES = "tensorrt"


def judge(
    path: Path, backend: str, checkpoint: Path | None, weights: WeightsChoice = "model"
) -> ParityReport:
    """Put the gate to a bundle on a backend.

    checkpoint: what it was exported from, and `weights` which of those in it; None for the weights that
    `asag-export --untrained` draws.

    Raises BundleError, CheckpointError or BackendError if one cannot be used, ConfigError where a trained
    bundle's checkpoint is not given.
    """
    check_runs_here(backend)
    bundle = Bundle.open(path)
    check_stages(bundle)
    manifest = bundle.manifest
    if checkpoint is None and manifest.trained:
        raise ConfigError(
            f"the weights of '{path}' are trained ones: give the checkpoint it was exported from, with "
            "--checkpoint"
        )
    whole = (
        untrained_checkpoint(manifest.variant)
        if checkpoint is None
        else load_checkpoint(checkpoint, weights=weights)
    )
    chosen = select_head(whole, manifest.head)
    model = build(chosen.config, chosen.state).eval()
    preprocessing = manifest.preprocessing
    stages = build_stages(model, manifest.probing, chosen.head or "main", preprocessing)
    limits = Limits(
        size_divisor=preprocessing.size_divisor,
        longer_side=preprocessing.longer_side,
        images=BuildOptions().batches.most,
    )
    return run_gate(
        stages,
        open_network(backend, bundle),
        manifest.probing,
        backend=backend,
        precision=manifest.precision,
        limits=limits if backend.startswith(_OF_ENGINES) else None,
    )
