"""A bundle small enough to be compiled in no time, whose sizes have the names that real bundles give them.

Its stages compute nothing of use, but hold what needs care: an image of bytes, an operator of the domain
`asag` whose function has inputs of the same names as other tensors outside, products with weights and
between activations, one of them in a loop.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper

from asag_deploy.bundle.bundle import Bundle, write_bundle
from asag_deploy.engines.adapter import CompileOptions
from support.tiny_bundle import CLASSES, specs_of, tiny_manifest

HEADER = '<ir_version: 10, opset_import: ["" : 20, "asag" : 1]>\n'

NORMALIZE = """
normalize (uint8[batch, height, width, 3] pixels, int64[batch, 2] image_size)
    => (float[batch, 3, height, width] image)
{
    first = Transpose <perm = [0, 3, 1, 2]> (pixels)
    image = Cast <to = 1> (first)
}
"""

BACKBONE = """
backbone (float[batch, 3, height, width] image, int64[batch, 2] image_size)
    => (float[batch, height_p5, width_p5, 3] p5, float[batch, height_p5, 3] anchors)
{
    cells = MaxPool <kernel_shape = [32, 32], strides = [32, 32]> (image)
    p5 = Transpose <perm = [0, 2, 3, 1]> (cells)
    mean = ReduceMean <keepdims = 0> (p5, axis)
    keep = Relu (mean)
    other = Neg (mean)
    anchors = asag.PadAnchors <cap = 4> (other, keep)
}
<domain: "asag", opset_import: ["" : 20]>
PadAnchors <cap> (keep, anchors) => (padded)
{
    limit = Constant <value_int: int = @cap> ()
    most = CastLike (limit, keep)
    twice = Add (keep, keep)
    sum = Add (twice, anchors)
    padded = Min (sum, most)
}
"""

DECODER = """
decoder (float[batch, height_p5, width_p5, 3] p5, int64[queries] query_slots)
    => (float[batch, height_p5, queries, CLASSES] logits)
{
    turned = Transpose <perm = [0, 1, 3, 2]> (p5)
    pairs = MatMul (p5, turned)
    wide = MatMul (pairs, p5)
    looped = Loop <
        body = body (int64 i, bool more, float[b, h, w, 3] before)
            => (bool go, float[b, h, w, 3] after)
        {
            go = Identity (more)
            after = MatMul (before, square)
        }
    > (rounds, yes, wide)
    last = MatMul (looped, weights)
    row = ReduceMean <keepdims = 1> (last, two)
    slots = Cast <to = 1> (query_slots)
    column = Unsqueeze (slots, one)
    logits = Add (row, column)
}
"""

PLAIN = CompileOptions(
    capabilities=("sm86",),
    tf32=False,
    optimization_level=None,
    compatibility="none",
    version_compatible=False,
    user_allocation=False,
    auxiliary_streams=0,
)
"""What an engine for one kind of GPU is compiled with, and nothing else."""


def graphs() -> dict[str, onnx.ModelProto]:
    """The stage graphs by name."""
    rng = np.random.default_rng(0)
    return {
        "normalize": _model(NORMALIZE),
        "backbone": _model(BACKBONE, axis=np.array([2])),
        "decoder": _model(
            DECODER.replace("CLASSES", str(len(CLASSES))),
            rounds=np.array(3),
            yes=np.array(True),
            one=np.array([1]),
            two=np.array([2]),
            square=rng.normal(size=(3, 3)).astype(np.float32),
            weights=rng.normal(size=(3, len(CLASSES))).astype(np.float32),
        ),
    }


def make_engine_bundle(path: Path) -> Bundle:
    """Write the bundle to `path` and open it."""
    with write_bundle(path) as writer:
        for name, model in graphs().items():
            inputs, outputs = model.graph.input, model.graph.output
            writer.add_graph(
                name, model.SerializeToString(), inputs=specs_of(inputs), outputs=specs_of(outputs)
            )
        writer.finish(dataclasses.replace(tiny_manifest(levels=()), variant="asag-a-r50-100"))
    return Bundle.open(path)


def _model(text: str, **constants: np.ndarray) -> onnx.ModelProto:
    model = onnx.parser.parse_model(HEADER + text)
    for name, value in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    onnx.checker.check_model(model)
    return onnx.shape_inference.infer_shapes(model)
