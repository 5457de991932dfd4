"""A bundle: the directory that holds an exported network, `manifest.json` and one file per stage graph.

Opening one verifies everything it says about itself, so that whatever runs later can take it at its word.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import re
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from asag_deploy.atomic import atomic_directory, check_replaceable
from asag_deploy.bundle.manifest import GraphSpec, Level, Manifest, Precision, TensorSpec
from asag_deploy.bundle.manifest_json import export_again, manifest_from_json, manifest_to_json
from asag_deploy.bundle.model_card import MODEL_CARD, model_card
from asag_deploy.errors import BundleCorruptError, BundleNotFoundError, plural
from asag_deploy.fetching.locate import local_bundle

MANIFEST = "manifest.json"

_STRIDES: dict[Level, int] = {"P5": 32, "P4": 16, "P3": 8}
_LARGEST_SIDE = 32767
"""OpenCV makes no larger image."""
_LEAST_DEVIATION = 1e-6
_MOST = 2**31 - 1
_EXTERNAL_WEIGHTS = b"\n\x08location"
"""How ONNX begins to say in which other file a tensor lies; such a file has no checksum."""
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_PROBING_ORDER: tuple[Level, ...] = ("P4", "P3")


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A verified bundle; made by `Bundle.open`."""

    path: Path
    """The bundle's directory, absolute, so that another working directory does not lose it."""
    manifest: Manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Read a bundle and verify it: the manifest, and the SHA-256 of every graph.

        path: its folder, or an address that it is fetched from once and kept, hf:// or http(s)://.

        Raises BundleNotFoundError if there is none at `path`, BundleVersionError if a newer release wrote
        it, BundleCorruptError if anything in it is missing, truncated, altered or malformed, DownloadError if
        it cannot be fetched.
        """
        directory = local_bundle(path)
        manifest = manifest_from_json(_read_manifest(directory), str(directory / MANIFEST))
        problem = _contradiction(manifest)
        if problem is not None:
            raise BundleCorruptError(f"in '{directory / MANIFEST}', {problem}; {export_again(manifest)}")
        _verify_graphs(directory, manifest)
        return cls(path=directory.absolute(), manifest=manifest)

    @property
    def fingerprint(self) -> str:
        """A text that two bundles have in common only if everything in them is the same."""
        return hashlib.sha256(manifest_to_json(self.manifest).encode()).hexdigest()

    @property
    def shown(self) -> Path:
        """How messages name it: from the working directory, where it lies in it."""
        try:
            return self.path.relative_to(Path.cwd())
        except (ValueError, OSError):  # elsewhere, or a working directory that has gone
            return self.path

    def as_named(self, given: Path) -> Path:
        """Return the bundle's directory as the user named it; its own path where that was an address."""
        return given if given.is_dir() else self.path

    def graph_path(self, name: str) -> Path:
        """Return the file of the stage graph called `name` (KeyError if the bundle has none)."""
        return self.path / self.manifest.graph(name).file


def stage_names(levels: Sequence[Level]) -> tuple[str, ...]:
    """Return the stage graphs of a bundle that can probe `levels`, in the order they run."""
    return ("normalize", "backbone", *(f"probe_{level.lower()}" for level in levels), "decoder")


PARTS = (*(f"{name}.onnx" for name in stage_names(_PROBING_ORDER)), "engines/*", MODEL_CARD)
"""What there is in a bundle's directory besides the manifest, as patterns of paths."""


class BundleWriter:
    """A bundle in the making; made by `write_bundle`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        """Where the bundle is built; it moves to its own name in the end."""
        self.finished = False
        self._graphs: dict[str, GraphSpec] = {}

    def add_graph(
        self,
        name: str,
        onnx: bytes,
        *,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        precision: Precision | None = None,
    ) -> None:
        """Write the stage graph `name`, a serialised ONNX model, with its interface.

        precision: what it computes in, where that is not what the bundle's manifest says.

        One of that name that was added before is replaced.
        """
        file = f"{name}.onnx"
        (self.directory / file).write_bytes(onnx)
        spec = GraphSpec(
            name=name,
            file=file,
            sha256=hashlib.sha256(onnx).hexdigest(),
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            precision=precision,
        )
        self._graphs[name] = spec

    def finish(self, manifest: Manifest) -> Bundle:
        """Write `manifest.json`, `manifest` with the graphs that were added, and the model card.

        Opens the bundle where it is, and returns it.
        May be called again, to add the report of the parity gate that ran on what the first call returned.
        Raises BundleCorruptError if what was added makes no bundle.
        """
        complete = dataclasses.replace(manifest, graphs=tuple(self._graphs.values()))
        (self.directory / MANIFEST).write_text(manifest_to_json(complete), encoding="utf-8")
        bundle = Bundle.open(self.directory)
        (self.directory / MODEL_CARD).write_text(model_card(complete), encoding="utf-8")
        self.finished = True
        return bundle


def check_bundle_place(output_dir: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Raise OutputError where `write_bundle` would not write, before what takes minutes."""
    check_replaceable(output_dir, overwrite=overwrite, marker=MANIFEST, parts=PARTS)


