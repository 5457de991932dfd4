"""How much the compiled kernels take at most; `plugins/src/checks.cpp` refuses more.

What is built on them is refused beyond these numbers where it is made, and what exists all the same is
computed without the kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import NodeProto

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


def is_taken(node: NodeProto) -> bool:
    """Tell whether the kernel of a graph's node takes the node's attributes."""
    most = _ATTRIBUTES.get(node.op_type, {})
    return all(each.i <= most[each.name] for each in node.attribute if each.name in most)
