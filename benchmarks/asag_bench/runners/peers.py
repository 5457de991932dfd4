"""Peers: other detectors of our day, timed beside a bundle in the same rounds and by the same backend.

Each is the network of its paper, in the size that its authors publish, with random weights.  So it is for
speed, and what is known of its accuracy is what was published.  This file says which there are;
`peer_networks` builds them, `peer_runner` times them.
"""

from __future__ import annotations

from dataclasses import dataclass

GRAPH = "peer"
PIXELS, RESULTS = "pixels", ("det_scores", "det_labels", "det_boxes")
"""The input and the outputs of a peer's graph; the outputs are as `asag_deploy.loop.stages` has them."""
BEST = 300
"""Detections of each image, in all that are published here."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A detector as it was published."""

    title: str
    side: int
    """Its input is a square of so many pixels a side; pictures are stretched to it."""
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Of the channels R, G, B, which go from 0 to 1."""
    ranks_queries: bool = False
    """Whether a query has learned content by its rank, so that queries have to be chosen in order."""
    ap: float
    """Published AP on COCO val2017, in percent."""
    parameters_m: float
    """Published number of parameters, in millions."""
    gflops: float | None
    """Published cost of one image, multiplications and additions counted apart; None where none is given."""
    source: str
    """Where these figures stand."""


PEERS = {
    "d-fine-s": Peer(
        title="D-FINE-S", side=640, ap=48.5, parameters_m=10, gflops=25, source="arXiv 2410.13842"
    ),
    "rt-detrv2-r50": Peer(
        title="RT-DETRv2-R50", side=640, ap=53.4, parameters_m=42, gflops=136, source="arXiv 2407.17140"
    ),
    "rf-detr-n": Peer(
        title="RF-DETR-N",
        side=384,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        ranks_queries=True,
        ap=48.4,
        parameters_m=30.5,
        gflops=None,
        source="arXiv 2511.09554",
    ),
}
"""The peers, by the name of the reference."""


def describe(peer: Peer) -> str:
    """Say in a few words what a peer is, for the command's help."""
    return f"{peer.title} at {peer.side}x{peer.side}, random weights, on each backend"
