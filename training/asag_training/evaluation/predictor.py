"""A checkpoint or a bundle as a `Detector`, so that both are measured by the same code.

PyTorch is one more backend: the stages of a checkpoint run under the loop that bundles run under.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from asag_deploy import __version__
from asag_deploy.backends import open_network
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import Category, Level, Manifest, Mode, Preprocessing
from asag_deploy.detector import Detector
from asag_deploy.errors import ConfigError
from asag_deploy.loop.stopping import stop_rule
from asag_evaluation.evaluate import ProposalSource
from asag_evaluation.metrics.proposals import ProposalLoop, gives_proposals
from asag_training.checkpoints import load_checkpoint, select_head
from asag_training.network.config import MAIN_HEAD
from asag_training.network.model import Asag, build
from asag_training.network.stage_plan import build_stages, postprocessing_plan, probing_plan
from asag_training.network.stages import TorchNetwork

TORCH = "torch"
"""The backend that runs checkpoints."""


class Predictor:
    """A detector, and where there is one, a way to its proposals."""

    def __init__(self, detector: Detector, name: str, proposals: ProposalSource | None) -> None:
        self.detector = detector
        self.name = name
        """What it is, for reports: variant and backend."""
        self.proposals = proposals
        """The boxes of the relation block; None for bundles of releases that kept them inside a graph."""


def load_predictor(
    path: str | os.PathLike[str],
    *,
    backend: str | None = None,
    mode: Mode | None = None,
    max_level: Level | None = None,
    head: str | None = None,
    preprocessing: Preprocessing | None = None,
    device: str = "cpu",
) -> Predictor:
    """Load a bundle (a directory) or a checkpoint (a file).

    backend: for a bundle one of `asag_deploy.backends.BACKENDS`, for a checkpoint `torch`; None for the
    default.  `head`, `preprocessing` and `device` are for checkpoints; a bundle has decided on them.  Raises
    BundleError, CheckpointError, BackendError, and ConfigError for options that do not go together.
    """
    if Path(path).is_dir():
        if head is not None or preprocessing is not None or device != "cpu":
            raise ConfigError(
                f"'{path}' is a bundle, whose head, image size and device are decided: leave them out"
            )
        if backend == TORCH:
            raise ConfigError(f"'{path}' is a bundle, which PyTorch does not run: leave the backend out")
        return _bundle_predictor(Bundle.open(path), backend, mode, max_level)
    if backend not in (None, TORCH):
        raise ConfigError(
            f"'{path}' is a checkpoint, which only PyTorch runs, not {backend}: export it, "
            "or leave the backend out"
        )
    checkpoint = load_checkpoint(Path(path))
    checkpoint = select_head(checkpoint, head or checkpoint.head_names[-1])
    return network_predictor(
        build(checkpoint.config, checkpoint.state),
        checkpoint.categories,
        preprocessing=preprocessing or checkpoint.preprocessing,
        mode=mode,
        max_level=max_level,
        trained=checkpoint.trained,
        device=device,
    )


def network_predictor(
    model: Asag,
    categories: Sequence[Category],
    *,
    head: str = MAIN_HEAD,
    preprocessing: Preprocessing | None = None,
    mode: Mode | None = None,
    max_level: Level | None = None,
    trained: bool = True,
    device: torch.device | str = "cpu",
) -> Predictor:
    """A network as it is in memory; a trainer must call `model.train()` again when it goes on.

    Raises ConfigError for an unknown head or mode.
    """
    preprocessing = preprocessing or Preprocessing()
    probing = probing_plan(model.config, mode=mode or "exact")
    stages = [stage.to(device) for stage in build_stages(model, probing, head, preprocessing)]
    manifest = Manifest(
        producer=f"asag-deploy {__version__}",
        variant=model.config.variant,
        head=head,
        precision="fp32",
        opset=0,
        trained=trained,
        categories=tuple(categories),
        preprocessing=preprocessing,
        probing=probing,
        postprocessing=postprocessing_plan(model.config),
        graphs=(),
    )
    network = TorchNetwork(stages, device)
    loop = ProposalLoop(network)
    detector = Detector(manifest, network, stop_rule(manifest, mode, max_level), loop=loop)
    return Predictor(detector, f"{model.config.variant} (torch)", loop.proposals)


def _bundle_predictor(
    bundle: Bundle, backend: str | None, mode: Mode | None, max_level: Level | None
) -> Predictor:
    manifest = bundle.manifest
    name = f"{manifest.variant} ({backend or 'onnxruntime'})"
    rule = stop_rule(manifest, mode, max_level)
    network = open_network(backend, bundle, None)
    if not gives_proposals(manifest):
        return Predictor(Detector(manifest, network, rule), name, None)
    loop = ProposalLoop(network)
    return Predictor(Detector(manifest, network, rule, loop=loop), name, loop.proposals)
