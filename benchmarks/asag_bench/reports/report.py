"""A run as people read it: on the screen, and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from asag_bench.reports.columns import in_markdown, latency_rows, percent, phase_rows, times
from asag_bench.reports.columns import on_screen as table_on_screen
from asag_bench.reports.plots import PLOTS, write_plots
from asag_bench.result import Headline, Result, Spread, json_text
from asag_deploy.atomic import atomic_write_text
from asag_deploy.errors import plural
from asag_deploy.replacing import check_own_folder, is_json_with
from asag_evaluation.plots import check_plots

_PARITY = {True: "parity passed", False: "parity NOT PASSED", None: "no parity report"}


FIGURES = "figures of asag-bench"
_RESULT, _PAGE = "result.json", "result.md"


def check_report(output_dir: Path) -> None:
    """Raise OutputError if `write_report` would replace what it has not written."""
    check_own_folder(
        output_dir, (_RESULT, _PAGE, *PLOTS), is_json_with("command", "machine", "strata"), FIGURES
    )


def write_report(result: Result, output_dir: Path, *, plots: bool) -> None:
    """Write `result.json`, `result.md` and the plots.

    Raises OutputError if a file cannot be written, ConfigError if plots cannot be drawn.
    """
    for name, text in ((_RESULT, json_text(result)), (_PAGE, markdown(result))):
        atomic_write_text(output_dir / name, text)
    if plots:
        check_plots("asag-bench")
        write_plots(result, output_dir)


def on_screen(result: Result) -> str:
    """Return the whole result in columns."""
    lines = [
        *_introduction(result),
        "",
        *sentences(result.headline),
        "",
        *table_on_screen(latency_rows(result)),
        "",
        *table_on_screen(phase_rows(result)),
        "",
        *_notes(result),
    ]
    return "\n".join(lines)


def markdown(result: Result) -> str:
    """Return the whole result as a page."""
    lines = [f"# {result.title}", "", f"`{result.command}`", ""]
    lines += [*(f"- {line}" for line in _introduction(result)), "", "## In short", ""]
    lines += [*(f"- {line}" for line in sentences(result.headline)), "", "## Latency", ""]
    lines += [*in_markdown(latency_rows(result)), "", "## Where the time goes", ""]
    lines += [*in_markdown(phase_rows(result)), "", "## Notes", ""]
    return "\n".join([*lines, *(f"- {line}" for line in _notes(result)), ""])


def sentences(headline: Headline) -> Iterator[str]:
    """Yield the headline as people read it, one line a figure."""
    for name, found in headline.runners.items():
        if name != headline.baseline:
            speeds = ", ".join(f"{level} {times(speed)}" for level, speed in found.times_as_fast.items())
            accuracy = "" if found.ap is None else f"; AP {percent(found.ap)}"
            yield f"{name}: times as fast as {headline.baseline}: {speeds}{accuracy}"
    for name, found in headline.runners.items():
        if found.after_the_neck:
            rest = ", ".join(f"{level} {_share(s)}" for level, s in found.after_the_neck.items())
            yield f"{name}: everything after the neck, on top of backbone and neck: {rest}"
        if found.probing_costs is not None:
            yield f"{name}: probing costs {_share(found.probing_costs)} more than stopping at P5"
        if found.loop_ms is not None and found.after_the_neck:
            yield f"{name}: the loop's own overhead: {found.loop_ms:.2f} ms at most"
    first = next(iter(headline.runners))
    for name, ratios in headline.compared.items():
        longer = ", ".join(f"{level} {times(ratio)}" for level, ratio in ratios.items())
        yield f"{name}, random weights: times as long as {first}: {longer}"


def _share(found: Spread) -> str:
    return f"{found.median:.1%} ({found.p25:.1%} to {found.p75:.1%})"


def _introduction(result: Result) -> Iterator[str]:
    machine, given = result.machine, result.input
    for name, bundle in result.bundles.items():
        weights = "trained" if bundle.trained else "UNTRAINED"
        yield (
            f"{name}: {bundle.variant}, {bundle.computed_in}, {weights} weights, "
            f"{_PARITY[bundle.parity_passed]}, to {bundle.deepest_level}, {bundle.mode} mode"
        )
    clock = machine.clock_mhz
    speed = f", {clock[0]:.0f} to {clock[1]:.0f} MHz" if clock else ""
    cores = plural(machine.cores, "core")
    yield f"{machine.processor}, {cores}{speed}, {machine.memory_gib} GiB, {machine.date}"
    yield ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    if machine.operators_in_words is not None:
        yield machine.operators_in_words
    levels = ", ".join(f"{level} {count}" for level, count in given.exit_levels.items())
    yield f"{plural(given.pictures, 'picture')} ({given.origin}); exit levels: {levels}"


def _notes(result: Result) -> Iterator[str]:
    """Yield what a reader has to know about the figures."""
    first = next(iter(result.groups[0].runners))
    yield "phases: median ms (share of the whole call, and of backbone and neck alone where these were timed)"
    yield f"ratio: time over that of {first} for the same images in the same round, with the middle half"
    yield (
        f"times as fast as {result.baseline}: its time over that of the row, likewise; everything after "
        "the neck: from the normalised picture to detections, beyond backbone and neck alone, likewise"
    )
    yield from _detector_notes(result)
    yield from _agreement_notes(result)
    unstable = [group for group in result.groups if not group.stable]
    for group in unstable:
        names = [name for name, figures in group.runners.items() if not figures.stable]
        yield (
            f"NOT STABLE: {group.title}, batch {group.batch}: {', '.join(names)}; the last "
            "three windows differ by more than 5%, or there were fewer"
        )
    if not unstable:
        yield "stable: in every row, the medians of the last three windows agree within 5%"
    for name, found in () if result.memory.has_load_times else result.memory.runners.items():
        yield f"memory of {name}: {found.added_mib:.0f} MiB more when loaded and warmed up"
    if result.memory.has_load_times:
        yield "load s, MiB: seconds to open, verify and load, and memory added by that and the first call"
    yield f"peak memory of the process, with everything loaded: {result.memory.peak_mib:.0f} MiB"
    if result.options.memory_images:
        yield f"growth MiB: of {result.options.memory_images} pictures of many sizes, after the first 20"
    for name, accuracy in result.accuracy.items():
        values = {"AP": accuracy.ap, "AP50": accuracy.ap50, "AP75": accuracy.ap75}
        figures = ", ".join(f"{key} {percent(value)}" for key, value in values.items())
        yield f"accuracy of {name}: {figures} on {plural(accuracy.images, 'image')}"
    yield from result.notes


def _detector_notes(result: Result) -> Iterator[str]:
    """Yield the detector's options that are not the usual ones."""
    options = result.options
    asked = {
        "--max-level": options.max_level,
        "--deadline-ms": None if options.deadline_ms is None else f"{options.deadline_ms:g}",
        "--loop": None if options.loop == "auto" else options.loop,
        "--requests": None if options.requests == 1 else options.requests,
    }
    given = [f"{option} {value}" for option, value in asked.items() if value is not None]
    if given:
        yield f"the detector was loaded with {', '.join(given)}"


def _agreement_notes(result: Result) -> Iterator[str]:
    agreement = result.agreement
    if agreement is None:
        return
    for name, found in agreement.runners.items():
        bundle = result.bundles[name]
        rounded = bundle.computed_in != "fp32"
        fine = rounded or found.detections >= agreement.least_in_float32
        verdict = "agrees" if fine else "DIFFERENT"
        noise = "; of untrained weights rounding changes nearly all" if rounded and not bundle.trained else ""
        yield (
            f"{verdict}: {name} finds {percent(found.detections)}% of what "
            f"{agreement.compared_with} finds (same class, score within 0.01, IoU above 0.9); "
            f"{found.same_stops} of {found.pictures} pictures stop at the same level{noise}"
        )
