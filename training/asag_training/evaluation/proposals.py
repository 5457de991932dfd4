"""The boxes that the relation block gives the decoder, overheard between the loop and a network.

The runtime has no use for them, so nothing hands them on; they are among the decoder stage's outputs and
stay on the device until they are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from asag_deploy.manifest import Manifest, ProbeLevel, Probing
from asag_deploy.postprocess import anchors_of
from asag_deploy.stages import Array, Network, Stage
from asag_training.evaluation.overlaps import Boxes

SCORES, BOXES = "proposal_scores", "proposal_boxes"


def gives_proposals(manifest: Manifest) -> bool:
    """Whether a bundle's decoder gives out its proposals: those exported by earlier releases do not."""
    return {SCORES, BOXES} <= {output.name for output in manifest.graph("decoder").outputs}


class OverheardNetwork(Network):
    """A network as it is (`asag_deploy.stages.Network`), whose last proposals can be asked for."""

    def __init__(self, network: Network) -> None:
        """`network` must have a decoder that gives out its proposals."""
        self._network = network
        self._last: dict[str, Array] = {}
        self.patch_bucket, self.query_bucket = network.patch_bucket, network.query_bucket

    def stage(self, name: str) -> Stage:
        """The stage called `name`."""
        run = self._network.stage(name)
        if name != "decoder":
            return run

        def overheard(inputs: Mapping[str, Array]) -> dict[str, Array]:
            outputs = run(inputs)
            self._last = {output: outputs[output] for output in (SCORES, BOXES)}
            return outputs

        return overheard

    def upload(self, array: NDArray[Any]) -> Array:
        """As the network does it."""
        return self._network.upload(array)

    def download(self, array: Array) -> NDArray[Any]:
        """As the network does it."""
        return self._network.download(array)

    def shape(self, array: Array) -> tuple[int, ...]:
        """As the network says it."""
        return self._network.shape(array)

    def select(
        self,
        probing: Probing,
        level: ProbeLevel,
        anchors: Array,
        selected: Array,
        counts: Array,
        image_size: Array,
    ) -> tuple[Array, Array]:
        """As the network does it."""
        return self._network.select(probing, level, anchors, selected, counts, image_size)

    def proposals(self, counts: Sequence[int]) -> list[Boxes]:
        """Of the last batch, given how many queries of each image are real: (n, 4) x1, y1, x2, y2 relative to
        the image, best scored first."""
        scores, boxes = (self._network.download(self._last[name]) for name in (SCORES, BOXES))
        order = [(-scores[i, :count]).argsort(kind="stable") for i, count in enumerate(counts)]
        return [anchors_of(boxes[i, best], (1.0, 1.0)) for i, best in enumerate(order)]
