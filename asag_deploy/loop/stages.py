"""What the probing loop asks of a backend: stages, and arrays that stay where they are.

A *stage* is one static graph of the network: named arrays in, named arrays out.  An array is opaque: it
lives on the backend's device (an OrtValue, a device buffer, a torch tensor), and only `download` brings it
to the host.  A `Network` with these few functions can run the loop of `asag_deploy.loop.probing`; the PyTorch
network is one too.  What a network on a GPU can do beyond that has defaults: there it happens on the host.

The stages, with B images, k patches per image (K at most), A anchors per patch, Q queries:

normalize   pixels u8 (B, H, W, 3) RGB, image_size i64 (B, 2)
            -> image f32 (B, 3, H, W), zero outside image_size
backbone    image, image_size
            -> p2..p5 (B, h, w, C), anchors (B, N, 5), selected bool (B, N), counts i64 (B, 4)
probe_p4    feature = p4, feature_size i64 (2,), image_size, patches = origins, patch_count i64 (B),
            slots i64 (k) = 0..k-1
            -> anchors (B, k*A, 5), selected (B, k*A), counts (B, 4)
probe_p3    feature = p3, the others as above
            -> anchors (B, k*A, 5), counts (B, 4)
decoder     p2..p5, anchors_p5, selected_p5, anchors_p4, selected_p4, anchors_p3, probed bool (B, levels),
            image_size, query_slots i64 (Q) = 0..Q-1; without what belongs to levels the network cannot probe,
            and without selected_* and probed where anchors that were probed stay
            -> logits (B, Q, classes), boxes (B, Q, 4), anchors (B, Q, 4), anchor_count i64 (B),
               det_scores (B, D), det_labels i64 (B, D), det_boxes (B, D, 4),
               proposal_scores (B, Q), proposal_boxes (B, Q, 4)

Between them `Network.select` finds where the next level looks.  It is no graph: greedy NMS has a loop, and
an engine with a loop in it would wait for the host.

feature_size   height and width of the feature map in cells: an input, since a graph that asked for the
               shape would bring it from the host
image_size     valid height and width in pixels, what lies right of and below it is padding
anchors        cx, cy, w, h in pixels, score 0..1; in the decoder's output without the score
selected       anchors the next level would probe (and so replace)
origins        x, y of patches in cells of the level's own map, best scored first: what `select` gives
counts         per image, see `loop.probing.Counts`; graphs leave `patches` 0, for `select` to write
boxes          cx, cy, w, h relative to image_size; det_boxes likewise but x1, y1, x2, y2
anchor_count   queries before it are real, the others padding; det_* rows beyond them have score 0
proposal_*     what the relation block made of the anchors, best class score and box as `boxes`: for
               evaluation, never read by the runtime, and not in bundles of earlier releases
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from asag_deploy.bundle.manifest import Manifest, ProbeLevel, Probing
from asag_deploy.errors import ConfigError
from asag_deploy.loop.patch_nms import patch_nms

if TYPE_CHECKING:
    from asag_deploy.backends.loops import Loop, LoopChoice
    from asag_deploy.processing.canvases import Canvas
    from asag_deploy.processing.on_host import Processing

PATCHES_COLUMN = 1
"""Of `counts`: what `Network.select` writes."""

Array = Any
"""An array on a backend's device; only the backend knows what it is."""


class Stage(Protocol):
    """One static graph, ready to run."""

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph; the outputs stay on the device."""
        ...


class Network(ABC):
    """The stages of one network on one backend.  Safe to call from several threads at once."""

    patch_bucket: int = 1
    """Patches per image are rounded up to a multiple of this before a level is probed."""
    query_bucket: int = 1
    """Queries are rounded up to a multiple of this before they are decoded."""
    takes_device_arrays: bool = False
    """Whether `upload` takes other libraries' GPU arrays, and outputs are such arrays."""
    canvases: Sequence[Canvas] = ()
    """The shapes that batches are padded to; what none of them holds goes on as a multiple of the divisor."""

    @abstractmethod
    def stage(self, name: str) -> Stage:
        """The stage called `name` (KeyError if there is none)."""

    @abstractmethod
    def upload(self, array: NDArray[Any]) -> Array:
        """A host array as an array of this backend."""

    @abstractmethod
    def download(self, array: Array) -> NDArray[Any]:
        """An array of this backend on the host, once it has been computed."""

    def shape(self, array: Array) -> tuple[int, ...]:
        """The shape of an array of this backend."""
        return tuple(array.shape)

    def select(
        self,
        probing: Probing,
        level: ProbeLevel,
        anchors: Array,
        selected: Array,
        counts: Array,
        image_size: Array,
    ) -> tuple[Array, Array]:
        """Where `level` looks, if it is probed: NMS over the patches that the level before it asks for.

        anchors, selected and counts are outputs of that level's stage.  Returns origins i64 (B, capacity,
        2), zeros beyond the last patch, and counts i64 (B, 4) with the column `patches` filled in; the
        counts given may be written to.  Here it is done on the host; a network on a GPU does it there.
        """
        origins, patches = patch_nms(
            self.download(anchors),
            self.download(selected),
            self.download(image_size),
            stride=level.stride,
            patch_size=probing.patch_size,
            iou_threshold=probing.patch_nms_iou,
            capacity=level.capacity,
            max_candidates=probing.max_candidates,
        )
        filled = self.download(counts).copy()
        filled[:, PATCHES_COLUMN] = patches
        return self.upload(origins), self.upload(filled)

    def keep(self, array: Array) -> None:  # noqa: B027  (the default: nothing needs to be kept)
        """Refer to an uploaded array until all that was begun with it is done."""

    def close(self) -> None:  # noqa: B027  (the default: its memory goes with its last reference)
        """Let go of what the network holds, once it has done its work; closing twice does no harm."""

    def processing(self, manifest: Manifest) -> Processing:
        """What comes before and after the network: on its own device if it can, else on the host."""
        from asag_deploy.processing.on_host import OnHost

        on_device = self.device_processing(manifest)
        return OnHost(self, manifest) if on_device is None else on_device

    def device_processing(self, manifest: Manifest) -> Processing | None:
        """Pre- and post-processing on the network's own device; None if it cannot do that."""
        return None

    def loop(self, choice: LoopChoice = "auto", deadline_ms: float | None = None) -> Loop:
        """Who takes the stop decisions; raises what `asag_deploy.backends.loops.open_loop` does."""
        from asag_deploy.backends.loops import open_loop

        return open_loop(self, choice, deadline_ms)

    def why_no_device_loop(self) -> str | None:
        """What keeps the probing loop from running on the network's device; None if nothing is known to."""
        return (
            "loop 'device' needs a backend that runs on a GPU with TensorRT; load the detector with "
            "backend='tensorrt-rtx', or with loop='host'"
        )

    def open_device_loop(self) -> Loop:
        """The probing loop on the network's device; the same for all who ask.

        Raises ConfigError for a network that has none, BackendError if what it takes is missing here.
        """
        raise ConfigError(self.why_no_device_loop() or "the network has no loop of its own")
