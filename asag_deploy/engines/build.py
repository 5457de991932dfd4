"""Build the missing or outdated engines of a bundle, one at a time.

Each engine appears whole or not at all, and its sidecar after it.  A build that is interrupted goes on where
it stopped when it is started again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from asag_deploy._version import __version__
from asag_deploy.atomic import atomic_write
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import GraphSpec, Precision, Preprocessing
from asag_deploy.bundle.manifest_json import export_again, export_with
from asag_deploy.cuda.driver import Gpu
from asag_deploy.engines.adapter import CompileOptions, Library, check_plugin_file, open_library
from asag_deploy.engines.host_work import read_host_work
from asag_deploy.engines.parser_graph import (
    Plugin,
    computes_with_sizes,
    control_flow,
    for_parser,
    operators_of,
    require_onnx,
)
from asag_deploy.engines.shapes import MOST_DETECTIONS, Batches, check_detections, depends_on_canvas, profile
from asag_deploy.engines.sidecar import (
    Compatibility,
    Recipe,
    Sidecar,
    engine_folder,
    engine_path,
    is_current,
    sidecar_to_json,
)
from asag_deploy.engines.targets import (
    DEFAULT_CAPABILITIES,
    Target,
    check_supported,
    parse_target,
    targets,
)
from asag_deploy.engines.targets import this_gpu as find_gpu
from asag_deploy.errors import BackendError, BundleCorruptError, ConfigError, EngineError, plural
from asag_deploy.processing.canvases import Canvas, check_canvas, default_canvases, in_order

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many engines are done, and how many there are."""

COMPATIBILITIES: tuple[Compatibility, ...] = ("none", "ampere_plus", "same_compute_capability")
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
_LEVELS = range(6)
_TIMING_CACHE = "timing.cache"
_INSTEAD = "; use the backend onnxruntime-cuda on that GPU, or build on it with --format tensorrt"
_AUXILIARY_STREAMS = 0
"""What is captured must not leave the stream that it is captured from."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Settings for building engines.  Raises ConfigError if they make no sense."""

    engine_format: str = "tensorrt-rtx"
    gpus: tuple[str, ...] = ()
    """Compute capabilities; none for that of this machine's GPU, or the usual ones if it has none."""
    shared: bool = False
    """One engine for all of `gpus` instead of one for each (TensorRT-RTX alone)."""
    precision: str | None = None
    """The precision that the bundle must have; None for any."""
    batches: Batches = field(default_factory=Batches)
    canvases: tuple[Canvas, ...] = ()
    """Shapes of images that get engines of their own, beside those that take every shape."""
    usual_canvases: bool = False
    """Also those that `default_canvases` gives for the bundle's images."""
    tf32: bool = False
    optimization_level: int | None = None
    plugins: Path | None = None
    """The plugin library (TensorRT alone)."""
    compatibility: str = "none"
    version_compatible: bool = False
    force: bool = False
    """Build also what is current."""

    def __post_init__(self) -> None:
        if self.precision is not None and self.precision not in PRECISIONS:
            raise ConfigError(f"unknown precision '{self.precision}'; choose one of {', '.join(PRECISIONS)}")
        if self.compatibility not in COMPATIBILITIES:
            raise ConfigError(
                f"unknown hardware compatibility '{self.compatibility}'; "
                f"choose one of {', '.join(COMPATIBILITIES)}"
            )
        if self.optimization_level is not None and self.optimization_level not in _LEVELS:
            raise ConfigError(
                f"the optimization level is {self.optimization_level}; "
                f"choose {_LEVELS.start} to {_LEVELS.stop - 1}"
            )
        if self.engine_format == "tensorrt-rtx":
            for what, option, given in (
                ("plugins", "--plugins", self.plugins is not None),
                ("hardware compatibility", "--compatibility", self.compatibility != "none"),
                ("version compatibility", "--version-compatible", self.version_compatible),
            ):
                if given:
                    raise ConfigError(
                        f"TensorRT-RTX has no {what}; leave {option} out, or build with --format tensorrt"
                    )


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """Result of a build."""

    library: str
    """Name and version."""
    built: tuple[Path, ...]
    current: tuple[Path, ...]
    """Engines that were there already and needed no work."""
    plugins: tuple[str, ...]


def check_targets(options: BuildOptions) -> None:
    """Raise now what `build_engines` would of its library, of GPUs and of the plugins' file.

    For callers that make the bundle first, which takes minutes.
    """
    _targets(open_library(options.engine_format), options, find_gpu())
    if options.plugins is not None:
        check_plugin_file(options.plugins)


def check_canvases(options: BuildOptions, preprocessing: Preprocessing) -> None:
    """Raise ConfigError for a canvas that is of no use to pictures that are resized by this rule."""
    for canvas in options.canvases:
        check_canvas(canvas, preprocessing)


