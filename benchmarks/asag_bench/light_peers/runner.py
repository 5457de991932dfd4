"""Trained peers as detectors: the same pictures as a bundle's, from memory to detections, on any backend."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from asag_bench.light_peers.graph import IMAGE_SIZE, Canvas, export_peer_graph
from asag_bench.light_peers.peer import TrainedPeer
from asag_bench.runners.graphs import several_graphs
from asag_bench.runners.peers import BEST, GRAPH, PIXELS, RESULTS
from asag_deploy.backends.network import Network
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.detector_options import DetectorOptions
from asag_deploy.images.reading import RgbImage
from asag_deploy.processing.postprocess import Found, detections_of
from asag_deploy.processing.preprocess import make_batch
from asag_deploy.scratch import scratch_folder

_LEAST_SCORE, _NMS_IOU = 0.01, 0.65
"""Of the dense peer, as YOLOX is evaluated (arXiv 2107.08430 and its authors' code)."""

Floats = NDArray[np.float32]


class PeerDetector:
    """A trained peer on a backend.

    A graph is made for each canvas, before the first picture of that size is detected in, so that every size
    in it is fixed.
    """

    def __init__(self, peer: TrainedPeer, bundle: Bundle, options: DetectorOptions) -> None:
        """Take the peer, a bundle of which only the form of its manifest is used, and the backend."""
        self._peer, self._bundle, self._options = peer, bundle, options
        self._preprocessing = peer.said.recipe.preprocessing
        self._suppresses = peer.said.recipe.peer == "yolox-lite"
        self._networks: dict[Canvas, Network] = {}

    def __call__(self, image: RgbImage) -> Found:
        """Detect in one RGB picture.

        Raises BackendError if the backend cannot run the peer, ExportError if there is no graph of it.
        """
        pixels, sizes = make_batch([image], self._preprocessing)
        network = self._network((pixels.shape[1], pixels.shape[2]))
        given = {PIXELS: network.upload(pixels), IMAGE_SIZE: network.upload(sizes)}
        outputs = network.stage(GRAPH)(given)
        raw = _Raw(*(network.download(outputs[name])[0] for name in RESULTS))
        if self._suppresses:
            raw = suppressed(raw)
        height, width = (int(side) for side in sizes[0])
        scale = np.array([pixels.shape[2] / width, pixels.shape[1] / height] * 2, dtype=np.float32)
        shape = (image.shape[0], image.shape[1])
        return detections_of(raw.scores, raw.labels, raw.boxes * scale, original_shape=shape, nms_iou=None)

    def _network(self, canvas: Canvas) -> Network:
        if canvas not in self._networks:
            model = export_peer_graph(self._peer, canvas, self._bundle.manifest.opset)
            with scratch_folder() as folder:
                wrapped = several_graphs({GRAPH: model}, self._bundle, folder)
                self._networks[canvas] = self._options.open_network(wrapped)
        return self._networks[canvas]


class _Raw(NamedTuple):
    """What a graph gives for one picture."""

    scores: Floats
    """(D,)"""
    labels: NDArray[np.int64]
    """(D,)"""
    boxes: Floats
    """(D, 4) xyxy relative to the canvas."""


def suppressed(raw: _Raw) -> _Raw:
    """Drop what scores next to nothing, and of each class what overlaps a better one; keep the 300 best.

    OpenCV's NMS is used, which is compiled.
    """
    likely = raw.scores > _LEAST_SCORE
    scores, labels, boxes = raw.scores[likely], raw.labels[likely], raw.boxes[likely]
    if not len(scores):
        return _Raw(scores, labels, boxes)
    xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    kept = cv2.dnn.NMSBoxesBatched(xywh.tolist(), scores.tolist(), labels.tolist(), 0.0, _NMS_IOU)
    best = np.asarray(kept, dtype=np.int64).reshape(-1)
    best = best[np.argsort(-scores[best], kind="stable")][:BEST]
    return _Raw(scores[best], labels[best], boxes[best])
