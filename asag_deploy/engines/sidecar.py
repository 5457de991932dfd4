"""The JSON file beside an engine, and the check that the engine may be loaded.

Given an engine of another release, for another GPU or of another network, a library fails late and says
little, or computes something else.  `check` finds that out beforehand.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import Precision, TensorSpec
from asag_deploy.engines.shapes import InputRange, depends_on_canvas
from asag_deploy.engines.targets import number
from asag_deploy.errors import (
    ConfigError,
    EngineMissingError,
    EngineStaleError,
    EngineUnfitError,
    FieldError,
)
from asag_deploy.processing.canvases import Canvas, in_order, parse_canvas
from asag_deploy.typed_json import parse_json, read_fields

Format = Literal["tensorrt-rtx", "tensorrt"]
Compatibility = Literal["none", "ampere_plus", "same_compute_capability"]

SIDECAR_VERSION = 3


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what an engine is: equal recipes make equally good engines."""

    sidecar_version: int = SIDECAR_VERSION
    producer: str
    """Distribution and version that built it, e.g. `asag-deploy 0.1.0`."""
    format: Format
    sdk_version: str
    """Of the library, in full; an engine is loaded by the very same."""
    stage: str
    graph_sha256: str
    """Of the graph in the bundle."""
    precision: Precision
    """Of the graph: networks are strongly typed, so the engine computes in the types of its graph."""
    tf32: bool
    """Whether float32 products may be computed in TF32, with 10 bits of mantissa."""
    capabilities: tuple[str, ...]
    """The compute capabilities it is for, such as `sm86`."""
    compatibility: Compatibility
    """`none`: only those capabilities; `ampere_plus`: also every later one (TensorRT alone)."""
    version_compatible: bool
    """Whether later releases of the library within a major version load it too (TensorRT alone)."""
    device: str | None
    """The model of GPU it is tied to (TensorRT without compatibility), or None."""
    optimization_level: int | None
    """The builder's, or None for its default."""
    plugins: tuple[str, ...]
    """Plugins in it, which must be registered before it is loaded."""
    user_allocation: bool
    """Whether it takes all memory from its caller, as a stream capture requires (TensorRT-RTX alone)."""
    auxiliary_streams: int
    """Streams beside the caller's that it may use."""
    canvas: Canvas | None
    """The one shape of images that it is for, one image at a time; None if it takes all of `inputs`."""
    inputs: tuple[InputRange, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """The JSON file beside an engine."""

    recipe: Recipe
    engine_sha256: str
    engine_bytes: int
    capturable: bool
    """Whether a CUDA graph may be captured of it: nothing in it waits for a decision of the host."""
    host_memory: bool
    """Whether it may read memory of the host while it runs, which no conditional body may hold."""
    layers: dict[str, Any] | None
    """How many layers read and write which types, as the library's inspector said once it was built; None
    if it was built without the GPU that it is for, which the inspector takes."""

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise EngineUnfitError if the engine cannot take inputs of these shapes."""
        for range_ in self.recipe.inputs:
            shape = shapes.get(range_.name)
            if shape is not None and not range_.holds(shape):
                raise EngineUnfitError(
                    f"the engine of the stage '{self.recipe.stage}' takes '{range_.name}' of shapes "
                    f"{_shape(range_.least)} to {_shape(range_.most)}, got {_shape(shape)}; "
                    "build engines for larger batches with `asag-build BUNDLE --max-batch N`, "
                    "or resize the image"
                )


@dataclass(frozen=True, kw_only=True)
class Engine:
    """An engine that has been proven fit to load."""

    path: Path
    content: bytes
    """The file as it was verified: load this, not the file again."""
    sidecar: Sidecar


def engine_folder(bundle: Bundle, engine_format: Format, target: str) -> Path:
    """Return the folder of the engines of a bundle for a target such as `sm86`."""
    return bundle.path / "engines" / engine_format / target


def engine_path(folder: Path, stage: str, canvas: Canvas | None = None) -> Path:
    """Return the path of a stage's engine in a target's folder; its sidecar is the same with `.json`.

    Those of a canvas lie in a folder of their own in it, such as `800x1088`.
    """
    return (folder if canvas is None else folder / str(canvas)) / f"{stage}.engine"


def check(
    bundle: Bundle,
    stage: str,
    *,
    engine_format: Format,
    sdk_version: str,
    capability: str,
    device: str | None = None,
    canvas: Canvas | None = None,
) -> Engine:
    """Read and verify the engine of a stage for a GPU of that compute capability (`sm86`).

    With a canvas it is the one of exactly that shape, else the one that takes every shape.

    `sdk_version` is the full version of the library that is to load it, `device` the model of the GPU where
    that is known.  One built for this capability alone is preferred to one that it shares with others.

    Raises EngineMissingError if none was built for this GPU, EngineStaleError if it was built from another
    graph or by another release of the library, or is damaged, EngineUnfitError if it was built for another
    GPU.  Every message ends with the command that builds the right one.
    """
    again = build_again(bundle, engine_format, capability, canvas)
    path = _find(bundle, stage, engine_format, capability, again, canvas)
    sidecar = read_sidecar(path.with_suffix(".json"), again)
    _check_recipe(sidecar.recipe, path, bundle, stage, again, canvas)
    _check_library(sidecar.recipe, path, engine_format, sdk_version, again)
    _check_gpu(sidecar.recipe, path, capability, device, again)
    return Engine(path=path, content=_read_engine(path, sidecar, again), sidecar=sidecar)


def canvas_engines(
    bundle: Bundle,
    *,
    engine_format: Format,
    sdk_version: str,
    capability: str,
    device: str | None = None,
) -> dict[Canvas, list[Engine]]:
    """Read and verify the engines of every canvas that has some, the smallest canvas first.

    They are of all stages but `normalize`, whose engine takes every shape.  Empty if there are none.
    Raises what `check` raises, for each of them.
    """
    return {
        canvas: [
            check(
                bundle,
                graph.name,
                engine_format=engine_format,
                sdk_version=sdk_version,
                capability=capability,
                device=device,
                canvas=canvas,
            )
            for graph in bundle.manifest.graphs
            if depends_on_canvas(graph)
        ]
        for canvas in built_canvases(bundle, engine_format, capability)
    }


def built_canvases(bundle: Bundle, engine_format: Format, capability: str) -> tuple[Canvas, ...]:
    """List the canvases that have engines for a GPU, the smallest first, without verifying any."""
    for folder in _candidates(bundle, engine_format, capability):
        if any(folder.glob("*.engine")):  # those of other GPUs are of no use beside engines for this one
            return _canvases_in(folder)
    return ()


def built_engines(bundle: Bundle, engine_format: Format) -> dict[str, tuple[Canvas, ...]]:
    """Return the targets (`sm86`) that engines lie there for, each with its canvases; nothing is verified."""
    folders = _folders(engine_folder(bundle, engine_format, "any").parent)
    return {folder.name: _canvases_in(folder) for folder in folders if any(folder.glob("*.engine"))}


def _canvases_in(folder: Path) -> tuple[Canvas, ...]:
    """List the canvases with a folder in a target's folder, the smallest first."""
    found = set()
    for inner in _folders(folder):
        with contextlib.suppress(ConfigError):
            found.add(parse_canvas(inner.name))
    return in_order(found)


def build_again(bundle: Bundle, engine_format: Format, capability: str, canvas: Canvas | None = None) -> str:
    """Say in half a sentence how to build the engines of a bundle for a GPU."""
    gpu = f" --gpu {capability}" if engine_format == "tensorrt-rtx" else ""
    shape, else_ = "", ""
    if canvas is not None:
        shape, else_ = f" --canvas {canvas}", f", or delete the folder '{canvas}' to do without"
    return f"build it with `asag-build '{bundle.shown}' --format {engine_format}{gpu}{shape}`{else_}"


def read_sidecar(path: Path, again: str) -> Sidecar:
    """Read the file beside an engine.

    Raises EngineMissingError if there is none, EngineStaleError if it is malformed or of another release;
    the messages end with `again`.
    """
    try:
        data = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise EngineMissingError(f"there is no '{path}'; {again}") from None
    except OSError as error:
        raise EngineStaleError(
            f"cannot read '{path}' ({(error.strerror or str(error)).lower()}); {again}"
        ) from None
    except FieldError as error:
        raise EngineStaleError(f"in '{path}', {error}; {again}") from None
    except ValueError:
        raise EngineStaleError(f"'{path}' is not JSON; {again}") from None
    _check_version(data, path, again)
    try:
        sidecar = cast(Sidecar, read_fields(Sidecar, data))
        for each in sidecar.recipe.inputs:
            if not len(each.least) == len(each.usual) == len(each.most):
                raise FieldError(f"the shapes of the input '{each.name}' have different numbers of sides")
    except FieldError as error:
        raise EngineStaleError(f"in '{path}', {error}; {again}") from None
    return sidecar


def sidecar_to_json(sidecar: Sidecar) -> str:
    """Write a sidecar as the text of its file."""
    return json.dumps(dataclasses.asdict(sidecar), indent=2, allow_nan=False) + "\n"


def is_current(path: Path, recipe: Recipe) -> bool:
    """Return whether the engine at `path` is whole and was built by exactly this recipe."""
    try:
        sidecar = read_sidecar(path.with_suffix(".json"), "")
        if sidecar.recipe != recipe:
            return False
        _read_engine(path, sidecar, "")
    except (EngineMissingError, EngineStaleError):
        return False
    return True


def _check_version(data: object, path: Path, again: str) -> None:
    """Check the version before anything else, since other versions have other fields."""
    recipe = data.get("recipe") if isinstance(data, dict) else None
    version = recipe.get("sidecar_version") if isinstance(recipe, dict) else None
    if type(version) is int and version != SIDECAR_VERSION:
        raise EngineStaleError(
            f"'{path}' was written by another release of asag-deploy (its version is {version}, this release "
            f"reads {SIDECAR_VERSION}); {again}"
        )


def _find(
    bundle: Bundle, stage: str, engine_format: Format, capability: str, again: str, canvas: Canvas | None
) -> Path:
    candidates = _candidates(bundle, engine_format, capability)
    for folder in candidates:
        path = engine_path(folder, stage, canvas)
        if path.is_file():
            return path
    parent = engine_folder(bundle, engine_format, capability).parent
    built = ", ".join(other.name for other in _folders(parent)) or "none"
    where = "" if canvas is None else f" on the canvas {canvas}"
    raise EngineMissingError(
        f"the bundle '{bundle.shown}' has no {engine_format} engine of the stage '{stage}' for {capability}"
        f"{where} (there are: {built}); {again}"
    )


def _candidates(bundle: Bundle, engine_format: Format, capability: str) -> list[Path]:
    """List the folders where engines for a GPU may be, the most fitting first."""
    own = engine_folder(bundle, engine_format, capability)
    others = [folder for folder in _folders(own.parent) if folder != own]
    shared = [other for other in others if capability in other.name.split("+")]
    if engine_format == "tensorrt":  # one for all GPUs from Ampere on lies in the folder of its builder's
        shared += others
    return [own, *shared]


def _folders(parent: Path) -> list[Path]:
    if not parent.is_dir():
        return []
    return sorted(
        folder for folder in parent.iterdir() if folder.is_dir() and not folder.name.startswith(".")
    )


def _check_recipe(
    recipe: Recipe, path: Path, bundle: Bundle, stage: str, again: str, canvas: Canvas | None
) -> None:
    if recipe.stage != stage:
        raise EngineStaleError(f"'{path}' is an engine of the stage '{recipe.stage}', not '{stage}'; {again}")
    if recipe.graph_sha256 != bundle.manifest.graph(stage).sha256:
        raise EngineStaleError(f"'{path}' was built from another graph than the bundle's '{stage}'; {again}")
    if recipe.canvas != canvas:
        of, asked = recipe.canvas or "every shape", canvas or "every shape"
        raise EngineStaleError(f"'{path}' is an engine for {of}, not for {asked}; {again}")


def _check_library(recipe: Recipe, path: Path, engine_format: Format, sdk_version: str, again: str) -> None:
    if recipe.format != engine_format:
        raise EngineStaleError(f"'{path}' is an engine of {recipe.format}, not of {engine_format}; {again}")
    if recipe.sdk_version == sdk_version:
        return
    same_major = recipe.sdk_version.split(".")[0] == sdk_version.split(".")[0]
    if recipe.version_compatible and same_major and _numbers(recipe.sdk_version) <= _numbers(sdk_version):
        return
    raise EngineStaleError(
        f"'{path}' was built with {engine_format} {recipe.sdk_version}, but {sdk_version} is installed; "
        f"{again}"
    )


def _check_gpu(recipe: Recipe, path: Path, capability: str, device: str | None, again: str) -> None:
    later = recipe.compatibility == "ampere_plus" and number(capability) >= 80
    if capability not in recipe.capabilities and not later:
        built_for = ", ".join(recipe.capabilities)
        raise EngineUnfitError(
            f"'{path}' was built for {built_for}, but the GPU here is {capability}; {again}"
        )
    if recipe.device is not None and device is not None and recipe.device != device:
        raise EngineUnfitError(
            f"'{path}' was built on and for the GPU '{recipe.device}', but this one is '{device}'; {again}"
        )


def _read_engine(path: Path, sidecar: Sidecar, again: str) -> bytes:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise EngineMissingError(f"there is no '{path}'; {again}") from None
    except OSError as error:
        raise EngineStaleError(
            f"cannot read '{path}' ({(error.strerror or str(error)).lower()}); {again}"
        ) from None
    if hashlib.sha256(content).hexdigest() != sidecar.engine_sha256:
        raise EngineStaleError(
            f"'{path}' is truncated or was altered, its SHA-256 is not the one in its sidecar; {again}"
        )
    return content


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _shape(sizes: tuple[int, ...]) -> str:
    return "x".join(str(size) for size in sizes)
