"""The sizes an engine can take: an optimisation profile for every stage graph, from the bundle's manifest.

TensorRT wants to know the least, the most frequent and the greatest shape of every dynamic input.  All follow
from what the manifest says of image sizes, patches and queries; only the batch is the user's choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from asag_deploy.bundle.manifest import GraphSpec, Manifest, ProbeLevel, TensorSpec
from asag_deploy.bundle.manifest_json import export_again
from asag_deploy.errors import BundleCorruptError, ConfigError
from asag_deploy.loop.stopping import FAST_MAX_PATCHES
from asag_deploy.processing.canvases import Canvas, round_up_to

_FEATURE_LEVELS = (2, 3, 4, 5, 6)
_USUAL_ASPECT = 4 / 3
_EVERY_SHAPE = ("normalize",)
"""Stages that do so little that an engine of one shape would be no faster."""

MOST_SLOTS = 32
"""Patches an image and level that an engine of one shape has room for; images that need more are rare."""
PATCH_BUCKET = 16
"""What that room is a multiple of."""
MOST_DETECTIONS = 3840
"""Of an image: the longest order that TensorRT finds."""


@dataclass(frozen=True, kw_only=True)
class InputRange:
    """The shapes that an engine takes for one input."""

    name: str
    dtype: str
    least: tuple[int, ...]
    usual: tuple[int, ...]
    """What the engine is optimised for."""
    most: tuple[int, ...]

    def holds(self, shape: tuple[int, ...]) -> bool:
        """Return whether an input of this shape can be given to the engine."""
        return len(shape) == len(self.least) and all(
            low <= size <= high for low, size, high in zip(self.least, shape, self.most, strict=True)
        )


def check_detections(most: int, anchor_cap: int, classes: int, remedy: str) -> None:
    """Raise ConfigError if an engine could not give the detections that a network is exported for.

    most: what it is exported for; it finds no more than one for each of `anchor_cap` queries and each class.
    remedy: what to do, the end of the sentence.
    """
    given = min(most, anchor_cap * classes)
    if given > MOST_DETECTIONS:
        raise ConfigError(
            f"an engine of TensorRT gives {MOST_DETECTIONS} detections of an image at most, and this network "
            f"gives {given}; {remedy}"
        )


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Images in a batch.  Raises ConfigError if the numbers make no sense."""

    usual: int = 1
    """The batch that engines are optimised for."""
    most: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.usual <= self.most:
            raise ConfigError(
                f"engines cannot be optimised for batches of {self.usual} and take at most {self.most}; "
                "expected 1 <= usual <= most"
            )


@dataclass(frozen=True, kw_only=True)
class _Range:
    least: int
    usual: int
    most: int


def profile(
    graph: GraphSpec, manifest: Manifest, batches: Batches, canvas: Canvas | None = None
) -> tuple[InputRange, ...]:
    """Give the range of shapes that an engine of this graph must take, for each of its inputs in order.

    On a canvas each range is a single shape: one image of that size, `fixed_slots` patches for every level,
    and as many queries as there can be.

    Raises BundleCorruptError if the graph has a dynamic size of unknown meaning.
    """
    sizes = _sizes(graph, manifest, batches) if canvas is None else _fixed_sizes(graph, manifest, canvas)
    return tuple(_input_range(spec, sizes, graph, manifest) for spec in graph.inputs)


def fixed_slots(level: ProbeLevel) -> int:
    """Return how many patches an image may have at a level in an engine of one shape."""
    return min(round_up_to(min(level.capacity, MOST_SLOTS), PATCH_BUCKET), level.capacity)


def depends_on_canvas(graph: GraphSpec) -> bool:
    """Return whether a canvas has its own engine of this graph."""
    return graph.name not in _EVERY_SHAPE


