"""How much the compiled kernels take at most; `plugins/src/checks.cpp` refuses more.

What is built on them is refused beyond these numbers where it is made, and what exists all the same is
computed without the kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

MOST_ANCHORS = 2048
"""Of an image, that reach the decoder."""
MOST_DETECTIONS = 2048
"""Of an image, that are finished on a GPU; the host takes any number."""
MOST_FIRST_ANCHORS = 16_384
"""Of the first level, from which its floor is taken."""
LARGEST_PATCH = 1024
"""Cells a side."""

_ATTRIBUTES: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {"PadAnchors": {"first_level": MOST_FIRST_ANCHORS, "floor": MOST_ANCHORS, "cap": MOST_ANCHORS}}
)


def is_taken(operator: str, attributes: Mapping[str, int]) -> bool:
    """Tell whether a kernel takes a node of a graph with these attributes, whole numbers by name."""
    most = _ATTRIBUTES.get(operator, {})
    return all(value <= most[name] for name, value in attributes.items() if name in most)
