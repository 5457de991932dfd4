"""What the probing loop asks of a backend: stages, and arrays that stay where they are.

A *stage* is one static graph of the network: named arrays in, named arrays out.  An array is opaque: it
lives on the backend's device (an OrtValue, a device buffer, a torch tensor), and only `download` brings it
to the host.  `Stages` is all that the loop of `asag_deploy.loop.probing` asks for; every network derives
from it (`asag_deploy.backends.network.Network`).

The stages, with B images, k patches per image (K at most), A anchors per patch, Q queries:

normalize   pixels u8 (B, H, W, 3) RGB, image_size i64 (B, 2)
            -> image f32 (B, 3, H, W), zero outside image_size
backbone    image, image_size
            -> p2..p5 (B, h, w, C), or p3..p6 of light ones and ASAG-D, anchors (B, N, 5),
               selected bool (B, N), counts i64 (B, 4)
probe_p4    feature = p4, feature_size i64 (2,), image_size, patches = origins, patch_count i64 (B),
            slots i64 (k) = 0..k-1
            -> anchors (B, k*A, 5), selected (B, k*A), counts (B, 4)
probe_p3    feature = p3, the others as above
            -> anchors (B, k*A, 5), counts (B, 4)
decoder     the same maps, anchors_p5, selected_p5, anchors_p4, selected_p4, anchors_p3,
            probed bool (B, levels), image_size, query_slots i64 (Q) = 0..Q-1; without what belongs to
            levels the network cannot probe, and without selected_* and probed where anchors that were probed
            stay
            -> logits (B, Q, classes), boxes (B, Q, 4), anchors (B, Q, 4), anchor_count i64 (B),
               det_scores (B, D), det_labels i64 (B, D), det_boxes (B, D, 4),
               proposal_scores (B, Q), proposal_boxes (B, Q, 4)

Between them `Stages.select` finds where the next level looks.  It is no graph: greedy NMS has a loop, and
an engine with a loop in it would wait for the host.

feature_size   height and width of the feature map in cells: an input, since a graph that asked for the
               shape would bring it from the host
image_size     valid height and width in pixels, what lies right of and below it is padding
anchors        cx, cy, w, h in pixels, score 0..1; in the decoder's output without the score
selected       anchors the next level would probe (and so replace)
origins        x, y of patches in cells of the level's own map, best scored first: what `select` gives
counts         per image, see `Counts`; graphs leave `patches` 0, for `select` to write
boxes          cx, cy, w, h relative to image_size; det_boxes likewise but x1, y1, x2, y2
anchor_count   queries before it are real, the others padding; det_* rows beyond them have score 0
proposal_*     what the relation block made of the anchors, best class score and box as `boxes`: for
               evaluation, never read by the runtime, and not in bundles of earlier releases
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from asag_deploy.bundle.manifest import ProbeLevel, Probing
from asag_deploy.loop.patch_nms import PatchFinder, patch_nms

FEATURES = ("p2", "p3", "p4", "p5", "p6")
"""The feature maps that `backbone` may put out, the finest first: P2 to P5, or P3 to P6."""
FEATURE_TENSORS = frozenset({*FEATURES, "feature"})
"""Every input and output of a stage that is a feature map."""

Array = Any
"""An array on a backend's device; only the backend knows what it is."""

Ints = NDArray[np.int64]


def features_among(names: Iterable[str]) -> tuple[str, ...]:
    """Return which of `names`, a backbone's outputs, are feature maps, the finest first."""
    given = frozenset(names)
    return tuple(name for name in FEATURES if name in given)


class Counts(NamedTuple):
    """What a level reports to the host, each (B,): the columns of the stages' `counts`."""

    selected: Ints
    """Anchors that ask for a closer look on the next level."""
    patches: Ints
    """Patches left of them after NMS, which may exceed the next level's capacity."""
    passing: Ints
    """Anchors the level passes on if probing stops here."""
    passing_if_probed: Ints
    """Anchors it passes on if the next level replaces the selected ones."""


PATCHES_COLUMN = Counts._fields.index("patches")
"""The column of `counts` that `Stages.select` writes."""


class LevelOutputs(NamedTuple):
    """The outputs of a level's stage that say where the next level looks, on the device."""

    anchors: Array
    """f32 (B, N, 5)"""
    selected: Array
    """bool (B, N)"""
    counts: Array
    """i64 (B, 4)"""

    @classmethod
    def of(cls, outputs: Mapping[str, Array]) -> LevelOutputs:
        """Pick them from all outputs of the stage."""
        return cls(*(outputs[name] for name in cls._fields))


class Stage(Protocol):
    """One static graph, ready to run."""

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph; the outputs stay on the device."""
        ...


class Stages(ABC):
    """A network's stages, and how arrays get to its device and back.  Safe to call from several threads."""

    patch_bucket: int = 1
    """Patches per image are rounded up to a multiple of this before a level is probed."""
    query_bucket: int = 1
    """Queries are rounded up to a multiple of this before they are decoded."""

    @abstractmethod
    def stage(self, name: str) -> Stage:
        """Return the stage called `name` (KeyError if there is none)."""

    @abstractmethod
    def upload(self, array: NDArray[Any]) -> Array:
        """Bring a host array to the device."""

    @abstractmethod
    def download(self, array: Array) -> NDArray[Any]:
        """Bring an array to the host, once it has been computed."""

    def shape(self, array: Array) -> tuple[int, ...]:
        """Return the shape of an array on the device."""
        return tuple(array.shape)

    def patch_finder(self) -> PatchFinder:
        """Return what `select` finds patches with on the host."""
        return patch_nms

    def select(
        self, probing: Probing, level: ProbeLevel, before: LevelOutputs, image_size: Array
    ) -> tuple[Array, Array]:
        """Find the patches that `level` looks at: NMS over those that the level before it asks for.

        `image_size` is (B, 2).  Returns origins i64 (B, capacity, 2), zeros beyond the last patch, and the
        counts of `before` with the column `patches` filled in; the counts given may be written to.  Here
        it is done on the host; a network on a GPU does it there.
        """
        origins, patches = self.patch_finder()(
            self.download(before.anchors),
            self.download(before.selected),
            self.download(image_size),
            stride=level.stride,
            patch_size=probing.patch_size,
            iou_threshold=probing.patch_nms_iou,
            capacity=level.capacity,
            max_candidates=probing.max_candidates,
        )
        filled = self.download(before.counts).copy()
        filled[:, PATCHES_COLUMN] = patches
        return self.upload(origins), self.upload(filled)
