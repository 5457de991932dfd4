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
from asag_deploy.errors import CaptureError, ConfigError
from asag_deploy.loop.probing import Probed, StopRule, detect
from asag_deploy.loop.stages import Array, Network

LoopChoice = Literal["auto", "host", "device"]
LOOPS: tuple[str, ...] = get_args(LoopChoice)


class Begun(NamedTuple):
    """A batch that has been given to a network."""

    outputs: Mapping[str, Array]
    """The decoder's, for whatever is to follow on the network's device, such as post-processing."""
    finish: Callable[[], Probed]
    """Waits for the device and gives what `detect` would; to be called once.

    Its `outputs` are these very ones, or others if the batch had to be detected again.
    """


class Loop(ABC):
    """`asag_deploy.loop.probing.detect`, or what returns the same."""

    @abstractmethod
    def __call__(
        self, network: Network, probing: Probing, rule: StopRule, image: Array, image_size: NDArray[np.int64]
    ) -> Probed:
        """Run backbone, adaptive probing and decoder on a batch."""

    def begin(
        self, network: Network, probing: Probing, rule: StopRule, image: Array, image_size: NDArray[np.int64]
    ) -> Begun:
        """As calling it, but without waiting for the device where that can be; here all is done at once."""
        probed = self(network, probing, rule, image, image_size)
        return Begun(probed.outputs, lambda: probed)


class HostLoop(Loop):
    """`detect` itself."""

    def __call__(
        self, network: Network, probing: Probing, rule: StopRule, image: Array, image_size: NDArray[np.int64]
    ) -> Probed:
        """Run backbone, adaptive probing and decoder on a batch."""
        return detect(network, probing, rule, image, image_size)


def open_loop(network: Network, choice: LoopChoice, deadline_ms: float | None = None) -> Loop:
    """The loop that was asked for; `auto` is `device` where that can be, else `host`.

    Raises ConfigError for an unknown choice or for `device` with a deadline, which only the host can keep,
    or with a backend that has none; BackendError if something that it takes is missing here.
    """
    if choice not in LOOPS:
        raise ConfigError(f"unknown loop '{choice}'; expected 'auto', 'host' or 'device'")
    if choice == "host":
        return HostLoop()
    if choice == "device":
        if deadline_ms is not None:
            raise ConfigError("loop 'device' cannot keep a deadline; use loop 'host', or no deadline_ms")
        return network.open_device_loop()
    if deadline_ms is not None or network.why_no_device_loop() is not None:
        return HostLoop()
    return _DeviceOrHost(network.open_device_loop())


class _DeviceOrHost(Loop):
    """The loop on the device; that of the host, with a RuntimeWarning, once no graph could be captured."""

    def __init__(self, loop: Loop) -> None:
        self._loop: Loop = loop
        self._lock = threading.Lock()

    def __call__(
        self, network: Network, probing: Probing, rule: StopRule, image: Array, image_size: NDArray[np.int64]
    ) -> Probed:
        """Run backbone, adaptive probing and decoder on a batch."""
        return self.begin(network, probing, rule, image, image_size).finish()

    def begin(
        self, network: Network, probing: Probing, rule: StopRule, image: Array, image_size: NDArray[np.int64]
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
        """Said once, also if it happens to several threads."""
        with self._lock:
            if self._loop is not loop:
                return
            self._loop = HostLoop()
        message = f"the probing loop runs on the host from now on: {reason}"
        warnings.warn(message, RuntimeWarning, stacklevel=5)
