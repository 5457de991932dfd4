"""Do two runs of `asag-bench` agree within what they claim?

    python -m asag_bench.reports.compare A.json B.json [--tolerance 0.05]

A run calls a row stable when its last three windows agree within 5%.  So two runs of the same command on the
same machine should give the same median for every row that both call stable, within those 5%, and the same
ratios.  Rows that either run calls unstable claim nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asag_bench.measuring.statistics import AGREEMENT
from asag_bench.reports.report import columns
from asag_deploy.command_line import ALL_FINE, SOME_FAILED, OneSentenceParser, exit_code
from asag_deploy.errors import ConfigError, SourceError

PROGRAM = "asag_bench.reports.compare"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One kind of image, batch and subject in both runs: medians in ms, and speeds over the reference."""

    images: str
    batch: int
    subject: str
    stable: bool
    """In both."""
    ms: tuple[float, float]
    speed: tuple[float, float]

    def agrees(self, tolerance: float) -> bool | None:
        """Whether medians and speeds do; None where a run claims nothing."""
        return all(_apart(*pair) <= tolerance for pair in (self.ms, self.speed)) if self.stable else None


def main(argv: Sequence[str] | None = None) -> int:
    """Compare; returns 0 if all stable rows agree, 1 if one does not or none is stable, 2 with the reason for
    wrong input.
    """
    return exit_code(PROGRAM, lambda: _run(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    summary = "Say row by row whether two results of asag-bench agree within what they claim."
    parser = OneSentenceParser(prog=PROGRAM, description=summary)
    parser.add_argument("results", type=Path, nargs=2, metavar="RESULT", help="a result.json")
    parser.add_argument(
        *("--tolerance",), type=float, default=AGREEMENT, metavar="T", help="(default: 0.05, which is 5%%)"
    )
    return parser


def _run(options: argparse.Namespace) -> int:
    tolerance = options.tolerance
    if not 0 <= tolerance < 1:
        raise ConfigError(f"--tolerance is {tolerance:g}; expected a share of at least 0 and less than 1")
    first, second = (read_result(path) for path in options.results)
    rows = rows_of(first, second)
    verdicts = [row.agrees(tolerance) for row in rows]
    print("\n".join(columns(table(rows, verdicts))))
    stable = [verdict for verdict in verdicts if verdict is not None]
    print(f"\n{sum(stable)} of {len(stable)} stable rows agree within {tolerance:.0%}; ", end="")
    print(f"{len(rows) - len(stable)} of all {len(rows)} are not stable and claim nothing")
    return ALL_FINE if stable and all(stable) else SOME_FAILED


def read_result(path: Path) -> dict[str, Any]:
    """A `result.json` of `asag-bench`; raises SourceError for what is none."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"cannot read the result '{path}' ({(error.strerror or '').lower()})") from None
    except ValueError:
        result = None
    if not is_result(result):
        raise SourceError(f"'{path}' is no result of asag-bench; name a result.json that this release wrote")
    found: dict[str, Any] = result
    return found


def is_result(value: object) -> bool:
    """Whether a JSON value is a result of `asag-bench`, of this release."""
    return isinstance(value, dict) and {"strata", "headline", "bundles", "machine"} <= value.keys()


def rows_of(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Row]:
    """The rows of two results, in the order of the first.

    Raises ConfigError if they measured different things, or on different machines.
    """
    for what, one, two in (
        ("processors", *(result["machine"]["processor"] for result in (first, second))),
        ("versions of libraries", *(result["machine"]["packages"] for result in (first, second))),
        ("graphs", *(_graphs(result) for result in (first, second))),
        ("options", *(result["options"] for result in (first, second))),
        ("references", first["reference"], second["reference"]),
        ("rows", *([key for key, _, _ in _subjects(result)] for result in (first, second))),
    ):
        if one != two:
            raise ConfigError(
                f"the two results are of different {what}, so that nothing says they should agree; "
                "compare two runs of one command on one machine"
            )
    pairs = zip(_subjects(first), _subjects(second), strict=True)
    return [
        _row(key, stable and other_stable, one, two) for (key, stable, one), (_, other_stable, two) in pairs
    ]


def _row(key: tuple[str, int, str], stable: bool, one: Mapping[str, Any], two: Mapping[str, Any]) -> Row:
    images, batch, subject = key
    medians = [found["ms"].get("p50", found["ms"]["mean"]) for found in (one, two)]
    speeds = [found["times_as_fast_as_the_reference"]["median"] for found in (one, two)]
    return Row(
        images=images,
        batch=batch,
        subject=subject,
        stable=stable,
        ms=(medians[0], medians[1]),
        speed=(speeds[0], speeds[1]),
    )


def table(rows: Sequence[Row], verdicts: Sequence[bool | None]) -> list[tuple[str, ...]]:
    """The comparison under a title, one row each."""
    words = {True: "yes", False: "NO", None: "not stable"}
    lines: list[tuple[str, ...]] = [
        ("images", "batch", "subject", "ms", "ms again", "apart", "speed", "again", "apart", "agrees")
    ]
    for row, verdict in zip(rows, verdicts, strict=True):
        ms = (f"{row.ms[0]:.1f}", f"{row.ms[1]:.1f}", f"{_apart(*row.ms):.1%}")
        speed = (f"{row.speed[0]:.2f}", f"{row.speed[1]:.2f}", f"{_apart(*row.speed):.1%}")
        lines.append((row.images, str(row.batch), row.subject, *ms, *speed, words[verdict]))
    return lines


def _subjects(result: Mapping[str, Any]) -> Iterator[tuple[tuple[str, int, str], bool, Mapping[str, Any]]]:
    for stratum in result["strata"]:
        for name, subject in stratum["subjects"].items():
            yield (stratum["images"], stratum["batch"], name), subject["stable"], subject


def _graphs(result: Mapping[str, Any]) -> dict[str, Any]:
    return {name: bundle["graphs"] for name, bundle in result["bundles"].items()}


def _apart(one: float, other: float) -> float:
    return max(one, other) / min(one, other) - 1


if __name__ == "__main__":
    sys.exit(main())
