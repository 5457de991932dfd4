"""docs/speed.md begins with what was recorded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from asag_bench.reports import page

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
RECORDED = ROOT / "benchmarks" / "results"
ROWS = {
    "float32": "openvino fp32",
    "bfloat16 (`openvino-bf16`)": "openvino-bf16 fp32",
    "INT8": "openvino int8",
    "INT8 and bfloat16": "openvino-bf16 int8",
    "PyTorch in bfloat16 (autocast)": "torch-bf16",
}
"""By the first cell of a row of the page's table, the runner."""


@pytest.fixture(scope="module")
def recorded() -> str:
    """The first section of the page of recorded results, which the table is of."""
    text = (RECORDED / page.PAGE).read_text(encoding="utf-8")
    return text.split("\n## ")[1]


@pytest.mark.parametrize("row", ROWS)
def test_speeds(row: str, recorded: str) -> None:
    found = re.search(rf"^- {re.escape(ROWS[row])}: times as fast as torch: (.*)$", recorded, re.MULTILINE)
    assert found is not None
    speeds = [float(number) for number in re.findall(r"P\d ([\d.]+) ", found[1])]
    assert len(speeds) == 3
    for number, speed in zip(cells(row), speeds, strict=False):
        assert float(number.split()[0]) == pytest.approx(speed, abs=0.051)


@pytest.mark.parametrize("row", [*ROWS, "PyTorch"])
def test_milliseconds(row: str, recorded: str) -> None:
    runner = ROWS.get(row, "torch")
    found = re.search(rf"^\| P3 \| 1 \| {re.escape(runner)} \| \d+ \| ([\d.]+) \|", recorded, re.MULTILINE)
    assert found is not None
    assert cells(row)[3] == f"{float(found[1]):.0f} ms"


@pytest.mark.parametrize("row", [row for row in ROWS if "torch" not in ROWS[row]])
def test_what_comes_after_the_neck(row: str, recorded: str) -> None:
    pattern = rf"^- {re.escape(ROWS[row])}: everything after the neck, .*?: P5 ([\d.]+)% .*P3 ([\d.]+)% "
    found = re.search(pattern, recorded, re.MULTILINE)
    assert found is not None
    for cell, number in zip(cells(row)[4:], found.groups(), strict=True):
        assert float(cell.strip("+%")) == pytest.approx(float(number), abs=0.51)


def cells(row: str) -> list[str]:
    """The cells of a row of the page's first table, but for its name."""
    found = re.search(rf"^\| {re.escape(row)} \| (.*) \|$", PAGE, re.MULTILINE)
    assert found is not None, row
    return [cell.strip() for cell in found[1].split("|")]
