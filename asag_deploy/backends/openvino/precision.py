"""What of a graph stays in float32 when OpenVINO computes it in bfloat16.

bfloat16 keeps 8 bits of mantissa: enough for features, but a coordinate of 1000 pixels would be known to 4,
and an index over 256 would be another one.  So everything that is computed from sizes, anchors and patches
stays in float32, up to the next learned layer or matrix product, and so does what comes out as a result,
back to the last one.  Those layers themselves multiply bfloat16 numbers, and sum in float32.

This works on OpenVINO's XML form of a graph, where a layer that carries the attribute `precise` keeps its
precision: OpenVINO's Python interface cannot set that attribute.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from xml.etree import ElementTree

from asag_deploy.loop.stages import FEATURE_TENSORS

_PICTURES = frozenset({"image", "pixels"})
_CONVOLUTIONS = frozenset({"Convolution", "GroupConvolution", "ConvolutionBackpropData"})
_FIRST_INPUT_ONLY = frozenset(
    {
        *("Broadcast", "Gather", "GatherElements", "GatherND", "GridSample", "Interpolate", "Pad", "Reshape"),
        *("Slice", "Split", "Squeeze", "StridedSlice", "Tile", "TopK", "Transpose", "Unsqueeze"),
        *("VariadicSplit", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum"),
    }
)
"""Layers whose values come from their first input; the others say where or how many."""
_ENDS = frozenset({"Const", "Parameter", "Result", "ShapeOf"})


def keep_coordinates_precise(xml: bytes) -> bytes:
    """Mark every layer of an OpenVINO graph description that has to stay in float32."""
    root = ElementTree.fromstring(xml)
    graph = _Graph.of(root)
    marked = graph.after(graph.coordinate_inputs())
    marked |= graph.before([*marked, *graph.precise_results()])
    for layer in marked:
        _mark(graph.layers[layer])
    marked_xml: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return marked_xml


@dataclass(kw_only=True)
class _Graph:
    """Layers by id, and who feeds whom."""

    layers: dict[str, ElementTree.Element]
    sources: Mapping[str, list[tuple[int, str]]] = field(default_factory=dict)
    """Per layer, (its input's position, the layer that feeds it)."""
    targets: Mapping[str, list[tuple[int, str]]] = field(default_factory=dict)
    """Per layer, (the input's position, the layer it feeds)."""

    @classmethod
    def of(cls, root: ElementTree.Element) -> _Graph:
        sources, targets = defaultdict(list), defaultdict(list)
        for edge in root.iterfind("edges/edge"):
            one, other = edge.attrib["from-layer"], edge.attrib["to-layer"]
            position = int(edge.attrib["to-port"])
            sources[other].append((position, one))
            targets[one].append((position, other))
        layers = {layer.attrib["id"]: layer for layer in root.iterfind("layers/layer")}
        return cls(layers=layers, sources=sources, targets=targets)

    def kind(self, layer: str) -> str:
        return self.layers[layer].attrib["type"]

    def coordinate_inputs(self) -> list[str]:
        """Return the graph's inputs but for pictures and features."""
        return [
            layer
            for layer in self.layers
            if self.kind(layer) == "Parameter" and not self._names(layer) & (FEATURE_TENSORS | _PICTURES)
        ]

    def precise_results(self) -> list[str]:
        """Return the graph's results but for features."""
        return [
            layer
            for layer in self.layers
            if self.kind(layer) == "Result"
            and not any(self._names(source) & FEATURE_TENSORS for _, source in self.sources[layer])
        ]

    def after(self, starts: Iterable[str]) -> set[str]:
        """Find the layers whose values come from those of `starts`, up to learned layers and products."""
        found: set[str] = set()
        front = list(starts)
        while front:
            for position, layer in self.targets.get(front.pop(), ()):
                ends = self.kind(layer) == "Result" or self._ends_features(layer)
                if layer not in found and not ends and self._carries(layer, position):
                    found.add(layer)
                    front.append(layer)
        return found

    def before(self, starts: Iterable[str]) -> set[str]:
        """Find the layers that the values of `starts` come from, back to learned layers and products."""
        found: set[str] = set()
        front = list(starts)
        while front:
            layer = front.pop()
            for position, source in self.sources.get(layer, ()):
                if source in found or not self._carries(layer, position) or self.kind(source) in _ENDS:
                    continue
                if not self._ends_features(source):
                    found.add(source)
                    front.append(source)
        return found

    def _carries(self, layer: str, position: int) -> bool:
        """Tell whether a layer's values come from its input at that position."""
        kind = self.kind(layer)
        if kind == "ShapeOf":
            return False
        if kind == "Select":
            return position > 0
        return position == 0 or kind not in _FIRST_INPUT_ONLY

    def _ends_features(self, layer: str) -> bool:
        return self.kind(layer) == "MatMul" or self.kind(layer) in _CONVOLUTIONS

    def _names(self, layer: str) -> set[str]:
        """Return the names of a layer's outputs, among them those of the graph's inputs and outputs."""
        ports = self.layers[layer].iterfind("output/port")
        return {name for port in ports for name in port.get("names", "").split(",")}


def _mark(layer: ElementTree.Element) -> None:
    info = layer.find("rt_info")
    if info is None:
        info = ElementTree.Element("rt_info")
        data = layer.find("data")
        layer.insert(0 if data is None else 1, info)
    ElementTree.SubElement(info, "attribute", {"name": "precise", "version": "0"})
