"""The parity report on the screen."""

from __future__ import annotations

import dataclasses

from asag_export.gate.parity import Check, ParityReport, RunParity, StageParity, format_report

ROW = StageParity(stage="decoder", output="logits", difference=1.5e-4, tolerance=2e-3, cases=12, passed=True)
RUN = RunParity(
    case="320x416 to P3",
    stops=("last level", "nothing selected"),
    same_stops=True,
    agreement=0.985,
    passed=True,
)


CHECK = Check(name="identical rows", rows=(ROW, dataclasses.replace(ROW, stage="backbone", output="p4")))


def report(*, stage_passes: bool = True, run_passes: bool = True) -> ParityReport:
    row = dataclasses.replace(ROW, stage="backbone", output="counts", difference=3.0, passed=stage_passes)
    run = dataclasses.replace(RUN, case="225x190 fast", same_stops=run_passes, passed=run_passes)
    return ParityReport(backend="onnxruntime", precision="fp16", stages=[ROW, row], runs=[RUN, run])


def test_passed() -> None:
    lines = format_report(report()).splitlines()
    assert "onnxruntime, fp16" in lines[0]
    assert lines[-1].strip() == "passed"
    assert "FAILED" not in "\n".join(lines)
    (row,) = (line for line in lines if "logits" in line)
    assert row.split() == ["decoder", "logits", "1.50e-04", "2.0e-03", "12"]
    (run,) = (line for line in lines if "320x416" in line)
    assert "same" in run
    assert "98.5%" in run
    assert "(last level, nothing selected)" in run


def test_failed_stage() -> None:
    failing = report(stage_passes=False)
    assert not failing.passed
    lines = format_report(failing).splitlines()
    assert [line.split()[0] for line in lines if "FAILED" in line] == ["backbone", "FAILED"]


def test_failed_run() -> None:
    failing = report(run_passes=False)
    assert not failing.passed
    lines = format_report(failing).splitlines()
    assert [line.split()[0] for line in lines if "FAILED" in line] == ["225x190", "FAILED"]
    assert "differ" in next(line for line in lines if "225x190" in line)


def test_checks() -> None:
    found = dataclasses.replace(report(), checks=[CHECK])
    assert "  identical rows holds for decoder, backbone" in format_report(found).splitlines()
    wrong = dataclasses.replace(CHECK, rows=(ROW, dataclasses.replace(CHECK.rows[1], passed=False)))
    failing = dataclasses.replace(found, checks=[wrong])
    assert not failing.passed
    assert list(failing.failures()) == [("identical rows", wrong.rows[1])]
    lines = format_report(failing).splitlines()
    assert "  identical rows holds for decoder" in lines
    assert [line.split()[:2] for line in lines if "FAILED" in line] == [["backbone", "p4"], ["FAILED"]]


def test_verdict_is_of_every_row_and_run() -> None:
    assert report().passed
    assert report().to_dict()["passed"] is True
    assert report(run_passes=False).to_dict()["passed"] is False
    assert report(stage_passes=False).to_dict()["stages"][1]["passed"] is False
