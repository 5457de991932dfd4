"""A run of `asag-bench throughput` as people read it."""

from __future__ import annotations

from asag_bench.measuring.throughput import CONFIDENT
from asag_bench.reports.columns import in_markdown
from asag_bench.result import ThroughputResult


def rows(result: ThroughputResult) -> list[list[str]]:
    """Return the table, under its title."""
    table = [["method", "images/s", "times as fast", "middle half", "as", "detections", "stable"]]
    for name, method in result.methods.items():
        speed = method.times_as_fast
        table.append(
            [
                name,
                f"{method.images_per_second:.3g}",
                f"{speed.median:.2f}",
                f"{speed.p25:.2f} to {speed.p75:.2f}",
                method.compared_with,
                str(method.detections),
                "yes" if method.stable else "NO",
            ]
        )
    return table


def markdown(result: ThroughputResult) -> str:
    """Return the whole result as a page."""
    bundle, machine, given = result.bundle, result.machine, result.input
    shapes = given.network_shapes
    seen = shapes[0] if len(shapes) == 1 else f"{len(shapes)} shapes"
    levels = ", ".join(f"{level} {count}" for level, count in sorted(given.exit_levels.items()))
    lines = [
        f"# Throughput: {bundle.variant}, {bundle.precision}, {result.backend}, {seen}",
        "",
        f"`{result.command}`",
        "",
        f"- {machine.processor}, {machine.cores} cores, {machine.memory_gib} GiB, {machine.date}",
        f"- {', '.join(f'{name} {version}' for name, version in machine.packages.items())}",
        *([] if machine.operators_in_words is None else [f"- {machine.operators_in_words}"]),
        f"- {'trained' if bundle.trained else 'UNTRAINED'} weights; exit levels: {levels}",
        f"- {given.pictures} pictures ({given.origin}), {given.repeated} times a round",
        "",
        *in_markdown(rows(result)),
        "",
        "- times as fast: the time of the method it is compared with over its own in the same round",
        f"- detections: those of confidence {CONFIDENT} or more in all pictures, in a run before",
        "- stable: the last three rounds agree within 5%",
        *(f"- skipped: {reason}" for reason in given.skipped),
    ]
    return "\n".join([*lines, ""])
