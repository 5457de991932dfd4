"""`Network`: what every backend provides, and the PyTorch network too; `Backend`: what opens one.

A network gives the probing loop its stages.  What it can do beyond that has defaults: pre- and
post-processing and the probing loop happen on the host, unless a network on a GPU does them there.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Protocol

from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import GraphSpec, Manifest
from asag_deploy.bundle.manifest_json import export_again
from asag_deploy.errors import BackendError, ConfigError, Problem
from asag_deploy.kernels.cpu import CpuKernels
from asag_deploy.loop.loop import LOOPS, DeviceOrHost, HostLoop, Loop, LoopChoice
from asag_deploy.loop.patch_nms import PatchFinder
from asag_deploy.loop.stages import Array, Stages
from asag_deploy.processing.canvases import Canvas
from asag_deploy.processing.on_host import OnHost, Processing


class Network(Stages):
    """The stages of one network on one backend, and what else it can do.

    Safe to call from several threads at once.
    """

    takes_device_arrays: bool = False
    """Whether `upload` takes other libraries' GPU arrays, and outputs are such arrays."""
    normalizes_on_host: bool = False
    """Whether OpenCV does what the stage `normalize` would, for arrays lie on the host anyway."""
    cpu_kernels: CpuKernels | None = None
    """The operators compiled for the CPU, if the network uses them."""
    canvases: Sequence[Canvas] = ()
    """Shapes that batches are padded to; what none of them holds is padded to multiples of the divisor."""

    def patch_finder(self) -> PatchFinder:
        """Return what `select` finds patches with on the host."""
        return super().patch_finder() if self.cpu_kernels is None else self.cpu_kernels.patch_nms

    def keep(self, array: Array) -> None:
        """Refer to an uploaded array until all that was begun with it is done."""

    def close(self) -> None:
        """Let go of what the network holds, once it has done its work; closing twice does no harm."""

    def processing(self, manifest: Manifest) -> Processing:
        """Return what comes before and after the network: on its own device if it can, else on the host."""
        on_device = self.device_processing(manifest)
        if on_device is not None:
            return on_device
        return OnHost(
            self,
            manifest,
            canvases=self.canvases,
            takes_device_arrays=self.takes_device_arrays,
            normalizes=self.normalizes_on_host,
        )

    def device_processing(self, manifest: Manifest) -> Processing | None:
        """Return pre- and post-processing on the network's own device; None if it has none."""
        return None

    def loop(self, choice: LoopChoice = "auto", deadline_ms: float | None = None) -> Loop:
        """Open the loop that was asked for; `auto` is `device` where that can be, else `host`.

        Raises ConfigError for an unknown choice or for `device` with a deadline, which only the host can
        keep, or with a network that has none; BackendError if something that it takes is missing here.
        """
        if choice not in LOOPS:
            raise ConfigError(f"unknown loop '{choice}'; expected 'auto', 'host' or 'device'")
        if choice == "host":
            return HostLoop()
        if choice == "device":
            if deadline_ms is not None:
                raise ConfigError("loop 'device' cannot keep a deadline; use loop 'host', or no deadline_ms")
            return self.open_device_loop()
        if deadline_ms is not None or self.why_no_device_loop() is not None:
            return HostLoop()
        return DeviceOrHost(self.open_device_loop())

    def why_no_device_loop(self) -> str | None:
        """Return what keeps the probing loop from the network's device; None if nothing is known to."""
        return (
            "loop 'device' needs a backend that runs on a GPU with TensorRT; load the detector with "
            "backend='tensorrt-rtx', or with loop='host'"
        )

    def open_device_loop(self) -> Loop:
        """Open the probing loop on the network's device; all who ask get the same one.

        Raises ConfigError for a network that has none, BackendError if what it takes is missing here.
        """
        raise ConfigError(self.why_no_device_loop() or "the network has no loop of its own")


class Backend(Protocol):
    """A library, on one kind of device, that runs graphs."""

    @property
    def name(self) -> str:
        """What users ask for it by."""
        ...

    @property
    def distributions(self) -> tuple[str, ...]:
        """The distributions that hold its library; any one of them is enough."""
        ...

    @property
    def cuts_graphs(self) -> bool:
        """Whether it cuts graphs at the operators that are compiled for the CPU, where there are any."""
        ...

    def problem(self) -> Problem | None:
        """Return what keeps this machine from running it; None if nothing does."""
        ...

    def open(self, bundle: Bundle, *, threads: int | None, requests: int = 1) -> Network:
        """Load the bundle's graphs, to run on `threads` CPU threads (None: the library's choice).

        requests: how many calls at once the threads are to be divided among; more calls do no harm.

        Raises BackendError if they cannot be loaded.
        """
        ...


def check_shapes(
    graph: GraphSpec, inputs: Mapping[str, tuple[int, ...]], outputs: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise BackendError if a graph has made arrays of other shapes than its manifest says.

    inputs, outputs: shapes by name; sizes of one name are equal in all of them.
    """
    sizes: dict[str, int] = {}
    for spec in graph.inputs:
        for said, size in zip(spec.shape, inputs.get(spec.name, ()), strict=False):
            if isinstance(said, str):
                sizes.setdefault(said, size)
    for spec in graph.outputs:
        shape = outputs[spec.name]
        expected = [
            sizes.setdefault(said, size) if isinstance(said, str) else said
            for said, size in zip(spec.shape, shape, strict=False)
        ]
        if len(shape) != len(spec.shape) or list(shape) != expected:
            raise BackendError(
                f"the graph '{graph.name}' gave '{spec.name}' of shape {shape}, which is not the "
                f"({', '.join(map(str, spec.shape))}) that its bundle promises for these images; "
                f"{export_again()}"
            )


def takes_float32_images(manifest: Manifest) -> bool:
    """Tell whether a bundle's backbone takes images in float32, as they are normalised on the host.

    Graphs that are only timed may come without one.
    """
    inputs = (spec for graph in manifest.graphs if graph.name == "backbone" for spec in graph.inputs)
    return any(spec.name == "image" and spec.dtype == "float32" for spec in inputs)


def check_inputs(graph: str, wanted: Iterable[str], given: Container[str]) -> None:
    """Raise BackendError if `given` lacks one of the inputs that a graph declares."""
    for name in wanted:
        if name not in given:
            raise BackendError(
                f"the graph '{graph}' asks for an input '{name}' that this release does not give; "
                "export the bundle again with `asag-export` of the same release"
            )
