"""What tests of the loop on the device share: images by where they stop, and what has to be the same."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from asag_deploy.backends.tensorrt.device_loop import DeviceLoop
from asag_deploy.backends.tensorrt.loop_graph import LoopGraph
from asag_deploy.detector import Detector
from asag_deploy.processing.canvases import Canvas
from support.tiny_bundle import picture

STOPS: dict[str, NDArray[np.uint8]] = {
    "P5": picture(0),
    "P4": picture(5, 0, 2),
    "P3": picture(5, 2),
}
MIXED = [STOPS["P5"], STOPS["P3"], STOPS["P4"], picture(18, 6, 1)]

LYING, STANDING = Canvas(64, 96), Canvas(96, 64)
ON_CANVAS = [
    STOPS["P5"],
    picture(5, 2, size=(64, 80)),
    picture(5, 0, 2, size=(64, 96)),
    picture(18, 6, 1, size=(90, 64)),
]
LONG = picture(5, 2, size=(64, 100))
"""No canvas holds it."""


def loop_of(detector: Detector) -> DeviceLoop:
    """The loop of a detector that was loaded with loop='device' and has been used."""
    assert isinstance(detector._loop, DeviceLoop)
    return detector._loop


def graphs_of(detector: Detector) -> dict[tuple[int, ...], LoopGraph]:
    """By the shape of the images that they are for."""
    return {key[0]: graph for key, graph in loop_of(detector)._graphs.items()}


def stage_graphs(detector: Detector) -> list[int]:
    """What the stages of a detector have been captured in for the host's loop."""
    stages = detector._open_network()._stages.values()  # type: ignore[attr-defined]
    return [graph for stage in stages for one in stage._contexts.values() for graph in one._graphs.values()]
