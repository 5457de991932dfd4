"""The boxes that the relation block gives the decoder, kept for evaluation.

The runtime has no use for them, so nothing hands them on; they are among the decoder stage's outputs and
stay on the device until they are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from asag_deploy.backends.network import Network
from asag_deploy.bundle.manifest import Manifest, Probing
from asag_deploy.loop.loop import Begun, Loop
from asag_deploy.loop.stages import Array, Stages
from asag_deploy.loop.stopping import StopRule
from asag_deploy.processing.boxes import anchors_of
from asag_evaluation.metrics.overlaps import Boxes

SCORES, BOXES = "proposal_scores", "proposal_boxes"


def gives_proposals(manifest: Manifest) -> bool:
    """Return whether a bundle's decoder gives out its proposals: those exported by earlier releases do
    not."""
    return {SCORES, BOXES} <= {output.name for output in manifest.graph("decoder").outputs}


class ProposalLoop(Loop):
    """A network's own loop, whose last proposals can be asked for."""

    def __init__(self, network: Network, loop: Loop) -> None:
        """Wrap `loop`, which `network` opened; the network's decoder must give out its proposals."""
        self._network, self._loop = network, loop
        self._last: dict[str, Array] = {}

    def begin(
        self, network: Stages, probing: Probing, rule: StopRule, image: Array, image_size: NDArray[np.int64]
    ) -> Begun:
        """Run backbone, adaptive probing and decoder on a batch."""
        probed = self._loop(network, probing, rule, image, image_size)
        self._last = {name: probed.outputs[name] for name in (SCORES, BOXES)}
        return Begun(probed.outputs, lambda: probed)

    def proposals(self, counts: Sequence[int]) -> list[Boxes]:
        """Return the proposals of the last batch, given how many queries of each image are real: (n, 4) x1,
        y1, x2, y2 relative to the image, best scored first."""
        scores, boxes = (self._network.download(self._last[name]) for name in (SCORES, BOXES))
        order = [(-scores[i, :count]).argsort(kind="stable") for i, count in enumerate(counts)]
        return [anchors_of(boxes[i, best], (1.0, 1.0)) for i, best in enumerate(order)]
