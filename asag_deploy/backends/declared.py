"""What a loaded graph declares of itself, held against what the bundle's manifest says of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from asag_deploy.bundle.bundle import MANIFEST, Bundle
from asag_deploy.bundle.manifest import TensorSpec
from asag_deploy.bundle.manifest_json import export_again
from asag_deploy.errors import BundleCorruptError

UNKNOWN = "?"
"""The size of a dimension that a graph leaves open."""


def check_declared(
    bundle: Bundle, name: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> None:
    """Raise BundleCorruptError unless the graph `name` has the inputs and outputs that its manifest says.

    inputs, outputs: as the library that has loaded it reads them, with sizes or names of dimensions.
    """
    problem = differs(bundle, name, inputs, outputs)
    if problem is not None:
        raise BundleCorruptError(
            f"'{bundle.graph_path(name)}' is not the graph that {MANIFEST} describes: {problem}; "
            f"{export_again(bundle.manifest)}"
        )


def differs(
    bundle: Bundle,
    name: str,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    *,
    may_be_fixed: bool = False,
) -> str | None:
    """Return in what way the graph `name` is not what its manifest says, as half a sentence; None if it is.

    may_be_fixed: whether inputs may have fixed sizes where the manifest leaves them open.
    """
    graph = bundle.manifest.graph(name)
    sides = (("input", inputs, graph.inputs), ("output", outputs, graph.outputs))
    # Of outputs, libraries find out sizes that nobody has declared.
    return next(
        (
            each
            for side, found, said in sides
            for each in _differences(side, found, said, may_be_fixed or side == "output")
        ),
        None,
    )


def _differences(
    side: str, found: Sequence[TensorSpec], said: Sequence[TensorSpec], may_be_fixed: bool
) -> Iterator[str]:
    declared = {spec.name: spec for spec in found}
    known = {spec.name for spec in said}
    for spec in said:
        if spec.name not in declared:
            others = ", ".join(sorted(declared.keys() - known)) or "no other"
            yield f"it has no {side} '{spec.name}' (but {others})"
            continue
        actual = declared[spec.name]
        if actual.dtype != spec.dtype:
            yield f"its {side} '{spec.name}' is {actual.dtype}, not {spec.dtype}"
        elif not _fits(actual.shape, spec.shape, may_be_fixed):
            yield f"its {side} '{spec.name}' has the shape {_words(actual.shape)}, not {_words(spec.shape)}"
    for extra in sorted(declared.keys() - known):
        yield f"it has an {side} '{extra}' beside those"


def _fits(actual: Sequence[int | str], said: Sequence[int | str], may_be_fixed: bool) -> bool:
    """Return whether shapes agree; a size that is said may be left open, for a library may not know it."""
    return len(actual) == len(said) and all(
        one == other
        if isinstance(one, int) and isinstance(other, int)
        else may_be_fixed or isinstance(one, str)
        for one, other in zip(actual, said, strict=True)
    )


def _words(shape: Sequence[int | str]) -> str:
    return f"({', '.join(map(str, shape))})"
