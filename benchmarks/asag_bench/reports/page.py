"""The page of recorded results, and the README's plot, made from the JSON files alone.

    python -m asag_bench.reports.page [--results benchmarks/results] [--plot docs/benchmark.png]

Each result of `asag-bench` among them becomes a section, in the order of their names; what other tools of
the project measured is listed with its command.  The plot shows the first result that has PyTorch among its
peers, and beside it the first that has accuracies.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asag_bench.reports.compare import is_result
from asag_bench.reports.plots import check_plots
from asag_bench.reports.report import markdown
from asag_bench.reports.summary_plot import draw_summary
from asag_deploy.atomic import atomic_write
from asag_deploy.command_line import ALL_FINE, OneSentenceParser, exit_code
from asag_deploy.errors import SourceError

PROGRAM = "asag_bench.reports.page"
RESULTS = Path("benchmarks/results")
PLOT = Path("docs/benchmark.png")
PAGE = "README.md"
_BASELINE = "torch"

Results = Mapping[str, Mapping[str, Any]]
"""JSON values by the name of their file."""


def main(argv: Sequence[str] | None = None) -> int:
    """Write page and plot; returns 0, or 2 with the reason in one sentence on stderr."""
    summary = "Write the page of recorded results, and the README's plot, from the JSON files alone."
    parser = OneSentenceParser(prog=PROGRAM, description=summary)
    add = parser.add_argument
    add("--results", type=Path, default=RESULTS, metavar="DIR", help=f"(default: {RESULTS})")
    add("--plot", type=Path, default=PLOT, metavar="FILE", help=f"(default: {PLOT})")

    def command() -> int:
        options = parser.parse_args(argv)
        return _write(options.results, options.plot)

    return exit_code(PROGRAM, command)


def _write(folder: Path, plot: Path) -> int:
    results = read_results(folder)
    with atomic_write(folder / PAGE) as temporary:
        temporary.write_text(page(results), encoding="utf-8")
    print(f"wrote {folder / PAGE}, of {len(results)} files")
    speed, accuracy = shown(results)
    if speed is not None:
        check_plots()
        measured = None if accuracy is None else results[accuracy]
        with atomic_write(plot) as temporary:
            draw_summary(results[speed], measured, temporary, fingerprint(results))
        print(f"wrote {plot}")
    return ALL_FINE


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Every JSON file of a folder by name; raises SourceError if there are none, or one cannot be read."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            value = None
        if not isinstance(value, dict) or not {"command", "machine"} <= value.keys():
            raise SourceError(
                f"'{path}' is no result of this project's benchmarks; take it out of the folder, "
                "or record it again"
            )
        found[path.name] = value
    if not found:
        raise SourceError(f"there are no results (*.json) in '{folder}'; record some with asag-bench first")
    return found


def page(results: Results) -> str:
    """The page, in Markdown."""
    ours = {name: result for name, result in results.items() if is_result(result)}
    lines = ["# Recorded results", ""]
    lines += ["Written by `python -m asag_bench.reports.page` from the JSON files beside it."]
    lines += ["`asag-bench` explains itself in [benchmarks/README.md](../README.md).", ""]
    if ours:
        lines += ["![Speed by exit level, and accuracy](../../docs/benchmark.png)", ""]
    for name, result in ours.items():
        for line in markdown(result).splitlines():
            lines.append(f"#{line}" if line.startswith("#") else line)
        lines += ["", f"All samples: [{name}]({name})", ""]
    others = {name: result for name, result in results.items() if name not in ours}
    if others:
        lines += [
            "## Other measurements",
            "",
            "| file | command | machine | date |",
            "| --- | --- | --- | --- |",
        ]
        lines += [_row(name, result) for name, result in others.items()]
        lines += ["", "[benchmarks/README.md](../README.md) says what they show.", ""]
    return "\n".join(lines)


def _row(name: str, result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    where = f"{machine['processor']}, {machine['cores']} cores"
    return f"| [{name}]({name}) | `{result['command']}` | {where} | {machine['date']} |"


def shown(results: Results) -> tuple[str | None, str | None]:
    """The names of the results that the plot is drawn from: for speed, and for accuracy; None for none."""
    ours = {name: result for name, result in results.items() if is_result(result)}
    compared = [name for name, result in ours.items() if _BASELINE in result["options"]["peers"]]
    measured = [
        name
        for name, result in ours.items()
        if any(found["ap"] is not None for found in result["accuracy"].values())
    ]
    return next(iter([*compared, *ours]), None), next(iter(measured), None)


def fingerprint(results: Results) -> str:
    """What the plot carries, so that it can be told whether it is of these results."""
    drawn = [None if name is None else results[name] for name in shown(results)]
    return hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