def build_engines(
    bundle: Bundle, options: BuildOptions, *, progress: Progress = lambda step, done, total: None
) -> BuildReport:
    """Build the engines of every stage graph of a bundle, for every GPU asked for.

    Raises ConfigError for options that do not fit the bundle or the library, BackendError if the library or
    the package onnx is missing, EngineError if a graph does not compile, OutputError if a file cannot be
    written (what was finished before stays, and the next build goes on from there).
    """
    _check_precision(bundle, options)
    if not bundle.manifest.graphs:
        raise BundleCorruptError(
            f"the bundle '{bundle.shown}' holds no graphs; {export_again(bundle.manifest)}"
        )
    manifest = bundle.manifest
    most = manifest.postprocessing.max_detections
    fewer = export_with(manifest, f"--max-detections {MOST_DETECTIONS}")
    check_detections(most, manifest.probing.anchor_cap, len(manifest.categories), fewer)
    canvases = _canvases(bundle, options)
    require_onnx()
    library = open_library(options.engine_format)
    gpu = find_gpu()
    wanted = _targets(library, options, gpu)
    plugins = _plugins(library, bundle, options)
    jobs = [
        _Job(bundle=bundle, graph=g, target=target, options=options, plugins=plugins, gpu=gpu, canvas=canvas)
        for target in wanted
        for canvas in (None, *canvases)
        for g in bundle.manifest.graphs
        if canvas is None or depends_on_canvas(g)
    ]
    built, current = [], []
    for i, job in enumerate(jobs):
        recipe, path = job.recipe(library), job.path(library)
        if not options.force and is_current(path, recipe):
            current.append(path)
            continue
        progress(job.title, i, len(jobs))
        _build(job, recipe, path, library)
        built.append(path)
    progress("", len(jobs), len(jobs))
    return BuildReport(
        library=library.title,
        built=tuple(built),
        current=tuple(current),
        plugins=tuple(plugin.name for plugin in plugins),
    )


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One engine to build."""

    bundle: Bundle
    graph: GraphSpec
    target: Target
    options: BuildOptions
    plugins: tuple[Plugin, ...]
    gpu: Gpu | None
    canvas: Canvas | None

    @property
    def title(self) -> str:
        canvas = "" if self.canvas is None else f" {self.canvas}"
        return f"{self.target.name}{canvas} {self.graph.name}"

    def folder(self, library: Library) -> Path:
        return engine_folder(self.bundle, library.format, self.target.name)

    def path(self, library: Library) -> Path:
        return engine_path(self.folder(library), self.graph.name, self.canvas)

    def used_plugins(self) -> tuple[Plugin, ...]:
        operators = operators_of(self.content(), self.graph.name)
        return tuple(plugin for plugin in self.plugins if plugin.operator in operators)

    def content(self) -> bytes:
        path = self.bundle.graph_path(self.graph.name)
        try:
            return path.read_bytes()
        except OSError as error:
            raise BundleCorruptError(
                f"cannot read '{path}': {(error.strerror or str(error)).lower()}"
            ) from None

    def recipe(self, library: Library) -> Recipe:
        options = self.options
        compatibility: Compatibility = next(c for c in COMPATIBILITIES if c == options.compatibility)
        tied = library.capabilities is None and compatibility == "none" and self.gpu is not None
        return Recipe(
            producer=f"asag-deploy {__version__}",
            format=library.format,
            sdk_version=library.version,
            stage=self.graph.name,
            graph_sha256=self.graph.sha256,
            precision=self.bundle.manifest.precision_of(self.graph.name),
            tf32=options.tf32,
            capabilities=self.target.capabilities,
            compatibility=compatibility,
            version_compatible=options.version_compatible,
            device=self.gpu.name if tied and self.gpu is not None else None,
            optimization_level=options.optimization_level,
            plugins=tuple(plugin.name for plugin in self.used_plugins()) if self.plugins else (),
            user_allocation=library.user_allocation,
            auxiliary_streams=_AUXILIARY_STREAMS,
            canvas=self.canvas,
            inputs=profile(self.graph, self.bundle.manifest, options.batches, self.canvas),
            outputs=self.graph.outputs,
        )


def _build(job: _Job, recipe: Recipe, path: Path, library: Library) -> None:
    content = job.content()
    if hashlib.sha256(content).hexdigest() != recipe.graph_sha256:
        raise EngineError(
            f"the graph '{job.graph.name}' of '{job.bundle.shown}' was changed since the bundle was opened; "
            "build again"
        )
    graph = for_parser(
        content, name=job.graph.name, plugins=job.plugins, turing=_spells_out_products(job.target, library)
    )
    cache = job.folder(library) / _TIMING_CACHE
    if library.timing_cache is None and cache.is_file():
        library.timing_cache = cache.read_bytes()
    engine = library.compile(
        graph,
        job.graph.name,
        recipe.inputs,
        CompileOptions(
            capabilities=recipe.capabilities,
            tf32=recipe.tf32,
            optimization_level=recipe.optimization_level,
            compatibility=recipe.compatibility,
            version_compatible=recipe.version_compatible,
            user_allocation=recipe.user_allocation,
            auxiliary_streams=recipe.auxiliary_streams,
        ),
    )
    capturable, host_memory = _host_work(graph, engine, recipe)
    here = job.gpu is not None and job.gpu.capability in recipe.capabilities
    sidecar = Sidecar(
        recipe=recipe,
        engine_sha256=hashlib.sha256(engine).hexdigest(),
        engine_bytes=len(engine),
        capturable=capturable,
        host_memory=host_memory,
        layers=library.layers(engine, version_compatible=recipe.version_compatible) if here else None,
    )
    _write(path, engine)
    _write(path.with_suffix(".json"), sidecar_to_json(sidecar).encode())
    if library.timing_cache is not None:
        _write(cache, library.timing_cache)


def _host_work(graph: bytes, engine: bytes, recipe: Recipe) -> tuple[bool, bool]:
    """Return whether an engine can be captured, and whether it may read the host's memory.

    TensorRT-RTX writes both into its engines.  Of TensorRT's it is known from the graph: it decides loops
    and branches on the host, and copies sizes to the GPU where they are not known from the start.
    """
    if recipe.format == "tensorrt-rtx":
        work = read_host_work(engine)
        return work.capturable, work.host_memory
    one_shape = all(range_.least == range_.most for range_ in recipe.inputs)
    decides = bool(control_flow(graph, recipe.stage))
    return not decides, decides or (not one_shape and computes_with_sizes(graph, recipe.stage))


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def _spells_out_products(target: Target, library: Library) -> bool:
    return library.format == "tensorrt-rtx" and target.includes_turing


def _canvases(bundle: Bundle, options: BuildOptions) -> tuple[Canvas, ...]:
    preprocessing = bundle.manifest.preprocessing
    check_canvases(options, preprocessing)
    usual = default_canvases(preprocessing) if options.usual_canvases else ()
    return in_order((*options.canvases, *usual))


def _check_precision(bundle: Bundle, options: BuildOptions) -> None:
    if options.precision is not None and options.precision != bundle.manifest.precision:
        other = f"export another bundle with `asag-export --precision {options.precision}`"
        if options.precision == "int8":
            other = "make an int8 bundle of a float32 one with `asag-quantize`"
        raise ConfigError(
            f"the graphs of '{bundle.shown}' are {bundle.manifest.precision}, and an engine computes in the "
            f"types of its graph; {other}"
        )
    quantization = bundle.manifest.parity.get("quantization")
    if isinstance(quantization, dict) and quantization.get("activations") == "uint8":
        raise ConfigError(
            f"'{bundle.shown}' was quantised with --activations uint8, which TensorRT does not take; "
            "quantise the float32 bundle again with `asag-quantize --activations int8`"
        )


def _targets(library: Library, options: BuildOptions, gpu: Gpu | None) -> tuple[Target, ...]:
    supported = library.capabilities
    asked = tuple(parse_target(text) for text in options.gpus)
    if supported is not None:
        mine = DEFAULT_CAPABILITIES if gpu is None else (gpu.capability,)
        check_supported(asked or mine, supported, library.title, instead=_INSTEAD)
        return targets(asked or mine, shared=options.shared)
    if options.shared:
        raise ConfigError("TensorRT cannot share engines between --gpu; use --compatibility ampere_plus")
    if gpu is None:
        raise BackendError(
            f"{library.title} builds engines only on the GPU they are for, and the driver finds none here; "
            "build on that machine, or with --format tensorrt-rtx"
        )
    check_supported(asked, (gpu.capability,), f"{library.title} on this machine")
    return targets((gpu.capability,), shared=False)


def _plugins(library: Library, bundle: Bundle, options: BuildOptions) -> tuple[Plugin, ...]:
    if options.plugins is None:
        return ()
    used: set[str] = set()
    for graph in bundle.manifest.graphs:
        used |= operators_of(bundle.graph_path(graph.name).read_bytes(), graph.name)
    return library.load_plugins(options.plugins, sorted(used))


def summary(report: BuildReport, bundle: Bundle, given: Path) -> Sequence[str]:
    """Summarise the report in a few lines for people; `given` is what they called the bundle."""
    shown = bundle.as_named(given)
    places = {path.parent.relative_to(bundle.path) for path in (*report.built, *report.current)}
    folders = sorted(str(shown / place) for place in places)
    if not report.built:
        lines = [f"nothing to do: all {len(report.current)} engines of '{shown}' are current"]
    else:
        current = plural(len(report.current), "was current", "were current")
        kept = f", {current}" if report.current else ""
        lines = [f"built {plural(len(report.built), 'engine')} with {report.library}{kept}"]
    if report.plugins:
        lines.append(f"plugins: {', '.join(report.plugins)}")
    return [*lines, *folders]
