"""Peers as runners: the same pictures as the bundle's, at the peer's own size, from memory to detections."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from asag_bench.runners.peers import GRAPH, PEERS, PIXELS, RESULTS, Peer
from asag_bench.runners.runner import Run
from asag_deploy.backends.network import Network
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import Level
from asag_deploy.detector_options import DetectorOptions
from asag_deploy.errors import BackendError
from asag_deploy.images.reading import RgbImage
from asag_deploy.processing.postprocess import detections_of
from asag_deploy.scratch import scratch_folder
from asag_deploy.timing import since

_OF_ENGINES = "tensorrt"


class PeerRunner:
    """A peer on one backend.

    A graph is made for each number of images, with every size fixed, which is how peers are deployed and what
    backends run fastest.  That is done before the clock starts, at the first call of so many images.
    """

    def __init__(self, name: str, peer: Peer, open_network: Callable[[int], Network]) -> None:
        """Take what opens the peer's graph for a number of images."""
        self.name = name
        self._peer = peer
        self._open_network = open_network
        self._networks: dict[int, Network] = {}

    def __call__(self, images: Sequence[RgbImage], max_level: Level | None) -> Run:
        """Detect in a batch of RGB images; there is no level to stop at."""
        network = self._network(len(images))
        start = time.perf_counter()
        scores, labels, boxes = self._run(network, images)
        for i, image in enumerate(images):
            shape = (image.shape[0], image.shape[1])
            detections_of(scores[i], labels[i], boxes[i], original_shape=shape, nms_iou=None)
        return Run(total_ms=since(start))

    def _run(self, network: Network, images: Sequence[RgbImage]) -> list[NDArray[Any]]:
        pixels = np.stack([stretched(image, self._peer.side) for image in images])
        outputs = network.stage(GRAPH)({PIXELS: network.upload(pixels)})
        return [network.download(outputs[result]) for result in RESULTS]

    def _network(self, images: int) -> Network:
        if images not in self._networks:
            self._networks[images] = self._open_network(images)
        return self._networks[images]


def stretched(image: RgbImage, side: int) -> RgbImage:
    """Resize a picture to a square, whatever its proportions; interpolated as the bundle's pictures are."""
    shrinks = side * side < image.shape[0] * image.shape[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(image, (side, side), interpolation=method).astype(np.uint8, copy=False)


def open_peer(name: str, runner_name: str, bundle: Bundle, options: DetectorOptions) -> PeerRunner:
    """Open a peer on the backend of `options`, in whose precision it computes.

    Raises BackendError if the backend cannot run it; its first call raises what `export_peer` does.
    """
    if (options.backend or "").startswith(_OF_ENGINES):
        raise BackendError(
            f"the reference '{name}' has no engines, which the backend '{options.backend}' runs: time it "
            "with onnxruntime, openvino or openvino-bf16"
        )
    from asag_bench.runners.graphs import several_graphs
    from asag_bench.runners.peer_networks import export_peer

    def open_network(images: int) -> Network:
        model = export_peer(name, images, bundle.manifest.opset)
        with scratch_folder() as folder:
            return options.open_network(several_graphs({GRAPH: model}, bundle, folder))

    return PeerRunner(runner_name, PEERS[name], open_network)
