"""Deserialises the engines of a bundle, and lets go of them in the end."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from asag_deploy.backends.compiled_cache import CompiledCache, GrowingEntry, cache_folder
from asag_deploy.backends.declared import differs
from asag_deploy.backends.tensorrt.device_loop import DeviceLoop
from asag_deploy.backends.tensorrt.stage import EngineStage, declared
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.cuda import Device
from asag_deploy.engines.adapter import Library
from asag_deploy.engines.sidecar import Engine, build_again
from asag_deploy.errors import BackendError, EngineStaleError, GpuMemoryError
from asag_deploy.processing.canvases import Canvas

# TensorRT-RTX compiles kernels when it runs.  Those for the very shapes are the fastest, and worth waiting
# for where most of the work is and few shapes come; what follows comes in too many shapes for that, unless
# the engine is of one shape.
_SPECIALISED = ("normalize", "backbone")
_DRIVER_TOO_OLD = "driver version is insufficient"


class EngineLoader:
    """The engines of one bundle on one device."""

    def __init__(
        self,
        library: Library,
        device: Device,
        bundle: Bundle,
        on_canvas: Mapping[Canvas, Sequence[Engine]],
    ) -> None:
        """Load engines with `library` onto `device`.

        on_canvas: engines for `load_canvases`, the smallest canvas first.
        """
        self.device = device
        self._library = library
        self._bundle = bundle
        self._to_come = dict(on_canvas)
        self.loops: list[DeviceLoop] = []
        """Loops over the stages, which are closed before these are."""
        self._stages: list[EngineStage] = []
        self._compiled: list[GrowingEntry] = []

    def load(self, engine: Engine) -> EngineStage:
        """Load an engine that has been checked, as a stage.

        Raises GpuMemoryError if there is no room for it, EngineStaleError if the library refuses it,
        BackendError if the library itself cannot run here.
        """
        recipe = engine.sidecar.recipe
        loaded = self._library.load(engine.content, version_compatible=recipe.version_compatible)
        if loaded is None:
            raise self._refused(engine)
        self._check(engine, loaded)
        stage = EngineStage(
            dataclasses.replace(engine, content=b""),  # the library has its own copy now
            loaded,
            self.device,
            make_context=self._context_maker(loaded, engine),
            library=self._library,
        )
        self._stages.append(stage)
        return stage

    def load_canvases(self) -> dict[Canvas, dict[str, EngineStage]]:
        """Load the stages of every canvas that there is room for, the smallest first.

        If that is not all, a RuntimeWarning says so.  Raises what else `load` raises, and keeps none then.
        """
        found: dict[Canvas, dict[str, EngineStage]] = {}
        start = len(self._stages)
        for canvas, engines in self._to_come.items():
            complete = len(self._stages)
            try:
                found[canvas] = {engine.sidecar.recipe.stage: self.load(engine) for engine in engines}
            except GpuMemoryError as error:
                self._drop(complete)
                left = ", ".join(str(other) for other in self._to_come if other not in found)
                message = (
                    f"pictures on the canvas {left} go through the engines that take every shape: {error}"
                )
                warnings.warn(message, RuntimeWarning, stacklevel=2)
                break
            except BaseException:
                self._drop(start)
                raise
        self._to_come.clear()
        return found

    def keep_compiled(self, *, now: bool = False) -> None:
        """Write the kernels to the cache that TensorRT-RTX has compiled for new shapes."""
        for entry in self._compiled:
            entry.keep(now=now)

    def close(self) -> None:
        """Let go of everything once the GPU is done."""
        with contextlib.suppress(BackendError), self.device.lock:
            self.device.synchronize()
        self.keep_compiled(now=True)
        self._compiled.clear()
        for loop in self.loops:
            loop.close()
        self.loops.clear()
        for stage in self._stages:
            stage.close()
        self._stages.clear()
        self.device.close()

    def _drop(self, start: int) -> None:
        """Let go of the stages from that number on, which nobody has used."""
        for stage in self._stages[start:]:
            stage.close()
        del self._stages[start:]

    def _check(self, engine: Engine, loaded: Any) -> None:
        """Raise EngineStaleError unless an engine is of the graph that the manifest describes."""
        recipe = engine.sidecar.recipe
        sides = declared(loaded)
        problem = differs(self._bundle, recipe.stage, *sides, may_be_fixed=recipe.canvas is not None)
        if problem is not None:
            again = build_again(
                self._bundle, self._library.format, self.device.cuda.capability, recipe.canvas
            )
            raise EngineStaleError(
                f"'{engine.path}' is not the graph '{recipe.stage}' of the bundle: {problem}; {again}"
            )

    def _refused(self, engine: Engine) -> BackendError | EngineStaleError:
        """Say why the library has not loaded an engine."""
        title, messages = self._library.title, self._library.messages
        if messages.no_room is not None:
            return GpuMemoryError(
                f"there is no room on the GPU for '{engine.path}' ({messages.no_room}); end other programs "
                "on the GPU, or use one with more memory"
            )
        if _DRIVER_TOO_OLD in messages.first_error:
            return BackendError(
                f"the NVIDIA driver is too old for {title}; install a newer driver, or an older release of "
                "the library and build the engines again"
            )
        capability, canvas = self.device.cuda.capability, engine.sidecar.recipe.canvas
        again = build_again(self._bundle, self._library.format, capability, canvas)
        return EngineStaleError(f"{title} could not load '{engine.path}' ({messages.first_error}); {again}")

    def _context_maker(self, loaded: Any, engine: Engine) -> Callable[[], Any]:
        by_user = self._library.module.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._library.format == "tensorrt":
            return lambda: loaded.create_execution_context(by_user)
        config, compiled = self._rtx_config(loaded, engine)
        config.set_execution_context_allocation_strategy(by_user)

        def make() -> Any:
            compiled.used()  # a context is for new shapes, and those take kernels of their own
            return loaded.create_execution_context(config)

        return make

    def _rtx_config(self, loaded: Any, engine: Engine) -> tuple[Any, GrowingEntry]:
        """Say how TensorRT-RTX compiles kernels at run time, and give it what it compiled before."""
        module = self._library.module
        config = loaded.create_runtime_config()
        config.cuda_graph_strategy = module.CudaGraphStrategy.DISABLED  # graphs are captured here
        kernels = module.DynamicShapesKernelSpecializationStrategy
        built = engine.sidecar.recipe
        specialised = built.stage in _SPECIALISED or built.canvas is not None
        config.dynamic_shapes_kernel_specialization_strategy = kernels.EAGER if specialised else kernels.NONE
        recipe = f"{self._library.title} {self.device.cuda.name} {self.device.cuda.capability}"
        cache, key = CompiledCache(cache_folder() / "tensorrt-rtx", recipe), engine.sidecar.engine_sha256
        compiled, before = config.create_runtime_cache(), cache.read(key)
        known = before is not None and compiled.deserialize(before)
        config.set_runtime_cache(compiled)

        def serialize() -> bytes | None:
            with self.device.lock:  # nothing is compiled meanwhile
                content = compiled.serialize()
            return None if content is None else bytes(content)

        kept_bytes = len(before) if known and before is not None else 0
        entry = GrowingEntry(cache, key, serialize, kept_bytes=kept_bytes)
        self._compiled.append(entry)
        return config, entry
