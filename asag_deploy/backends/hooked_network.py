"""Networks around another one: to watch its stages, or to do something at each of them.

A wrapper keeps what the wrapped network can do beyond its stages, so that what is watched is what runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from numpy.typing import NDArray

from asag_deploy.backends.network import Network
from asag_deploy.bundle.manifest import Manifest, ProbeLevel, Probing
from asag_deploy.errors import ConfigError
from asag_deploy.loop.loop import Loop
from asag_deploy.loop.stages import Array, LevelOutputs, Stage
from asag_deploy.processing.on_host import Processing

Before = Callable[[str, Mapping[str, Array]], object]
"""Called with a stage's name and inputs, before it runs."""
After = Callable[[str, Mapping[str, Array], Mapping[str, Array]], object]
"""Called with a stage's name, inputs and outputs, once it has run (on a GPU: once it has been begun)."""


class WrappedNetwork(Network):
    """Another network, with everything it can do; to be derived from."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self.patch_bucket = network.patch_bucket
        self.query_bucket = network.query_bucket
        self.takes_device_arrays = network.takes_device_arrays
        self.normalizes_on_host = network.normalizes_on_host
        self.canvases = network.canvases

    def stage(self, name: str) -> Stage:
        """Return the wrapped network's stage."""
        return self._network.stage(name)

    def upload(self, array: NDArray[Any]) -> Array:
        """Bring a host array to the wrapped network's device."""
        return self._network.upload(array)

    def download(self, array: Array) -> NDArray[Any]:
        """Bring the wrapped network's array to the host."""
        return self._network.download(array)

    def shape(self, array: Array) -> tuple[int, ...]:
        """Return the shape of the wrapped network's array."""
        return self._network.shape(array)

    def select(
        self, probing: Probing, level: ProbeLevel, before: LevelOutputs, image_size: Array
    ) -> tuple[Array, Array]:
        """Find the patches as the wrapped network does."""
        return self._network.select(probing, level, before, image_size)

    def keep(self, array: Array) -> None:
        """Have the wrapped network keep an array."""
        self._network.keep(array)

    def close(self) -> None:
        """Close the wrapped network."""
        self._network.close()

    def device_processing(self, manifest: Manifest) -> Processing | None:
        """Return the wrapped network's own; if it has none, the host's runs over the wrapper."""
        return self._network.device_processing(manifest)

    def why_no_device_loop(self) -> str | None:
        """Return what keeps the wrapped network's loop from its device."""
        return self._network.why_no_device_loop()

    def open_device_loop(self) -> Loop:
        """Open the wrapped network's own, which runs its stages without asking the wrapper for them."""
        return self._network.open_device_loop()


class HookedNetwork(WrappedNetwork):
    """A network with functions that are called before and after each of its stages.

    On the device's loop they would be passed over, so its loop is the host's.
    """

    def __init__(self, network: Network, *, before: Before | None = None, after: After | None = None) -> None:
        super().__init__(network)
        self._before, self._after = before, after

    def stage(self, name: str) -> Stage:
        """Return the wrapped network's stage, with the two functions around it."""
        run = self._network.stage(name)

        def hooked(inputs: Mapping[str, Array]) -> dict[str, Array]:
            if self._before is not None:
                self._before(name, inputs)
            outputs = run(inputs)
            if self._after is not None:
                self._after(name, inputs, outputs)
            return outputs

        return hooked

    def why_no_device_loop(self) -> str | None:
        """Say that the hooks do not see a loop on the device."""
        return "the stages are watched one by one, which the loop on the device passes over; use loop 'host'"

    def open_device_loop(self) -> Loop:
        """Raise ConfigError: no loop on the device calls the hooks."""
        raise ConfigError(f"loop 'device' cannot be used here: {self.why_no_device_loop()}")
