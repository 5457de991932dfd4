"""The parity report as a table on a terminal."""

from __future__ import annotations

from asag_export.gate import ParityReport


def format_report(report: ParityReport) -> str:
    """A few lines of plain text: every output of every graph, then the runs end to end."""
    lines = [
        f"Parity with PyTorch, {report.backend}, {report.precision} (decisions: entries that differ)",
        f"  {'graph':<10} {'output':<14} {'difference':>11} {'allowed':>9} {'cases':>6}",
    ]
    for row in report.stages:
        verdict = "" if row.passed else "  FAILED"
        numbers = f"{row.difference:>11.2e} {row.tolerance:>9.1e} {row.cases:>6}"
        lines.append(f"  {row.stage:<10} {row.output:<14} {numbers}{verdict}")
    lines.append(f"  {'end to end':<26} {'stops':<8} {'same detections':>16}")
    for run in report.runs:
        verdict = "" if run.passed else "  FAILED"
        same = "same" if run.same_stops else "differ"
        lines.append(f"  {run.case:<26} {same:<8} {run.agreement:>16.1%}{verdict}   ({', '.join(run.stops)})")
    lines.append("  passed" if report.passed else "  FAILED")
    return "\n".join(lines)
