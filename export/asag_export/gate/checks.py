"""Checks of the parity gate that compare a backend with itself.

Compilers choose other kernels for other shapes, and a GPU's kernels may add up in any order.  So the images
of a batch could influence each other, and a graph that was only compared at the shapes its engine was tuned
for is not proven at others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asag_deploy.backends.network import Network
from asag_deploy.bundle.manifest import Manifest
from asag_deploy.engines.shapes import Batches, profile
from asag_export.gate.parity import Check, StageParity, largest_difference

Arrays = Mapping[str, NDArray[Any]]
Shapes = dict[str, tuple[int, ...]]

IDENTICAL_ROWS = "identical rows"
"""Equal images in a batch get equal decisions, and numbers within a tenth of the tolerance that PyTorch is
compared with.  Not equal bits: on a CPU, ONNX Runtime multiplies the last rows of a matrix by other code."""
BATCH_OF_ONE = "batch of one"
"""An image by itself gives the numbers that it gives in a batch, within the tolerance that PyTorch is
compared with.  Decisions follow from them, and are judged against PyTorch's in every batch size."""
OTHER_SHAPES = "other shapes"
"""Every graph was compared with PyTorch at other shapes than the ones that engines are tuned for; what is
counted is 1 for a graph of which that is not so."""

IMAGES = 3
_ROUNDING = 0.1
_OF_ALL_IMAGES = ("feature_size", "slots", "query_slots")
"""Inputs without a row for each image."""
_RANKED = ("det_labels", "det_boxes")
"""In the order of scores, of which two may be equal but for rounding."""


def batch_checks(
    network: Network,
    samples: Mapping[str, Arrays],
    allowed: Callable[[str, NDArray[Any]], float],
    images: int,
) -> list[Check]:
    """Check `identical rows` and `batch of one`.

    samples: by the name of a graph, its inputs for one image; allowed: the tolerance for an output of that
    name and value; images: in the batch that is tried, at least 2.
    """
    identical, alone = [], []
    for stage, inputs in samples.items():
        one = _run(network, stage, inputs)
        many = _run(network, stage, _repeated(inputs, images))
        bounds = {name: allowed(name, array) for name, array in one.items() if array.dtype.kind == "f"}
        among = {
            name: (largest_difference(np.broadcast_to(rows[:1], rows.shape), rows), _ROUNDING * bounds[name])
            if name in bounds
            else (float(np.count_nonzero(rows != rows[:1])), 0.0)
            for name, rows in many.items()
        }
        between = {name: (largest_difference(one[name], many[name][:1]), bounds[name]) for name in bounds}
        identical.append(_worst(stage, among))
        alone.append(_worst(stage, between))
    return [Check(name=IDENTICAL_ROWS, rows=tuple(identical)), Check(name=BATCH_OF_ONE, rows=tuple(alone))]


def usual_shapes(manifest: Manifest, batches: Batches) -> dict[str, Shapes]:
    """List the shapes that engines of a bundle are tuned for, by graph and input."""
    return {
        graph.name: {range_.name: range_.usual for range_ in profile(graph, manifest, batches)}
        for graph in manifest.graphs
    }


def shapes_check(ran: Mapping[str, Sequence[Shapes]], usual: Mapping[str, Shapes]) -> Check:
    """Check `other shapes`, given the shapes that each graph ran with."""
    rows = []
    for stage, cases in ran.items():
        others = sum(any(shapes[name] != usual[stage][name] for name in usual[stage]) for shapes in cases)
        rows.append(
            StageParity(
                stage=stage,
                output="",
                difference=0.0 if others else 1.0,
                tolerance=0.0,
                cases=others,
                passed=others > 0,
            )
        )
    return Check(name=OTHER_SHAPES, rows=tuple(rows))


def _run(network: Network, stage: str, inputs: Arrays) -> dict[str, NDArray[Any]]:
    outputs = network.stage(stage)({name: network.upload(array) for name, array in inputs.items()})
    return {name: network.download(array) for name, array in outputs.items() if name not in _RANKED}


def _repeated(inputs: Arrays, images: int) -> dict[str, NDArray[Any]]:
    return {
        name: array if name in _OF_ALL_IMAGES else np.repeat(array, images, axis=0)
        for name, array in inputs.items()
    }


def _worst(stage: str, outputs: Mapping[str, tuple[float, float]]) -> StageParity:
    """Report the output furthest beyond its tolerance, or nearest to it; each is (difference, tolerance)."""
    output, (difference, tolerance) = max(
        outputs.items(), key=lambda item: item[1][0] / item[1][1] if item[1][1] else item[1][0]
    )
    return StageParity(
        stage=stage,
        output=output,
        difference=difference,
        tolerance=tolerance,
        cases=len(outputs),
        passed=all(found <= bound for found, bound in outputs.values()),
    )
