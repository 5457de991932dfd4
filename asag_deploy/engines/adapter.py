"""TensorRT-RTX, TensorRT 10 and TensorRT 11 as one: the few calls that building an engine takes.

The three have one Python interface but for this:

=====================  =========================  ==========================  =============================
what                   TensorRT-RTX 1             TensorRT 11                 TensorRT 10
=====================  =========================  ==========================  =============================
strongly typed         always                     always                      if asked for
compute capabilities   any, without a GPU         the GPU's of this machine   the GPU's of this machine
hardware compatibility no                         yes                         yes, one kind of it in 10.0
plugins, timing cache  no                         yes                         yes
user allocation        yes                        no                          no
=====================  =========================  ==========================  =============================

`tests/deploy/engines` holds that every name and argument used here exists in the libraries themselves.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asag_deploy.engines.inspector import Layers, layers_of
from asag_deploy.engines.parser_graph import Plugin
from asag_deploy.engines.shapes import InputRange
from asag_deploy.engines.sidecar import Compatibility, Format
from asag_deploy.errors import BackendError, ConfigError, EngineError

MODULES: dict[Format, str] = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
FORMATS: tuple[Format, ...] = ("tensorrt-rtx", "tensorrt")

REGISTER_PLUGINS = "asag_register_plugins"
"""The C function of the plugin library; for a null pointer it finds the registry itself, and returns 0."""

_NO_ROOM = re.compile(r"out ?of ?memory|could not be allocated|bad_alloc", re.IGNORECASE)
_CAPABILITY = re.compile(r"SM(\d+)")


@dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """Settings for building one engine."""

    capabilities: tuple[str, ...]
    tf32: bool
    optimization_level: int | None
    compatibility: Compatibility
    version_compatible: bool
    user_allocation: bool
    auxiliary_streams: int


class _Messages:
    """Messages of the library, which wants one logger for as long as the process lives."""

    def __init__(self, module: Any) -> None:
        class Logger(module.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                module.ILogger.__init__(self)
                self.errors: list[str] = []

            def log(self, severity: Any, msg: str) -> None:
                if severity in (module.ILogger.Severity.ERROR, module.ILogger.Severity.INTERNAL_ERROR):
                    self.errors.append(msg)

        self.logger = Logger()

    def clear(self) -> None:
        self.logger.errors.clear()

    @property
    def first_error(self) -> str:
        """The first error, or, if there is another, the first that is not about the missing GPU."""
        errors: list[str] = self.logger.errors
        telling = [error for error in errors if "cudaError" not in error]
        return next(iter(telling or errors), "it gave no reason")

    @property
    def no_room(self) -> str | None:
        """The first error that says that there is no room on the GPU; None if none does."""
        return next((error for error in self.logger.errors if _NO_ROOM.search(error)), None)


_LOGGERS: dict[Any, _Messages] = {}
"""By module."""


class Library:
    """One of the libraries, imported."""

    def __init__(self, module: Any, engine_format: Format) -> None:
        self._module = module
        if module not in _LOGGERS:
            _LOGGERS[module] = _Messages(module)
        self._messages = _LOGGERS[module]
        self._runtime: Any = None
        """Lives as long as this, and so as whatever was loaded."""
        self.format: Format = engine_format
        self.version: str = module.__version__
        self.timing_cache: bytes | None = None
        """What was learnt from timing kernels, to save time in the next build (TensorRT alone)."""

    @property
    def module(self) -> Any:
        """The library itself, for those who run what it builds."""
        return self._module

    @property
    def messages(self) -> _Messages:
        """Its logger, which a process has one of, and what it said last."""
        return self._messages

    @property
    def title(self) -> str:
        """Its name and version, for messages."""
        return f"{'TensorRT-RTX' if self.format == 'tensorrt-rtx' else 'TensorRT'} {self.version}"

    @property
    def capabilities(self) -> tuple[str, ...] | None:
        """The compute capabilities it builds for, or None: only that of the GPU it builds on."""
        if not hasattr(self._module, "ComputeCapability"):
            return None
        found = (_CAPABILITY.fullmatch(name) for name in self._module.ComputeCapability.__members__)
        return tuple(f"sm{match[1]}" for match in found if match is not None)

    @property
    def user_allocation(self) -> bool:
        """Whether engines can be told to take all memory from their caller."""
        return "REQUIRE_USER_ALLOCATION" in self._module.BuilderFlag.__members__

    def load_plugins(self, path: Path, operators: Sequence[str]) -> tuple[Plugin, ...]:
        """Register the plugins of a library; returns those that stand for one of `operators`.

        Raises ConfigError if this is TensorRT-RTX, which takes none, or if the library has none of use,
        BackendError if it cannot be loaded or registers nothing.
        """
        if self.format == "tensorrt-rtx":
            raise ConfigError(
                "TensorRT-RTX takes no plugins; leave --plugins out, or build with --format tensorrt"
            )
        _register(path)
        registry = self._module.get_plugin_registry()
        plugins = tuple(Plugin(operator=operator) for operator in operators)
        found = [p for p in plugins if registry.get_creator(p.name, p.version, "") is not None]
        if not found:
            raise ConfigError(
                f"'{path}' has no plugin for any of {', '.join(operators)}; "
                "build it from the same release of asag-deploy"
            )
        return tuple(found)

    def compile(
        self, graph: bytes, stage: str, inputs: Sequence[InputRange], options: CompileOptions
    ) -> bytes:
        """Compile a graph to an engine.

        Raises EngineError, naming the stage and the node, if the library refuses it.
        """
        self._messages.clear()
        builder = self._module.Builder(self._messages.logger)
        network = builder.create_network(self._network_flags())
        self._parse(network, graph, stage)
        config = builder.create_builder_config()
        self._configure(config, builder, inputs, options, stage)
        cache = self._use_timing_cache(config)
        serialized = builder.build_serialized_network(network, config)
        if serialized is None:
            raise EngineError(
                f"{self.title} could not compile the stage '{stage}' for {', '.join(options.capabilities)}: "
                f"{_one_line(self._messages.first_error)}"
            )
        if cache is not None:
            self.timing_cache = bytes(cache.serialize())
        return bytes(serialized)

    def load(self, engine: bytes, *, version_compatible: bool) -> Any:
        """Deserialise an engine; returns None if the library refuses it, and `messages` has what it said."""
        self._messages.clear()
        if self._runtime is None:
            self._runtime = self._module.Runtime(self._messages.logger)
        if version_compatible:  # it brings the lean runtime of the release that built it, as code to be run
            self._runtime.engine_host_code_allowed = True
        return self._runtime.deserialize_cuda_engine(engine)

    def layers(self, engine: bytes, *, version_compatible: bool) -> Layers | None:
        """Count the layers of an engine for the GPU of this machine; returns None if it cannot be asked."""
        loaded = self.load(engine, version_compatible=version_compatible)
        return None if loaded is None else layers_of(self._module, loaded)

    def _network_flags(self) -> int:
        major = int(self.version.split(".")[0])
        if self.format == "tensorrt-rtx" or major >= 11:
            return 0
        return 1 << int(self._module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)

    def _parse(self, network: Any, graph: bytes, stage: str) -> None:
        parser = self._module.OnnxParser(network, self._messages.logger)
        if parser.parse(graph):
            return
        where, reason = "", self._messages.first_error
        if parser.num_errors:
            error = parser.get_error(0)
            where = f" at the node '{error.node_name()}' ({error.node_operator()})"
            reason = error.desc()
        raise EngineError(f"{self.title} could not read the stage '{stage}'{where}: {_one_line(reason)}")

    def _configure(
        self, config: Any, builder: Any, inputs: Sequence[InputRange], options: CompileOptions, stage: str
    ) -> None:
        module = self._module
        shapes = builder.create_optimization_profile()
        for range_ in inputs:
            shapes.set_shape(range_.name, range_.least, range_.usual, range_.most)
        if config.add_optimization_profile(shapes) < 0:
            raise EngineError(
                f"{self.title} refused the shapes for the stage '{stage}': "
                f"{_one_line(self._messages.first_error)}"
            )
        config.profiling_verbosity = module.ProfilingVerbosity.DETAILED  # for the inspector
        config.max_aux_streams = options.auxiliary_streams
        if options.user_allocation:
            config.set_flag(module.BuilderFlag.REQUIRE_USER_ALLOCATION)
        if not options.tf32:
            config.clear_flag(module.BuilderFlag.TF32)
        if options.optimization_level is not None:
            config.builder_optimization_level = options.optimization_level
        if options.version_compatible:
            config.set_flag(module.BuilderFlag.VERSION_COMPATIBLE)
        if options.compatibility != "none":
            config.hardware_compatibility_level = self._compatibility(options.compatibility)
        if self.capabilities is not None:
            config.num_compute_capabilities = len(options.capabilities)
            for i, capability in enumerate(options.capabilities):
                if not config.set_compute_capability(
                    getattr(module.ComputeCapability, capability.upper()), i
                ):
                    raise EngineError(
                        f"{self.title} refused to build for {capability}: "
                        f"{_one_line(self._messages.first_error)}"
                    )

    def _compatibility(self, wanted: Compatibility) -> Any:
        levels = self._module.HardwareCompatibilityLevel.__members__
        if wanted.upper() not in levels:
            raise ConfigError(
                f"{self.title} knows no hardware compatibility '{wanted}'; use a newer release of it"
            )
        return levels[wanted.upper()]

    def _use_timing_cache(self, config: Any) -> Any:
        if self.format == "tensorrt-rtx":
            return None
        cache = config.create_timing_cache(self.timing_cache or b"")
        config.set_timing_cache(cache, ignore_mismatch=True)
        return cache


def open_library(engine_format: str) -> Library:
    """Import the library of a format.

    Raises ConfigError for an unknown format, BackendError if the library is not installed or cannot start.
    """
    if engine_format not in MODULES:
        raise ConfigError(f"unknown engine format '{engine_format}'; choose one of {', '.join(FORMATS)}")
    known: Format = "tensorrt-rtx" if engine_format == "tensorrt-rtx" else "tensorrt"
    name = MODULES[known]
    try:
        return Library(importlib.import_module(name), known)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] != name:
            raise BackendError(_broken(name, error)) from error
        raise BackendError(f"{name} is not installed; install it with {_install(known)}") from None
    except (ImportError, OSError, RuntimeError) as error:  # a library beside it is missing or does not fit
        raise BackendError(_broken(name, error)) from error


def _broken(name: str, error: Exception) -> str:
    return f"{name} is installed but cannot be loaded ({_one_line(str(error))}); install it again"


def _install(engine_format: Format) -> str:
    if engine_format == "tensorrt-rtx":
        return "`pip install 'asag-deploy[engines]'`"
    return "`pip install 'asag-deploy[tensorrt]' tensorrt`, on the machine with the GPU"


def check_plugin_file(path: Path) -> None:
    """Raise ConfigError if there is no file of plugins at `path`."""
    if not path.is_file():
        raise ConfigError(f"there is no plugin library '{path}'; build it as plugins/README.md says")


def _register(path: Path) -> None:
    check_plugin_file(path)
    try:
        # Its symbols must be found by the library that deserialises engines.
        library = ctypes.CDLL(os.fspath(path.resolve()), mode=ctypes.RTLD_GLOBAL)
        status = getattr(library, REGISTER_PLUGINS)(None)
    except OSError as error:
        raise BackendError(f"cannot load the plugin library '{path}': {_one_line(str(error))}") from error
    except AttributeError:
        raise ConfigError(
            f"'{path}' is no plugin library of asag-deploy, it has no function {REGISTER_PLUGINS}; "
            "build it as plugins/README.md says"
        ) from None
    if status != 0:
        raise BackendError(
            f"the plugin library '{path}' could not register its plugins ({_message(library, status)}); "
            "build it against the headers of the TensorRT that is installed"
        )


def _message(library: ctypes.CDLL, status: int) -> str:
    """Ask the plugin library what a status means."""
    library.asag_message.restype = ctypes.c_char_p
    return _one_line(library.asag_message(status).decode(errors="replace"))


def _one_line(text: str) -> str:
    """Strip an error of the library of line breaks and of places in the library's own sources."""
    joined = " ".join(text.split())
    return re.sub(r"\s*In \w+ at \S+?:\d+", "", joined)[:400].rstrip(" .")
