"""Which detectors are compared, and what the paper says of each; without PyTorch, for the command's help."""

from __future__ import annotations

from dataclasses import dataclass, field

PAPER_SHAPE = (800, 1134)
"""Height and width in pixels of 0.907 Mpx, the mean image of COCO val2017 at the usual size."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A detector of the paper's tables 2 to 4."""

    title: str
    layers: int
    """Decoder layers in sequence."""
    about: str
    gmacs: dict[int, float] = field(default_factory=dict)
    """The paper's cost ("GFLOPs", which are multiply-accumulates) with ResNet-50, by number of queries."""
    gmacs_of: tuple[int, int] = PAPER_SHAPE
    """Height and width of the picture that the paper's cost is of: 0.907 Mpx, if not said otherwise."""
    ap: dict[int, float] = field(default_factory=dict)
    """The paper's AP on COCO val2017 in percent, by number of queries; after 36 epochs (one: 50)."""
    fps: dict[int, float] = field(default_factory=dict)
    """The paper's images a second on an RTX 3090."""


COMPARED: dict[str, Compared] = {
    "adamixer-6": Compared(
        title="AdaMixer",
        layers=6,
        about="six AdaMixer layers over learned queries, with a neck of 1x1 convolutions",
        gmacs={100: 103.0, 300: 125.0},
        gmacs_of=(800, 1280),
        ap={100: 45.6, 300: 47.0},
        fps={100: 23.8, 300: 22.2},
    ),
    "sparse-rcnn-6": Compared(
        title="Sparse R-CNN",
        layers=6,
        about="six Sparse R-CNN layers over learned queries",
        gmacs={100: 134.0, 300: 152.0},
        ap={100: 42.8, 300: 45.0},
        fps={100: 26.0, 300: 25.4},
    ),
    "f-qrcnn": Compared(
        title="Featurized Query R-CNN",
        layers=1,
        about="one Sparse R-CNN layer over queries found on a dense grid",
        gmacs={100: 140.0, 300: 143.0},
        ap={100: 41.3, 300: 41.7},
        fps={100: 38.2, 300: 37.1},
    ),
    "cf-qrcnn": Compared(
        title="Cascade Featurized Query R-CNN",
        layers=2,
        about="two Sparse R-CNN layers over queries found on a dense grid",
        gmacs={100: 142.0, 300: 148.0},
        ap={100: 43.0, 300: 44.6},
        fps={100: 34.1, 300: 33.6},
    ),
    "deformable-detr-6": Compared(
        title="Deformable DETR",
        layers=6,
        about="an encoder, and six deformable layers over learned queries that refine boxes",
        gmacs={300: 173.0},
        ap={300: 46.2},
        fps={300: 19.0},
    ),
    "efficient-detr": Compared(
        title="Efficient DETR",
        layers=1,
        about="an encoder, queries found among its cells, and one deformable layer",
        gmacs={300: 210.0},
        ap={300: 45.1},
    ),
}
"""The detectors, by the name of the reference."""
IN_TORCH = "torch-"
"""What comes before the name of a reference that PyTorch runs, eager."""


def references() -> dict[str, str]:
    """Return the references that these detectors are, and a few words on each."""
    exported = {
        name: f"{each.title}: {each.about}, random weights, in the first backend"
        for name, each in COMPARED.items()
    }
    in_torch = {f"{IN_TORCH}{name}": f"{each.title} in PyTorch, eager" for name, each in COMPARED.items()}
    return exported | in_torch


def is_compared(name: str) -> bool:
    """Return whether a reference is one of these detectors, in either form."""
    return name.removeprefix(IN_TORCH) in COMPARED
