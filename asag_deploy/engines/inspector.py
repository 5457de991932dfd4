"""The layers an engine was really built of, by the types they read and write.

The graph decides the types, but the compiler fuses, reorders and casts.  The library's inspector tells; it
asks a deserialised engine, which takes a GPU, with TensorRT-RTX too.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

_WORD = re.compile(r"[A-Za-z]+\d*")
# As the inspector writes types: alone without an execution context, with one in a description of the format.
_TYPES = {
    **dict.fromkeys(("float", "fp32", "float32"), "fp32"),
    **dict.fromkeys(("half", "fp16", "float16"), "fp16"),
    **dict.fromkeys(("bf16", "bfloat16"), "bf16"),
    **dict.fromkeys(("fp8", "float8", "fp8e4m3"), "fp8"),
    "int8": "int8",
}
OTHER = "other"
"""Layers of shapes, indices and flags."""

Layers = dict[str, int]
"""How many layers read and write which types: `{"fp16": 80, "fp16+fp32": 12, "other": 5}`."""


def layers_of(module: Any, engine: Any) -> Layers | None:
    """Count the layers of a deserialised engine of the library `module`, by the types they read and write.

    Returns None if the engine was not built with detailed profiling information, as this project's are.
    """
    inspector = engine.create_engine_inspector()
    return count_layers(str(inspector.get_engine_information(module.LayerInformationFormat.JSON)))


def count_layers(text: str) -> Layers | None:
    """Count the layers in the JSON that an inspector wrote; returns None if it names no types."""
    try:
        layers = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError):
        return None
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        return None  # their names alone
    counted = Counter("+".join(_types(layer)) or OTHER for layer in layers)
    return dict(sorted(counted.items()))


def in_words(layers: Layers | None) -> str:
    """Write the counts for people: `80 layers in fp16, 12 in fp16+fp32`."""
    if layers is None:
        return "the inspector was not asked, since that takes the GPU that the engine is for"
    return ", ".join(f"{count} in {types}" for types, count in layers.items()) or "no layers"


def _types(layer: dict[str, Any]) -> list[str]:
    tensors = [*_listed(layer.get("Inputs")), *_listed(layer.get("Outputs"))]
    words = (word.lower() for text in _texts(tensors) for word in _WORD.findall(text))
    return sorted({_TYPES[word] for word in words if word in _TYPES})


def _listed(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _texts(tensors: Iterable[dict[str, Any]]) -> Iterable[str]:
    for tensor in tensors:
        yield from (str(tensor[key]) for key in ("Format/Datatype", "Datatype") if key in tensor)
