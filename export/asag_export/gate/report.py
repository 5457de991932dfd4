"""The parity report as a table on a terminal."""

from __future__ import annotations

from asag_export.gate.parity import ParityReport, StageParity


def format_report(report: ParityReport) -> str:
    """A few lines of plain text: every output of every graph, the checks, then the runs end to end."""
    lines = [
        f"Parity with PyTorch, {report.backend}, {report.precision} (decisions: entries that differ)",
        f"  {'graph':<10} {'output':<14} {'difference':>11} {'allowed':>9} {'cases':>6}",
    ]
    lines += [_row(row) for row in report.stages]
    for check in report.checks:
        holds = [row.stage for row in check.rows if row.passed]
        lines.append(f"  {check.name:<14} holds for {', '.join(holds) or 'no graph'}")
        lines += [_row(row) for row in check.rows if not row.passed]
    lines.append(f"  {'end to end':<26} {'stops':<8} {'same detections':>16}")
    for run in report.runs:
        verdict = "" if run.passed else "  FAILED"
        same = "same" if run.same_stops else "differ"
        lines.append(f"  {run.case:<26} {same:<8} {run.agreement:>16.1%}{verdict}   ({', '.join(run.stops)})")
    lines.append("  passed" if report.passed else "  FAILED")
    return "\n".join(lines)


def _row(row: StageParity) -> str:
    verdict = "" if row.passed else "  FAILED"
    numbers = f"{row.difference:>11.2e} {row.tolerance:>9.1e} {row.cases:>6}"
    return f"  {row.stage:<10} {row.output:<14} {numbers}{verdict}"
