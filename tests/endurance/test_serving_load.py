"""The load of the server in small: what `make load` does for ten minutes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from endurance.serving import main


@pytest.mark.slow
@pytest.mark.parametrize("serve", ["", "--batch 3 --requests 2"])
def test_good_clients_are_served_among_bad_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], serve: str
) -> None:
    output = tmp_path / "serving.json"
    code = main(["--seconds", "4", "--clients", "16", "--serve", serve, "--output", str(output)])
    report = json.loads(output.read_text())
    assert (code, report["clean"]) == (0, True), capsys.readouterr().err
    assert len(report["by_kind"]) > 10
    assert report["by_kind"]["good"] > 0
    assert "500" not in report["statuses"]


@pytest.mark.parametrize("name", ["serving", "serving-tiny"])
def test_the_benchmarks_page_has_what_was_recorded(name: str) -> None:
    root = Path(__file__).parents[2]
    path = f"tests/endurance/results/{name}.json"
    recorded = json.loads((root / path).read_text(encoding="utf-8"))
    page = (root / "benchmarks" / "README.md").read_text(encoding="utf-8")
    (row,) = [line for line in page.splitlines() if line.startswith("|") and f"../{path}" in line]
    times = recorded["milliseconds"]
    figures = [str(recorded["answers_per_second"]), f"{times['p50']:.0f} ms", f"{times['p99']:.0f} ms"]
    assert [cell.strip() for cell in row.split("|")][2:5] == figures
