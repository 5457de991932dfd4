"""The few figures that a run is looked at for, taken from its result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from asag_bench.runners.peers import is_random

Spread = Mapping[str, float]
"""`median`, `p25` and `p75` over rounds."""


def headline(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a run found, in few figures, as plain JSON values: those of its smallest batch.

    reference                what speeds are compared with
    subjects, by name        `times_as_fast` and `after_the_neck` by kind of image, each a median with p25 and
                             p75; `loop_ms`, the most of any kind; `probing_costs`, by how much longer the
                             deepest images take than when stopped at P5; `ap`; None for what was not measured
    six_layers, by peer      how many times as long as the first subject it took, by kind of image
    """
    least = min(stratum["batch"] for stratum in result["strata"])
    strata = [stratum for stratum in result["strata"] if stratum["batch"] == least]
    names = dict.fromkeys(name for stratum in strata for name in stratum["subjects"])
    stopped = {other for stratum in strata for other in stratum["compared"].values()}
    return {
        "batch": least,
        "reference": result["reference"],
        "subjects": {name: _of_subject(name, strata, result) for name in names if name not in stopped},
        "six_layers": {
            name: {s["images"]: s["subjects"][name]["times_as_long_as_the_first"] for s in strata}
            for name in filter(is_random, result["options"]["peers"])
        },
    }


def _of_subject(name: str, strata: list[Mapping[str, Any]], result: Mapping[str, Any]) -> dict[str, Any]:
    found = {
        stratum["images"]: stratum["subjects"][name] for stratum in strata if name in stratum["subjects"]
    }
    phases = [subject["phases_ms"] for subject in found.values()]
    # Where the stages are not among the phases, the GPU runs them by itself, and `loop` is all of them.
    loops = [of_each["loop"] for of_each in phases if {"backbone", "loop"} <= of_each.keys()]
    costs = next((s["probing_costs"][name] for s in strata if name in s["probing_costs"]), None)
    return {
        "times_as_fast": {level: s["times_as_fast_as_the_reference"] for level, s in found.items()},
        "after_the_neck": {level: s["after_the_neck"] for level, s in found.items() if s["after_the_neck"]},
        "loop_ms": max(loops) if loops else None,
        "probing_costs": None if costs is None else {key: round(x - 1, 4) for key, x in costs.items()},
        "ap": result["accuracy"].get(name, {}).get("ap"),
    }


def sentences(found: Mapping[str, Any]) -> Iterator[str]:
    """The headline as people read it, one line a figure."""
    reference = found["reference"]
    for name, subject in found["subjects"].items():
        if name == reference:
            continue
        speeds = ", ".join(f"{level} {_times(speed)}" for level, speed in subject["times_as_fast"].items())
        accuracy = "" if subject["ap"] is None else f"; AP {100 * subject['ap']:.1f}"
        yield f"{name}: times as fast as {reference}: {speeds}{accuracy}"
    for name, subject in found["subjects"].items():
        if subject["after_the_neck"]:
            rest = ", ".join(f"{level} {_share(s)}" for level, s in subject["after_the_neck"].items())
            yield f"{name}: everything after the neck, on top of backbone and neck: {rest}"
        if subject["probing_costs"] is not None:
            yield f"{name}: probing costs {_share(subject['probing_costs'])} more than stopping at P5"
        if subject["loop_ms"] is not None and subject["after_the_neck"]:
            yield f"{name}: the loop's own overhead: {subject['loop_ms']:.2f} ms at most"
    first = next(iter(found["subjects"]))
    for name, ratios in found["six_layers"].items():
        longer = ", ".join(f"{level} {_times(ratio)}" for level, ratio in ratios.items())
        yield f"{name}, six layers with random weights: times as long as {first}: {longer}"


def _times(found: Spread) -> str:
    return f"{found['median']:.2f} ({found['p25']:.2f} to {found['p75']:.2f})"


def _share(found: Spread) -> str:
    return f"{found['median']:.1%} ({found['p25']:.1%} to {found['p75']:.1%})"