def _input_range(
    spec: TensorSpec, sizes: Mapping[str, _Range], graph: GraphSpec, manifest: Manifest
) -> InputRange:
    ranges = []
    for size in spec.shape:
        if isinstance(size, str) and size not in sizes:
            raise BundleCorruptError(
                f"the input '{spec.name}' of the graph '{graph.name}' has a dynamic size '{size}' that this "
                f"release does not know; {export_again(manifest)}"
            )
        ranges.append(sizes[size] if isinstance(size, str) else _Range(least=size, usual=size, most=size))
    return InputRange(
        name=spec.name,
        dtype=spec.dtype,
        least=tuple(size.least for size in ranges),
        usual=tuple(size.usual for size in ranges),
        most=tuple(size.most for size in ranges),
    )


def _sizes(graph: GraphSpec, manifest: Manifest, batches: Batches) -> dict[str, _Range]:
    """Give every dynamic size by the name it has in the manifest."""
    probing = manifest.probing
    height, width = _image_sides(manifest)
    sizes = {
        "batch": _Range(least=1, usual=batches.usual, most=batches.most),
        "height": height,
        "width": width,
        "queries": _Range(least=1, usual=max(1, probing.anchor_cap // 2), most=probing.anchor_cap),
    }
    for level in _FEATURE_LEVELS:
        sizes[f"height_p{level}"] = _cells(height, 2**level)
        sizes[f"width_p{level}"] = _cells(width, 2**level)
    for probed in probing.levels:
        name, anchors = probed.level.lower(), probed.anchors_per_patch
        patches = _Range(least=1, usual=min(FAST_MAX_PATCHES, probed.capacity), most=probed.capacity)
        # A level that was not probed reaches the decoder as one patch of zeros.
        sizes[f"anchors_{name}"] = _Range(
            least=anchors, usual=anchors * patches.usual, most=anchors * patches.most
        )
        if graph.name == f"probe_{name}":
            sizes["patches"] = patches
            sizes["height_feature"] = _cells(height, probed.stride)
            sizes["width_feature"] = _cells(width, probed.stride)
    return sizes


def _fixed_sizes(graph: GraphSpec, manifest: Manifest, canvas: Canvas) -> dict[str, _Range]:
    """Give the same sizes for one canvas, each a single value."""
    sizes = {
        "batch": 1,
        "height": canvas.height,
        "width": canvas.width,
        "queries": manifest.probing.anchor_cap,
    }
    for level in _FEATURE_LEVELS:
        sizes[f"height_p{level}"] = -(-canvas.height // 2**level)
        sizes[f"width_p{level}"] = -(-canvas.width // 2**level)
    for probed in manifest.probing.levels:
        name, slots = probed.level.lower(), fixed_slots(probed)
        sizes[f"anchors_{name}"] = probed.anchors_per_patch * slots
        if graph.name == f"probe_{name}":
            sizes["patches"] = slots
            sizes["height_feature"] = -(-canvas.height // probed.stride)
            sizes["width_feature"] = -(-canvas.width // probed.stride)
    return {name: _Range(least=size, usual=size, most=size) for name, size in sizes.items()}


def _image_sides(manifest: Manifest) -> tuple[_Range, _Range]:
    """Give the heights and widths of the network's input.

    Either may be the longer side, and the shorter side of a very long image is tiny.  The usual picture is in
    landscape format, four to three.
    """
    preprocessing = manifest.preprocessing
    divisor = preprocessing.size_divisor
    most = round_up_to(preprocessing.longer_side, divisor)
    usual_height = round_up_to(preprocessing.shorter_side, divisor)
    usual_width = round_up_to(
        min(round(preprocessing.shorter_side * _USUAL_ASPECT), preprocessing.longer_side), divisor
    )
    least = min(divisor, usual_height)
    return (
        _Range(least=least, usual=usual_height, most=most),
        _Range(least=least, usual=usual_width, most=most),
    )


def _cells(side: _Range, stride: int) -> _Range:
    return _Range(
        least=-(-side.least // stride), usual=-(-side.usual // stride), most=-(-side.most // stride)
    )
