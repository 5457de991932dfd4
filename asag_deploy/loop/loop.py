"""Who takes the stop decisions of the probing loop: the host, or with TensorRT the GPU itself."""

from __future__ import annotations

import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from asag_deploy.bundle.manifest import Probing
from asag_deploy.errors import CaptureError
from asag_deploy.loop.probing import Probed, detect
from asag_deploy.loop.stages import Array, Stages
from asag_deploy.loop.stopping import StopRule

LoopChoice = Literal["auto", "host", "device"]
LOOPS: tuple[str, ...] = get_args(LoopChoice)


class Begun(NamedTuple):
    """A batch that has been given to a network."""

    outputs: Mapping[str, Array]
    """The decoder's outputs, for what follows on the network's device, such as post-processing."""
    finish: Callable[[], Probed]
    """Waits for the device and gives what `detect` would; to be called once.

    The outputs in what it returns are these, or others if the batch had to be detected again.
    """


class Loop(ABC):
    """`asag_deploy.loop.probing.detect`, or what returns the same."""

    def __call__(
        self, network: Stages, probing: Probing, rule: StopRule, image: Array, image_size: NDArray[np.int64]
    ) -> Probed:
        """Run backbone, adaptive probing and decoder on a batch."""
        return self.begin(network, probing, rule, image, image_size).finish()

    @abstractmethod
    def begin(
        self, network: Stages, probing: Probing, rule: StopRule, image: Array, image_size: NDArray[np.int64]
    ) -> Begun:
        """Begin what calling it does, without waiting for the device where that can be."""


class HostLoop(Loop):
    """`detect` itself."""

    def begin(
        self, network: Stages, probing: Probing, rule: StopRule, image: Array, image_size: NDArray[np.int64]
    ) -> Begun:
        """Do all of it at once."""
        probed = detect(network, probing, rule, image, image_size)
        return Begun(probed.outputs, lambda: probed)


class DeviceOrHost(Loop):
    """The loop on the device; that of the host, with a RuntimeWarning, once no graph could be captured."""

    def __init__(self, loop: Loop) -> None:
        self._loop: Loop = loop
        self._lock = threading.Lock()

    def begin(
        self, network: Stages, probing: Probing, rule: StopRule, image: Array, image_size: NDArray[np.int64]
    ) -> Begun:
        """Begin on the device, where a graph is captured, or go on with the host's loop."""
        loop = self._loop
        try:
            return loop.begin(network, probing, rule, image, image_size)
        except CaptureError as error:
            self._leave(loop, str(error))
        # Out here, where the error is gone, and with it the memory that it refers to.
        return self._loop.begin(network, probing, rule, image, image_size)

    def _leave(self, loop: Loop, reason: str) -> None:
        """Go to the host's loop, and warn once, also if it happens to several threads."""
        with self._lock:
            if self._loop is not loop:
                return
            self._loop = HostLoop()
        message = f"the probing loop runs on the host from now on: {reason}"
        warnings.warn(message, RuntimeWarning, stacklevel=5)
