"""`Predictor`: a detector to be measured, and the way to its proposals; here that of a bundle."""

from __future__ import annotations

from dataclasses import dataclass

from asag_deploy.backends import DEFAULT_BACKEND
from asag_deploy.backends.network import Network
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import Manifest
from asag_deploy.detector import Detector
from asag_deploy.detector_options import DetectorOptions
from asag_deploy.loop.contract import check_stages
from asag_deploy.loop.stopping import StopRule
from asag_evaluation.evaluate import ProposalSource
from asag_evaluation.metrics.proposals import ProposalLoop, gives_proposals


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """A detector, and where there is one, a way to its proposals."""

    detector: Detector
    name: str
    """What it is, for reports: variant and backend."""
    proposals: ProposalSource | None
    """The boxes of the relation block; None for bundles of releases that kept them inside a graph."""


def bundle_predictor(bundle: Bundle, options: DetectorOptions | None = None) -> Predictor:
    """Load a bundle as `Detector.load` does, so that what is measured is what will run.

    Raises what `Detector.load` raises.
    """
    chosen = options or DetectorOptions()
    manifest = bundle.manifest
    name = f"{manifest.variant} ({chosen.backend or DEFAULT_BACKEND})"
    if not gives_proposals(manifest):
        return Predictor(detector=chosen.load(bundle), name=name, proposals=None)
    # First, so that options that make no sense are refused before the network is loaded.
    check_stages(bundle)
    rule = chosen.stop_rule(manifest)
    return proposing_predictor(
        manifest, chosen.open_network(bundle), rule, chosen, name=name, requests=chosen.requests
    )


def proposing_predictor(
    manifest: Manifest,
    network: Network,
    rule: StopRule,
    options: DetectorOptions,
    *,
    name: str,
    requests: int = 1,
) -> Predictor:
    """Make a predictor of a network whose decoder gives out its proposals.

    Of the options the loop, the deadline and the limits are looked at; the rest is in the network and the
    rule.
    """
    loop = ProposalLoop(network, network.loop(options.loop, options.deadline_ms))
    detector = Detector(
        manifest,
        network,
        rule,
        loop=loop,
        deadline_ms=options.deadline_ms,
        max_detections=options.max_detections,
        anchor_cap=options.anchor_cap,
        requests=requests,
    )
    return Predictor(detector=detector, name=name, proposals=loop.proposals)