@contextmanager
def write_bundle(output_dir: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[BundleWriter]:
    """Give a writer for a new bundle, which appears at `output_dir` only when the block ends without error.

    With `overwrite`, a bundle that is already there is replaced, its model card too, unless it holds other
    files.
    Raises OutputError where it may not be, or if the files cannot be written.
    """
    with atomic_directory(output_dir, overwrite=overwrite, marker=MANIFEST, parts=PARTS) as directory:
        writer = BundleWriter(directory)
        yield writer
        if not writer.finished:
            raise RuntimeError("BundleWriter.finish was not called")


def _read_manifest(directory: Path) -> bytes:
    try:
        exists = directory.exists()
    except (OSError, ValueError) as error:  # a name that no folder can have
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise BundleNotFoundError(f"'{directory}' can be no bundle ({reason}); check the path") from None
    if not exists:
        raise BundleNotFoundError(
            f"there is no bundle '{directory}'; check the path, or make one with "
            f"`asag-export --checkpoint FILE --output-dir '{directory}'`"
        )
    if not directory.is_dir():
        raise BundleNotFoundError(f"'{directory}' is a file, but a bundle is a directory; pass the directory")
    try:
        _check_regular(directory / MANIFEST)
        return (directory / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise BundleNotFoundError(
            f"'{directory}' is not a bundle, it holds no {MANIFEST}; check the path, or {export_again()}"
        ) from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise BundleCorruptError(f"cannot read '{directory / MANIFEST}': {reason}") from None


def _contradiction(manifest: Manifest) -> str | None:
    """Return what in the manifest cannot be, as a half sentence; None if all is well."""
    levels = tuple(level.level for level in manifest.probing.levels)
    if levels != _PROBING_ORDER[: len(levels)]:
        return f"`probing.levels` are {list(levels)}, expected none, P4, or P4 and P3"
    names = [graph.name for graph in manifest.graphs]
    for name in stage_names(levels):
        if names.count(name) != 1:
            return f"`graphs` has {names.count(name)} entries for the graph '{name}', expected 1"
    for i, graph in enumerate(manifest.graphs):
        if graph.name not in stage_names(levels):
            return (
                f"`graphs[{i}].name` is {graph.name!r}, but the stages are {', '.join(stage_names(levels))}"
            )
        file = PurePosixPath(graph.file)
        if file.is_absolute() or ".." in file.parts or not file.parts or not graph.file.isprintable():
            return f"`graphs[{i}].file` is {graph.file!r}, expected a file inside the bundle"
    for field, value, least, most in _sizes(manifest):
        if value < least:
            return f"`{field}` is {value}, expected at least {least}"
        if value > most:
            return f"`{field}` is {value}, expected at most {most}"
    return _class_contradiction(manifest)


def _sizes(manifest: Manifest) -> Iterator[tuple[str, float, float, float]]:
    """Yield field, value, least and greatest value of the numbers that everything else builds on."""
    preprocessing, probing, after = manifest.preprocessing, manifest.probing, manifest.postprocessing
    yield "preprocessing.shorter_side", preprocessing.shorter_side, 1, _LARGEST_SIDE
    yield "preprocessing.longer_side", preprocessing.longer_side, preprocessing.shorter_side, _LARGEST_SIDE
    yield "preprocessing.size_divisor", preprocessing.size_divisor, 1, _LARGEST_SIDE
    for i, deviation in enumerate(preprocessing.std):
        yield f"preprocessing.std[{i}]", deviation, _LEAST_DEVIATION, math.inf
    yield "probing.patch_size", probing.patch_size, 1, _LARGEST_SIDE
    yield "probing.max_candidates", probing.max_candidates, 1, _MOST
    yield "probing.patch_nms_iou", probing.patch_nms_iou, 0, 1
    yield "probing.anchor_cap", probing.anchor_cap, 1, _MOST
    yield "probing.anchor_floor", probing.anchor_floor, 0, probing.anchor_cap
    if probing.max_patches is not None:
        yield "probing.max_patches", probing.max_patches, 1, _MOST
    for i, level in enumerate(probing.levels):
        stride = _STRIDES[level.level]
        yield f"probing.levels[{i}].stride", level.stride, stride, stride
        yield f"probing.levels[{i}].capacity", level.capacity, 1, _MOST
        yield f"probing.levels[{i}].anchors_per_patch", level.anchors_per_patch, 1, _MOST
    yield "postprocessing.max_detections", after.max_detections, 1, _MOST
    if after.nms_iou is not None:
        yield "postprocessing.nms_iou", after.nms_iou, 0, 1
    yield "opset", manifest.opset, 1, _MOST


def _class_contradiction(manifest: Manifest) -> str | None:
    ids: dict[int, int] = {}
    for i, category in enumerate(manifest.categories):
        if category.id in ids:
            return f"`categories[{i}].id` is {category.id}, as that of `categories[{ids[category.id]}]` is"
        ids[category.id] = i
        if not -_MOST <= category.id <= _MOST:
            return f"`categories[{i}].id` is {category.id}, expected at most {_MOST}"
        if not category.name.strip() or _UNPRINTABLE.search(category.name):
            return f"`categories[{i}].name` is {category.name!r}, expected a name that can be printed"
    logits = next((t for t in manifest.graph("decoder").outputs if t.name == "logits"), None)
    if logits is None or not logits.shape:
        return "the graph 'decoder' has no output 'logits'"
    classes = logits.shape[-1]
    if isinstance(classes, int) and classes != len(manifest.categories):
        named = plural(len(manifest.categories), "class")
        return f"`categories` names {named}, but the graphs predict {classes}"
    return None


def _verify_graphs(directory: Path, manifest: Manifest) -> None:
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
        files = [directory / graph.file for graph in manifest.graphs]
        digests = list(pool.map(lambda file: _digest(file, manifest), files))
        # Searching takes as long as hashing, and in most bundles there is no file that weights could lie in.
        if _others(directory, manifest):
            list(pool.map(lambda file: _check_weights(file, manifest), files))
    for graph, digest in zip(manifest.graphs, digests, strict=True):
        if digest != graph.sha256:
            raise BundleCorruptError(
                f"'{directory / graph.file}' is truncated or was altered, its SHA-256 is not the one in "
                f"{MANIFEST}; copy the bundle again, or {export_again(manifest)}"
            )


def _digest(file: Path, manifest: Manifest) -> str:
    """Return the SHA-256 of a graph's file; raise BundleCorruptError if it cannot be read."""
    again = f"copy the bundle again, or {export_again(manifest)}"
    try:
        _check_regular(file)
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise BundleCorruptError(f"cannot read the graph '{file}' ({reason}); {again}") from None


def _others(directory: Path, manifest: Manifest) -> bool:
    """Return whether a bundle holds more than manifest, model card, graphs and engines."""
    known = {
        MANIFEST,
        MODEL_CARD,
        "engines",
        *(PurePosixPath(graph.file).parts[0] for graph in manifest.graphs),
    }
    return any(file.name not in known for file in directory.iterdir())


def _check_weights(file: Path, manifest: Manifest) -> None:
    """Raise BundleCorruptError if a graph has weights in another file, which nothing vouches for."""
    if _EXTERNAL_WEIGHTS in file.read_bytes():
        raise BundleCorruptError(
            f"'{file}' has weights in another file, for which {MANIFEST} does not vouch; copy the bundle "
            f"again, or {export_again(manifest)}"
        )


def _check_regular(file: Path) -> None:
    """Raise OSError for a FIFO or a device, which may never end; links are followed."""
    if not stat.S_ISREG(file.stat().st_mode) and not file.is_dir():  # of which reading says so itself
        raise OSError("it is no regular file")
