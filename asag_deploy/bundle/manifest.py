"""What a bundle says about itself: `manifest.json` as typed, validated values.

Everything the runtime needs to know beyond the graphs themselves is here as data (design: a bundle is
self-describing), so that one runtime serves every variant.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

SCHEMA_VERSION = 3

Precision = Literal["fp32", "fp16", "int8"]
"""What graphs compute in; `int8` ones in float32 but for backbone and neck, which are quantised."""
Mode = Literal["exact", "fast"]
Level = Literal["P5", "P4", "P3"]

FIRST_LEVEL: Level = "P5"
"""The level that is always predicted: four patches of P5 and the one of P6 (paper, section 4.2)."""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One named input or output of a graph.

    `shape` mixes fixed sizes and names of dynamic dimensions; equal names are equal sizes.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class GraphSpec:
    """One stage graph: its file inside the bundle, the SHA-256 of that file, and its interface."""

    name: str
    file: str
    sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    precision: Precision | None = None
    """What it computes in, between inputs and outputs; None for that of the bundle."""


@dataclass(frozen=True, kw_only=True)
class Category:
    """A class the network predicts: the id it has in the data set, and its name."""

    id: int
    name: str


def distinct_names(categories: Sequence[Category]) -> tuple[str, ...]:
    """Return the names of classes, with their ids where several classes have one name."""
    count = Counter(category.name for category in categories)
    return tuple(c.name if count[c.name] == 1 else f"{c.name} (id {c.id})" for c in categories)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an image becomes the network's input.

    The shorter side is resized to `shorter_side` unless the longer would exceed `longer_side`; RGB values
    (0..255) are normalised by `mean` and `std`; a batch is zero-padded right and bottom to the largest image,
    rounded up to a multiple of `size_divisor`.
    """

    shorter_side: int = 800
    longer_side: int = 1333
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    size_divisor: int = 32


@dataclass(frozen=True, kw_only=True)
class ProbeLevel:
    """A pyramid level that can be probed, in the order probed (P4, then P3)."""

    level: Level
    stride: int
    """Pixels per feature cell."""
    capacity: int
    """The most patches per image the graphs can take."""
    anchors_per_patch: int


@dataclass(frozen=True, kw_only=True)
class Probing:
    """The parameters of adaptive probing that the runtime's loop needs (paper, sections 4.2 and 5.1)."""

    mode: Mode
    """What the bundle was exported for; an `exact` bundle can also be run in `fast` mode."""
    patch_size: int
    """Side of a patch in feature cells."""
    levels: tuple[ProbeLevel, ...]
    """The levels beyond the first that the bundle can probe: (P4, P3), (P4,) or ()."""
    max_candidates: int
    """The most selected anchors per image that patch NMS considers, best first."""
    patch_nms_iou: float
    """IoU over which a patch suppresses a lower scored one."""
    anchor_floor: int
    """If fewer anchors than this pass the first level, its best `anchor_floor` do."""
    anchor_cap: int
    """The most anchors that reach the decoder; best first where there are more."""
    max_patches: int | None = None
    """The most patches per image and level, beyond which the lowest scored are dropped (CrowdHuman: 60)."""
    cap_can_be_lowered: bool = field(default=False, metadata={"may_be_missing": True})
    """Whether the decoder takes the best-scored anchors where it is given fewer queries than pass; false in
    bundles of earlier releases."""


@dataclass(frozen=True, kw_only=True)
class Postprocessing:
    """How decoder outputs become detections."""

    max_detections: int
    """The best-scored (query, class) pairs that are kept."""
    nms_iou: float | None
    """IoU threshold of class-wise NMS, or None for none."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`manifest.json`."""

    schema_version: int = SCHEMA_VERSION
    producer: str
    """Distribution and version that wrote the bundle, e.g. `asag-deploy 0.1.0`."""
    variant: str
    head: str
    precision: Precision
    """What the graphs compute in, but for those that say otherwise."""
    opset: int
    trained: bool
    """False if the weights are random: everything runs, but the detections mean nothing."""
    categories: tuple[Category, ...]
    preprocessing: Preprocessing
    probing: Probing
    postprocessing: Postprocessing
    graphs: tuple[GraphSpec, ...]
    parity: dict[str, Any] = field(default_factory=dict)
    """The report of the parity gate, as the exporter wrote it."""

    def precision_of(self, name: str) -> Precision:
        """Return what the stage graph called `name` computes in (KeyError if the bundle has none)."""
        return self.graph(name).precision or self.precision

    @property
    def precision_in_words(self) -> str:
        """Such as `fp32`, or `fp16 (but normalize, decoder in fp32)`."""
        others: dict[Precision, list[str]] = {}
        for graph in self.graphs:
            if graph.precision is not None and graph.precision != self.precision:
                others.setdefault(graph.precision, []).append(graph.name)
        but = ", ".join(f"{', '.join(names)} in {precision}" for precision, names in others.items())
        return f"{self.precision} (but {but})" if but else self.precision

    def graph(self, name: str) -> GraphSpec:
        """Return the stage graph called `name` (KeyError if the bundle has none)."""
        return next((g for g in self.graphs if g.name == name), None) or _missing(name, self.graphs)


def _missing(name: str, graphs: tuple[GraphSpec, ...]) -> GraphSpec:
    raise KeyError(f"no graph '{name}' among {[g.name for g in graphs]}")
