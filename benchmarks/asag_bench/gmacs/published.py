"""The paper's costs ("GFLOPs", tables 2 to 4), which are multiply-accumulates.

They come out exactly for several detectors where images have 0.907 Mpx, the mean of COCO val2017 at the usual
size.
"""

from __future__ import annotations

from dataclasses import dataclass

from asag_bench.runners.compared.published import COMPARED, PAPER_SHAPE

NAMED_SHAPES = {"0.907mpx": PAPER_SHAPE}
"""Sizes that have a name: the mean image that the paper counts."""
PAPER_PATCHES = (5, 5)
"""Patches probed on P4 and P3, about the paper's mean (table 5: 4.9 and 4.5)."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """A row of the paper's tables."""

    network: str
    queries: int
    gmacs: float | None
    """The paper's figure; None for what only is to be counted."""
    shape: tuple[int, int] = PAPER_SHAPE


PUBLISHED = (
    Published(network="asag-a-r50-100", queries=102, gmacs=131),
    Published(network="asag-a-r50-300", queries=312, gmacs=139),
    Published(network="asag-s-r50-100", queries=100, gmacs=130),
    Published(network="asag-s-r50-300", queries=312, gmacs=136),
    Published(network="asag-a-r101-300", queries=296, gmacs=206),
    Published(network="asag-d-r50-300", queries=253, gmacs=182),
    *(
        Published(network=name, queries=queries, gmacs=gmacs, shape=each.gmacs_of)
        for name, each in COMPARED.items()
        for queries, gmacs in each.gmacs.items()
    ),
)
"""What `asag-bench gmacs` counts if nothing is asked for."""


def published(network: str, queries: int, shape: tuple[int, int]) -> float | None:
    """Return the paper's figure for a network with about so many queries at this size, if it has one."""
    for row in PUBLISHED:
        if (row.network, row.shape) == (network, shape) and abs(row.queries - queries) <= 0.05 * row.queries:
            return row.gmacs
    return None
