"""The page of recorded results, and the plot of docs/speed.md, made from the JSON files alone.

Each result of `asag-bench run` among them becomes a section, in the order of their names; what else was
measured, such as the reports of GPU machines, is listed with its command; what opening a data set took has a
section too.  The plot shows the first result
that has PyTorch among its references, and beside it the first that has accuracies.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asag_bench.reports.annotations import is_opening, section
from asag_bench.reports.plots import draw_summary
from asag_bench.reports.report import markdown
from asag_bench.result import Machine, Result, is_result, parse_machine, parse_result
from asag_deploy.atomic import atomic_write, atomic_write_text
from asag_deploy.errors import FieldError, SourceError, plural
from asag_deploy.replacing import check_own_file
from asag_evaluation.plots import check_plots

RESULTS = Path("benchmarks/results")
PLOT = Path("docs/benchmark.png")
PAGE = "README.md"
_OF_THEIR_TIME = (
    "Commands are those of the day on which a result was recorded: what `python -m asag_bench.throughput`, "
    "`.training_step` and `.runtime_cost` did there, `asag-bench throughput`, `training-step` and (with "
    "other options) `run` do now, and `asag-bench BUNDLE --peer` is `asag-bench run BUNDLE --reference`."
)
_WRITTEN_BY = "Written by `asag-bench page` from the JSON files beside it."
_FINGERPRINT = re.compile(rb"tEXtDescription\0[0-9a-f]{64}")
_NEAR = 4096
"""Bytes from the start of a file that it is known by."""
_PYTORCH = "torch"
_GPU_RUN = "python benchmarks gpu run"
"""The command of a report that does not say with which options."""


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A file of the folder."""

    data: Mapping[str, Any]
    """As it was written."""
    command: str
    machine: Machine
    result: Result | None
    """None for what is no run of the bench."""


def write_page(folder: Path, plot: Path) -> list[str]:
    """Write the page into the folder, and the plot; return what was done, in lines.

    Raises SourceError for a folder without results, ConfigError if plots cannot be drawn, OutputError where
    something else stands in the place of the page or the plot.
    """
    results = read_results(folder)
    check_own_file(folder / PAGE, _is_page, "the page of recorded results")
    check_own_file(plot, _is_plot, "the plot of recorded results")
    atomic_write_text(folder / PAGE, page(results))
    done = [f"wrote {folder / PAGE}, of {plural(len(results), 'file')}"]
    speed, accuracy = (None if name is None else results[name].result for name in shown(results))
    if speed is not None:
        check_plots("asag-bench")
        with atomic_write(plot) as temporary:
            draw_summary(speed, accuracy, temporary, fingerprint(results))
        done.append(f"wrote {plot}")
    return done


def _is_page(path: Path) -> bool:
    return _WRITTEN_BY.encode() in path.read_bytes()[:_NEAR]


def _is_plot(path: Path) -> bool:
    return _FINGERPRINT.search(path.read_bytes()[:_NEAR]) is not None


def read_results(folder: Path) -> dict[str, Recorded]:
    """Read every JSON file of a folder; raises SourceError if there are none, or one cannot be read."""
    found = {path.name: _read(path) for path in sorted(folder.glob("*.json"))}
    if not found:
        raise SourceError(f"there are no results (*.json) in '{folder}'; record some with asag-bench first")
    return found


def _read(path: Path) -> Recorded:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        machine = parse_machine(data["machine"])
        typed = data["machine"].get("command", _GPU_RUN) if _is_report(data) else data["command"]
        command = str(typed)
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError, FieldError):
        raise SourceError(
            f"'{path}' is no result of this project's benchmarks; take it out of the folder, "
            "or record it again"
        ) from None
    result = parse_result(data, path) if is_result(data) else None
    return Recorded(data=data, command=command, machine=machine, result=result)


def _is_report(data: Mapping[str, Any]) -> bool:
    """Tell whether it is a report of a GPU machine, whose page lies beside it."""
    return "steps" in data


def page(results: Mapping[str, Recorded]) -> str:
    """Return the page, in Markdown."""
    ours = {name: recorded.result for name, recorded in results.items() if recorded.result is not None}
    lines = ["# Recorded results", "", _WRITTEN_BY]
    lines += ["`asag-bench` explains itself in [benchmarks/README.md](../README.md).", "", _OF_THEIR_TIME, ""]
    if ours:
        lines += ["![Speed by exit level, and accuracy](../../docs/benchmark.png)", ""]
    for name, result in ours.items():
        for line in markdown(result).splitlines():
            lines.append(f"#{line}" if line.startswith("#") else line)
        lines += ["", f"All samples: [{name}]({name})", ""]
    others = {name: recorded for name, recorded in results.items() if name not in ours}
    if others:
        lines += [
            "## Other measurements",
            "",
            "| file | command | machine | date |",
            "| --- | --- | --- | --- |",
        ]
        for name, recorded in others.items():
            machine, file = recorded.machine, f"[{name}]({name})"
            known = [machine.operators_in_words] if machine.operators_in_words is not None else []
            where = ", ".join([machine.processor, f"{machine.cores} cores", *known])
            if _is_report(recorded.data):
                where = str(recorded.data["machine"].get("gpu", where))
                file += f", [its page]({Path(name).with_suffix('.md')})"
            elif "seeds" in recorded.data:
                file += f", [its page]({Path(name).with_suffix('.md')})"
            elif "contenders" in recorded.data:
                file += ", [what it shows](../../docs/front.md#results)"
            lines.append(f"| {file} | `{recorded.command}` | {where} | {machine.date} |")
        lines += ["", "[benchmarks/README.md](../README.md) says what they show.", ""]
        for recorded in others.values():
            if is_opening(recorded.data):
                lines += section(recorded.data)
    return "\n".join(lines)


def shown(results: Mapping[str, Recorded]) -> tuple[str | None, str | None]:
    """Return the names of the results that the plot is drawn from: for speed, and for accuracy."""
    ours = {name: recorded.result for name, recorded in results.items() if recorded.result is not None}
    compared = [name for name, result in ours.items() if _PYTORCH in result.options.references]
    measured = [name for name, result in ours.items() if result.has_accuracy]
    return next(iter([*compared, *ours]), None), next(iter(measured), None)


def fingerprint(results: Mapping[str, Recorded]) -> str:
    """Return what the plot carries, so that it can be told whether it is of these results."""
    drawn = [None if name is None else results[name].data for name in shown(results)]
    return hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()
