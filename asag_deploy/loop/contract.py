"""The contract of the stages as data: which arrays each takes and gives, of which types and shapes.

`asag_deploy.loop.stages` says it in words.  What a bundle says of its graphs is held against it before any
of them runs, since a stage that gives other arrays is noticed late, or never.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from asag_deploy.bundle.bundle import MANIFEST, Bundle
from asag_deploy.bundle.manifest import GraphSpec, Manifest, ProbeLevel, TensorSpec
from asag_deploy.bundle.manifest_json import export_again
from asag_deploy.errors import BundleCorruptError
from asag_deploy.loop.stages import FEATURES, Counts, features_among

_DYNAMIC = "any size"
_FREE = None
_FLOAT, _HALF, _INT, _BOOL = "float32", "float16", "int64", "bool"


class Want(NamedTuple):
    """What an array has to be."""

    dtype: str
    shape: tuple[int | str | None, ...]
    """Of each dimension its size; `_DYNAMIC` if it must not be fixed, `_FREE` if it may be either."""


@dataclass(frozen=True, kw_only=True)
class StageContract:
    """What one stage takes and gives."""

    inputs: Mapping[str, Want]
    """All that the loop gives it; it need not take every one."""
    needs: frozenset[str]
    """The inputs it cannot do without."""
    outputs: Mapping[str, Want]
    """All that is read of it."""
    extra: frozenset[str] = field(default_factory=frozenset)
    """The outputs that may be missing."""


def check_stages(bundle: Bundle) -> None:
    """Raise BundleCorruptError if a stage of a bundle takes or gives something else than the loop does."""
    problem = next(_problems(bundle.manifest), None)
    if problem is not None:
        raise BundleCorruptError(f"in '{bundle.path / MANIFEST}', {problem}; {export_again(bundle.manifest)}")


def stage_contracts(manifest: Manifest) -> dict[str, StageContract]:
    """Return what each stage of a bundle has to take and give."""
    feature = _HALF if manifest.precision == "fp16" else _FLOAT
    levels = manifest.probing.levels
    image = Want(_FLOAT, (_DYNAMIC, 3, _DYNAMIC, _DYNAMIC))
    sizes = Want(_INT, (_DYNAMIC, 2))
    want = Want(feature, (_DYNAMIC, _FREE, _FREE, _FREE))
    maps = dict.fromkeys(FEATURES, want)
    given = features_among(tensor.name for tensor in manifest.graph("backbone").outputs)
    found = {
        "normalize": StageContract(
            inputs={"pixels": Want("uint8", (_DYNAMIC, _DYNAMIC, _DYNAMIC, 3)), "image_size": sizes},
            needs=frozenset({"pixels"}),
            outputs={"image": image},
        ),
        "backbone": StageContract(
            inputs={"image": image, "image_size": sizes},
            needs=frozenset({"image"}),
            outputs={**maps, **_choice(last=not levels)},
            extra=frozenset({FEATURES[0], FEATURES[-1]}),
        ),
        "decoder": _decoder(manifest, dict.fromkeys(given, want), sizes),
    }
    for level in levels:
        last = level is levels[-1]
        found[f"probe_{level.level.lower()}"] = _probe(level, want, sizes, last)
    return found


def _choice(*, last: bool) -> dict[str, Want]:
    """Describe the anchors of a level, and which of them ask for the next, if one follows."""
    selected = {} if last else {"selected": Want(_BOOL, (_DYNAMIC, _FREE))}
    counts = Want(_INT, (_DYNAMIC, len(Counts._fields)))
    return {"anchors": Want(_FLOAT, (_DYNAMIC, _FREE, 5)), **selected, "counts": counts}


def _probe(level: ProbeLevel, feature: Want, sizes: Want, last: bool) -> StageContract:
    return StageContract(
        inputs={
            "feature": feature,
            "feature_size": Want(_INT, (2,)),
            "image_size": sizes,
            "patches": Want(_INT, (_DYNAMIC, level.capacity, 2)),
            "patch_count": Want(_INT, (_DYNAMIC,)),
            "slots": Want(_INT, (_DYNAMIC,)),
        },
        needs=frozenset({"patches", "slots"}),
        outputs=_choice(last=last),
    )


def _decoder(manifest: Manifest, maps: Mapping[str, Want], sizes: Want) -> StageContract:
    names = ["p5", *(level.level.lower() for level in manifest.probing.levels)]
    anchors = {f"anchors_{name}": Want(_FLOAT, (_DYNAMIC, _FREE, 5)) for name in names}
    selected = {f"selected_{name}": Want(_BOOL, (_DYNAMIC, _FREE)) for name in names[:-1]}
    probed = {"probed": Want(_BOOL, (_DYNAMIC, len(names) - 1))} if len(names) > 1 else {}
    boxes = Want(_FLOAT, (_DYNAMIC, _DYNAMIC, 4))
    proposals = {"proposal_scores": Want(_FLOAT, (_DYNAMIC, _DYNAMIC)), "proposal_boxes": boxes}
    return StageContract(
        inputs={
            **maps,
            **anchors,
            **selected,
            **probed,
            "image_size": sizes,
            "query_slots": Want(_INT, (_DYNAMIC,)),
        },
        needs=frozenset({*anchors, "query_slots"}),
        outputs={
            "logits": Want(_FLOAT, (_DYNAMIC, _DYNAMIC, len(manifest.categories))),
            "boxes": boxes,
            "anchors": boxes,
            "anchor_count": Want(_INT, (_DYNAMIC,)),
            "det_scores": Want(_FLOAT, (_DYNAMIC, _FREE)),
            "det_labels": Want(_INT, (_DYNAMIC, _FREE)),
            "det_boxes": Want(_FLOAT, (_DYNAMIC, _FREE, 4)),
            **proposals,
        },
        extra=frozenset(proposals),
    )


def _problems(manifest: Manifest) -> Iterator[str]:
    """Yield what the stages cannot be, as half sentences."""
    contracts = stage_contracts(manifest)
    for name, contract in contracts.items():
        graph = manifest.graph(name)
        yield from _missing(graph, contract)
        for spec, side, wanted in _known(graph, contract):
            problem = _difference(spec, wanted)
            if problem is not None:
                yield f"the {side} '{spec.name}' of the graph '{name}' {problem}"
    for giver, given, taker, taken in _wires(manifest):
        if _clash(given, taken):
            yield (
                f"the graph '{giver}' gives '{given.name}' as {_words(given.dtype, given.shape)}, but "
                f"'{taker}' takes it as {_words(taken.dtype, taken.shape)}"
            )
    first = _named(manifest.graph("backbone").outputs, "anchors")
    floor = manifest.probing.anchor_floor
    if first is not None and isinstance(first.shape[1], int) and floor > first.shape[1]:
        yield f"`probing.anchor_floor` is {floor}, but the first level has {first.shape[1]} anchors"


def _missing(graph: GraphSpec, contract: StageContract) -> Iterator[str]:
    """Yield which names a graph has too many of, or too few."""
    taken = [spec.name for spec in graph.inputs]
    given = [spec.name for spec in graph.outputs]
    for name in taken:
        if name not in contract.inputs:
            yield f"the graph '{graph.name}' takes '{name}', which nothing gives it"
    for name in sorted(contract.needs - set(taken)):
        yield f"the graph '{graph.name}' has no input '{name}'"
    for name in contract.outputs:
        if name not in given and name not in contract.extra:
            yield f"the graph '{graph.name}' has no output '{name}'"
    for side, names in (("inputs", taken), ("outputs", given)):
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            yield f"the graph '{graph.name}' has two {side} '{twice}'"


def _known(graph: GraphSpec, contract: StageContract) -> Iterator[tuple[TensorSpec, str, Want]]:
    for side, specs, wanted in (
        ("input", graph.inputs, contract.inputs),
        ("output", graph.outputs, contract.outputs),
    ):
        for spec in specs:
            if spec.name in wanted:
                yield spec, side, wanted[spec.name]


def _difference(spec: TensorSpec, wanted: Want) -> str | None:
    """Return in what way an array is not what it has to be; None if it is."""
    fits = len(spec.shape) == len(wanted.shape) and all(
        want is _FREE or (isinstance(size, str) if want == _DYNAMIC else size == want)
        for size, want in zip(spec.shape, wanted.shape, strict=True)
    )
    if fits and spec.dtype == wanted.dtype:
        return None
    return f"is {_words(spec.dtype, spec.shape)}, expected {_words(wanted.dtype, wanted.shape)}"


def _wires(manifest: Manifest) -> Iterator[tuple[str, TensorSpec, str, TensorSpec]]:
    """Yield which output becomes which input.

    The giving graph, what it gives, the taking graph, and what that takes.
    """
    probes = [level.level.lower() for level in manifest.probing.levels]
    wires = [("normalize", "image", "backbone", "image")]
    wires += [("backbone", name, "decoder", name) for name in FEATURES]
    wires += [("backbone", name, f"probe_{name}", "feature") for name in probes]
    sources = {"p5": "backbone", **{name: f"probe_{name}" for name in probes}}
    wires += [
        (stage, part, "decoder", f"{part}_{name}")
        for name, stage in sources.items()
        for part in ("anchors", "selected")
    ]
    for giver, output, taker, given in wires:
        first = _named(manifest.graph(giver).outputs, output)
        second = _named(manifest.graph(taker).inputs, given)
        if first is not None and second is not None:
            yield giver, first, taker, second


def _named(specs: tuple[TensorSpec, ...], name: str) -> TensorSpec | None:
    return next((spec for spec in specs if spec.name == name), None)


def _clash(given: TensorSpec, taken: TensorSpec) -> bool:
    """Return whether what is given can never be what is taken: another type, or other sizes."""
    return given.dtype != taken.dtype or any(
        isinstance(one, int) and isinstance(other, int) and one != other
        for one, other in zip(given.shape, taken.shape, strict=True)
    )


def _words(dtype: str, shape: tuple[int | str | None, ...]) -> str:
    sizes = ", ".join("*" if size is _FREE else str(size) for size in shape)
    return f"{dtype} ({sizes})"
