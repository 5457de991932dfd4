"""A run as people read it: on the screen, and as Markdown.  Both are made from the JSON that is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from asag_bench.measuring.phases import PHASES
from asag_bench.reports.headline import sentences

Row = Sequence[str]

_PARITY = {True: "parity passed", False: "parity NOT PASSED", None: "no parity report"}


def latency_rows(result: Mapping[str, Any]) -> list[Row]:
    """One row for each kind of image, batch and subject, under a title."""
    names = [f"p{q:g}" for q in result["options"]["percentile"]]
    agreement = _agreements(result)
    with_accuracy = any(value["ap"] is not None for value in result["accuracy"].values())
    rows: list[Row] = [
        (
            *("images", "batch", "subject", "calls", *(f"{name} ms" for name in names), "max ms", "images/s"),
            *("ratio", f"times as fast as {result['reference']}"),
            *(["AP"] if with_accuracy else []),
            "parity",
            *(["agrees"] if agreement else []),
            "stable",
        )
    ]
    for stratum in result["strata"]:
        for name, subject in stratum["subjects"].items():
            ms = subject["ms"]
            accuracy = result["accuracy"].get(name, {}).get("ap")
            rows.append(
                (
                    _stratum_name(stratum),
                    str(stratum["batch"]),
                    name,
                    str(subject["calls"]),
                    *(f"{ms[percentile]:.1f}" for percentile in names),
                    f"{ms['max']:.1f}",
                    f"{subject['images_per_second']:.2f}",
                    _times(subject["times_as_long_as_the_first"]),
                    _times(subject["times_as_fast_as_the_reference"]),
                    *([_percent(accuracy)] if with_accuracy else []),
                    _parity(result, name),
                    *([_percent(agreement.get(name, {}).get("detections"))] if agreement else []),
                    "yes" if subject["stable"] else "NO",
                )
            )
    return rows


def _parity(result: Mapping[str, Any], name: str) -> str:
    """What the bundle of a subject says of its parity with PyTorch; nothing for peers."""
    passed = result["bundles"].get(name, {}).get("parity_passed")
    return {True: "passed", False: "NOT PASSED", None: "-"}[passed]


def _agreements(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """By subject; nothing in results of releases that did not look."""
    found: Mapping[str, Any] = result.get("agreement", {}).get("subjects", {})
    return found


def phase_rows(result: Mapping[str, Any]) -> list[Row]:
    """Where the time goes: median milliseconds of each phase, with its share of the whole, and of backbone
    and neck alone where these could be timed."""
    all_phases = [s["phases_ms"] for stratum in result["strata"] for s in stratum["subjects"].values()]
    columns = [phase for phase in PHASES if any(phases and phase in phases for phases in all_phases)]
    rows: list[Row] = [("images", "batch", "subject", "backbone + neck alone", *columns)]
    for stratum in result["strata"]:
        for name, subject in stratum["subjects"].items():
            if subject["phases_ms"]:
                alone = subject["backbone_and_neck_ms"]
                phases = (_phase(subject, phase) for phase in columns)
                known = "-" if alone is None else f"{alone:.1f}"
                rows.append((_stratum_name(stratum), str(stratum["batch"]), name, known, *phases))
    return rows


def _phase(subject: Mapping[str, Any], phase: str) -> str:
    """`ms (share of the whole, share of backbone and neck)`."""
    if phase not in subject["phases_ms"]:
        return "-"
    shares = [subject["share_of_total"][phase]]
    shares += [subject["share_of_backbone_and_neck"][phase]] if subject["share_of_backbone_and_neck"] else []
    return f"{subject['phases_ms'][phase]:.4g} ({', '.join(map(_share, shares))})"


def _times(found: Mapping[str, float]) -> str:
    return f"{found['median']:.2f} ({found['p25']:.2f} to {found['p75']:.2f})"


def _share(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"


def on_screen(result: Mapping[str, Any]) -> str:
    """The whole result in columns."""
    lines = [
        *_introduction(result),
        "",
        *sentences(result["headline"]),
        "",
        *columns(latency_rows(result)),
        "",
    ]
    return "\n".join([*lines, *columns(phase_rows(result)), "", *_notes(result)])


def markdown(result: Mapping[str, Any]) -> str:
    """The whole result as a page."""
    lines = [f"# {title(result)}", "", f"`{result['command']}`", ""]
    lines += [*(f"- {line}" for line in _introduction(result)), "", "## In short", ""]
    lines += [*(f"- {line}" for line in sentences(result["headline"])), "", "## Latency", ""]
    lines += [*markdown_table(latency_rows(result)), "", "## Where the time goes", ""]
    lines += [*markdown_table(phase_rows(result)), "", "## Notes", ""]
    return "\n".join([*lines, *(f"- {line}" for line in _notes(result)), ""])


def title(result: Mapping[str, Any]) -> str:
    """Network, precisions, and the shapes at which pictures reach the network."""
    precisions = dict.fromkeys(bundle["computed_in"] for bundle in result["bundles"].values())
    shapes = dict.fromkeys(shape for stratum in result["strata"] for shape in stratum["network_shapes"])
    seen = next(iter(shapes)) if len(shapes) == 1 else f"{len(shapes)} shapes"
    return f"{result['bundle']['variant']}, {', '.join(precisions)}, {seen}"


def _introduction(result: Mapping[str, Any]) -> Iterator[str]:
    machine = result["machine"]
    for name, bundle in result["bundles"].items():
        weights = "trained" if bundle["trained"] else "UNTRAINED"
        yield (
            f"{name}: {bundle['variant']}, {bundle['computed_in']}, {weights} weights, "
            f"{_PARITY[bundle['parity_passed']]}, to {bundle['deepest_level']}, "
            f"{bundle['mode']} mode"
        )
    clock = machine.get("clock_mhz")
    yield (
        f"{machine['processor']}, {machine['cores']} cores"
        f"{f', {clock[0]:.0f} to {clock[1]:.0f} MHz' if clock else ''}, {machine['memory_gib']} GiB, "
        f"{machine['date']}"
    )
    yield ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    histogram = ", ".join(f"{level} {count}" for level, count in result["input"]["exit_levels"].items())
    yield f"{result['input']['pictures']} pictures ({result['input']['origin']}); exit levels: {histogram}"


def _notes(result: Mapping[str, Any]) -> Iterator[str]:
    """What a reader has to know about these figures."""
    first = next(iter(result["strata"][0]["subjects"]))
    yield "phases: median ms (share of the whole call, and of backbone and neck alone where these were timed)"
    yield f"ratio: time over that of {first} for the same images in the same round, with the middle half"
    yield (
        f"times as fast as {result['reference']}: its time over that of the row, likewise; everything after "
        "the neck: from the normalised picture to detections, beyond backbone and neck alone, likewise"
    )
    yield from _agreement_notes(result)
    unstable = [stratum for stratum in result["strata"] if not stratum["stable"]]
    for stratum in unstable:
        names = [name for name, subject in stratum["subjects"].items() if not subject["stable"]]
        yield (
            f"NOT STABLE: {_stratum_name(stratum)}, batch {stratum['batch']}: {', '.join(names)}; the last "
            "three windows differ by more than 5%, or there were fewer"
        )
    if not unstable:
        yield "stable: in every row, the medians of the last three windows agree within 5%"
    for name, subject in result["memory"]["subjects"].items():
        yield f"memory of {name}: {subject['added_mib']:.0f} MiB more when loaded and warmed up"
    yield f"peak memory of the process, with everything loaded: {result['memory']['peak_mib']:.0f} MiB"
    for name, values in result["accuracy"].items():
        figures = ", ".join(f"{key} {_percent(values[key.lower()])}" for key in ("AP", "AP50", "AP75"))
        yield f"accuracy of {name}: {figures} on {values['images']} images"
    yield from result["notes"]


def _agreement_notes(result: Mapping[str, Any]) -> Iterator[str]:
    for name, found in _agreements(result).items():
        reference, least = result["agreement"]["with"], result["agreement"]["least_in_float32"]
        bundle = result["bundles"][name]
        rounded = bundle["computed_in"] != "fp32"
        verdict = "agrees" if rounded or found["detections"] >= least else "DIFFERENT"
        noise = (
            "; of untrained weights rounding changes nearly all" if rounded and not bundle["trained"] else ""
        )
        yield (
            f"{verdict}: {name} finds {_percent(found['detections'])}% of what "
            f"{reference} finds (same class, score within 0.01, IoU above 0.9); {found['same_stops']} of "
            f"{found['pictures']} pictures stop at the same level{noise}"
        )


def _stratum_name(stratum: Mapping[str, Any]) -> str:
    return f"{stratum['images']}{' (manual stop)' if stratum['manual_stop'] else ''}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def columns(rows: Sequence[Row]) -> list[str]:
    """Lines of a table under its title, for a screen; numbers stand at the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    left = {i for i, title in enumerate(rows[0]) if title in ("images", "subject")}
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def markdown_table(rows: Sequence[Row]) -> list[str]:
    """Lines of a table under its title, for a page."""
    head, *body = rows
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]
