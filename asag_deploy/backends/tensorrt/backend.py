"""TensorRT-RTX and TensorRT: the engines of a bundle, on the GPU of this machine.

Everything that can be wrong with an engine is found before any is loaded.  Features never leave the GPU; the
host reads what the probing loop asks for, four integers per image and level, through pinned memory.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asag_deploy.backends.network import Network
from asag_deploy.backends.tensorrt.device_loop import DeviceLoop, why_no_device_loop
from asag_deploy.backends.tensorrt.engine_loader import EngineLoader
from asag_deploy.backends.tensorrt.loop_graph import find_patches
from asag_deploy.backends.tensorrt.stage import DeviceStage, EngineStage
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import Manifest, ProbeLevel, Probing
from asag_deploy.cuda import Device, DeviceArray, is_device_array, open_cuda, why_no_cuda
from asag_deploy.engines.adapter import MODULES, Library, open_library
from asag_deploy.engines.inspector import Layers
from asag_deploy.engines.sidecar import Engine, Format, canvas_engines, check
from asag_deploy.engines.targets import number
from asag_deploy.errors import BackendError, Problem
from asag_deploy.kernels import KernelLibrary, open_cuda_library
from asag_deploy.loop.stages import LevelOutputs
from asag_deploy.processing.canvases import Canvas
from asag_deploy.processing.on_gpu import OnGpu
from asag_deploy.processing.on_host import Processing

PLUGINS_VARIABLE = "ASAG_PLUGINS_LIBRARY"
"""Environment variable with the path of the library of plugins, for engines that were built with plugins."""

_PLUGIN_PREFIX = "Asag"
_INSTALL: dict[Format, str] = {
    "tensorrt-rtx": "pip install 'asag-deploy[tensorrt-rtx]'",
    "tensorrt": "pip install 'asag-deploy[tensorrt]' tensorrt",
}

_DISTRIBUTIONS: dict[Format, tuple[str, ...]] = {
    "tensorrt-rtx": ("tensorrt-rtx", "tensorrt_rtx"),
    "tensorrt": ("tensorrt", "tensorrt-cu12"),
}

_Release = Callable[[], None]
_LoadCanvases = Callable[[], Mapping[Canvas, Mapping[str, EngineStage]]]


@dataclass(frozen=True, kw_only=True)
class TensorRt:
    """One of the two libraries as an `asag_deploy.backends.Backend`."""

    name: Format

    cuts_graphs = False

    @property
    def distributions(self) -> tuple[str, ...]:
        """The distributions that hold the library."""
        return _DISTRIBUTIONS[self.name]

    def problem(self) -> Problem | None:
        """Return what is missing of the library, cuda-python, a driver and a GPU; None if all is there."""
        module = MODULES[self.name]
        if importlib.util.find_spec(module) is None:
            return Problem(f"{module} is not installed", f"install it with `{_INSTALL[self.name]}`")
        return why_no_cuda()

    def open(self, bundle: Bundle, *, threads: int | None, requests: int = 1) -> EngineNetwork:
        """Load the engines of every stage for this GPU; `threads` and `requests` are for CPU backends.

        Raises BackendError if the library, a driver or a GPU is missing or the library has nothing for the
        GPU, EngineMissingError, EngineStaleError or EngineUnfitError if there is no engine for the GPU, from
        this bundle and of the library's release, each with the command that builds it; so also for engines
        of canvases, which are loaded once the loop on the device is opened.  BackendError also if the
        compiled kernels that ASAG_KERNELS_LIBRARY names cannot be used with this GPU, GpuMemoryError if there
        is no room on it.
        """
        library = open_library(self.name)
        cuda = open_cuda()
        known = library.capabilities
        if known is not None and cuda.capability not in known:
            raise BackendError(
                f"{library.title} has nothing for this GPU, {cuda.name} ({cuda.capability}): it knows "
                f"{', '.join(sorted(known, key=number))}; use backend='tensorrt' or 'onnxruntime-cuda' on it"
            )
        here: dict[str, Any] = {
            "engine_format": self.name,
            "sdk_version": library.version,
            "capability": cuda.capability,
            "device": cuda.name,
        }
        engines = [check(bundle, graph.name, **here) for graph in bundle.manifest.graphs]
        on_canvas = canvas_engines(bundle, **here)
        _register_plugins(library, [*engines, *itertools.chain.from_iterable(on_canvas.values())])
        kernels = open_cuda_library(cuda.capability)
        loader = EngineLoader(library, Device(cuda), bundle, on_canvas)
        try:
            stages = [loader.load(engine) for engine in engines]
        except BaseException:
            loader.close()
            raise
        return EngineNetwork(
            stages,
            loader.device,
            loader.close,
            kernels=kernels,
            loops=loader.loops,
            keep_compiled=loader.keep_compiled,
            canvases=tuple(on_canvas),
            load_canvases=loader.load_canvases,
        )


class EngineNetwork(Network):
    """The engines of one bundle on one GPU.

    Released with the last reference to it, or by `close`.
    """

    # Every combination of input shapes takes an execution context, so there should be few.
    patch_bucket = 16
    query_bucket = 32
    takes_device_arrays = True

    def __init__(
        self,
        stages: Sequence[DeviceStage],
        device: Device,
        release: _Release,
        *,
        kernels: KernelLibrary | None = None,
        loops: list[DeviceLoop] | None = None,
        keep_compiled: Callable[[], None] = lambda: None,
        canvases: Sequence[Canvas] = (),
        load_canvases: _LoadCanvases = dict,
    ) -> None:
        self._stages = {stage.name: stage for stage in stages}
        self.device = device
        self.kernels = kernels
        """The kernels that prepare images and finish detections on the GPU, if they were found."""
        self._loops = [] if loops is None else loops
        self.keep_compiled = keep_compiled
        """Writes what was compiled for new shapes to the cache, unless that was done just now; for whoever
        ends a detection without `download`."""
        self.canvases = canvases
        self._load_canvases = load_canvases
        """Loads the engines of canvases; called when the loop on the device, their only user, is opened."""
        self._release = weakref.finalize(self, release)

    def stage(self, name: str) -> DeviceStage:
        """Return the stage called `name` (KeyError if there is none)."""
        return self._stages[name]

    def close(self) -> None:
        """Let go of engines and memory once the GPU is done; closing twice does no harm."""
        self._release()

    def device_processing(self, manifest: Manifest) -> Processing | None:
        """Return pre- and post-processing with the kernels; None if they were not found."""
        if self.kernels is None:
            return None
        return OnGpu(self.device, self.kernels, manifest, self.canvases)

    def why_no_device_loop(self) -> str | None:
        """Return what keeps the probing loop from being one graph on the GPU; None if nothing is known to."""
        return why_no_device_loop(self.device.cuda, self.kernels)

    def open_device_loop(self) -> DeviceLoop:
        """Open the probing loop as one graph that decides on the GPU; all who ask get the same one.

        The engines of canvases are loaded with it, for as many as there is room for, with a RuntimeWarning if
        those are not all.  Raises BackendError with the reason if the loop cannot be here, EngineStaleError
        if the library refuses an engine.
        """
        problem = self.why_no_device_loop()
        if problem is not None or self.kernels is None:
            raise BackendError(f"the loop cannot run on the device: {problem}")
        with self.device.lock:
            if not self._loops:
                common = (self._stages, self.device, self.kernels, self._load_canvases())
                self._loops.append(DeviceLoop(*common, keep_compiled=self.keep_compiled))
            return self._loops[0]

    def layers(self) -> dict[str, Layers | None]:
        """Return what the engine of each stage was built of, as the library's inspector says."""
        return {name: stage.layers() for name, stage in self._stages.items()}

    def upload(self, array: NDArray[Any] | Any) -> DeviceArray:
        """Copy a NumPy array to the GPU, or take another library's GPU array where it lies.

        Raises ImageError for a GPU array that is not contiguous.
        """
        return self.device.adopt(array) if is_device_array(array) else self.device.upload(array)

    def keep(self, array: DeviceArray) -> None:
        """Refer to an array, such as one of another library, until all that was begun with it is done."""
        self.device.keep(array)

    def download(self, array: DeviceArray) -> NDArray[Any]:
        """Copy an array to the host, once it has been computed."""
        downloaded = self.device.download(array)
        self.keep_compiled()
        return downloaded

    def select(
        self, probing: Probing, level: ProbeLevel, before: LevelOutputs, image_size: DeviceArray
    ) -> tuple[DeviceArray, DeviceArray]:
        """Run patch NMS with the compiled kernel, which writes to the counts; without it, on the host."""
        if self.kernels is None:
            return super().select(probing, level, before, image_size)
        with self.device.lock:
            before = before._replace(counts=self.device.writable(before.counts))
            shape = (before.counts.shape[0], level.capacity, 2)
            origins = self.device.empty(shape, np.dtype(np.int64))
            find_patches(self.kernels, probing, level, before, image_size, origins, self.device.stream)
        return origins, before.counts


def _register_plugins(library: Library, engines: Sequence[Engine]) -> None:
    """Register the plugins that engines need.  Raises BackendError if it is not known where they are."""
    needed = sorted({plugin for engine in engines for plugin in engine.sidecar.recipe.plugins})
    if not needed:
        return
    path = os.environ.get(PLUGINS_VARIABLE)
    if not path:
        raise BackendError(
            f"the engines were built with the plugins {', '.join(needed)}; set {PLUGINS_VARIABLE} to the "
            "library they were built with, libasag_plugins.so"
        )
    found = library.load_plugins(Path(path), [name.removeprefix(_PLUGIN_PREFIX) for name in needed])
    missing = sorted(set(needed) - {plugin.name for plugin in found})
    if missing:
        raise BackendError(f"'{path}' has no plugin {missing[0]}, which the engines need; build it again")
