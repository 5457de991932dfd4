"""Trained peers as detectors: the same pictures as a bundle's, from memory to detections, on any backend."""

from __future__ import annotations

from asag_bench.light_peers.graph import IMAGE_SIZE, Canvas, export_peer_graph
from asag_bench.light_peers.peer import TrainedPeer
from asag_bench.light_peers.raw import Raw, deployed
from asag_bench.runners.graphs import several_graphs
from asag_bench.runners.peers import GRAPH, PIXELS, RESULTS
from asag_deploy.backends.network import Network
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.detector_options import DetectorOptions
from asag_deploy.images.reading import RgbImage
from asag_deploy.processing.postprocess import Found
from asag_deploy.processing.preprocess import make_batch
from asag_deploy.scratch import scratch_folder


class PeerDetector:
    """A trained peer on a backend.

    A graph is made for each canvas, before the first picture of that size is detected in, so that every size
    in it is fixed.
    """

    def __init__(self, peer: TrainedPeer, bundle: Bundle, options: DetectorOptions) -> None:
        """Take the peer, a bundle of which only the form of its manifest is used, and the backend."""
        self._peer, self._bundle, self._options = peer, bundle, options
        self._preprocessing = peer.said.recipe.preprocessing
        self._networks: dict[Canvas, Network] = {}

    def __call__(self, image: RgbImage) -> Found:
        """Detect in one RGB picture.

        Raises BackendError if the backend cannot run the peer, ExportError if there is no graph of it.
        """
        pixels, sizes = make_batch([image], self._preprocessing)
        network = self._network((pixels.shape[1], pixels.shape[2]))
        given = {PIXELS: network.upload(pixels), IMAGE_SIZE: network.upload(sizes)}
        outputs = network.stage(GRAPH)(given)
        raw = Raw(*(network.download(outputs[name])[0] for name in RESULTS))
        canvas, shape = (pixels.shape[1], pixels.shape[2]), (image.shape[0], image.shape[1])
        return deployed(raw, self._peer.said.recipe.peer, canvas, sizes[0], shape)

    def _network(self, canvas: Canvas) -> Network:
        if canvas not in self._networks:
            model = export_peer_graph(self._peer, canvas, self._bundle.manifest.opset)
            with scratch_folder() as folder:
                wrapped = several_graphs({GRAPH: model}, self._bundle, folder)
                self._networks[canvas] = self._options.open_network(wrapped)
        return self._networks[canvas]
