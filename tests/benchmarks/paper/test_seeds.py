"""The tables of several seeds as one: means, how far they lie apart, and gains within each seed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import cv2
import pytest

from asag_bench.paper.cli import main
from asag_bench.paper.seeds import as_file, over_seeds, page, read_run
from asag_bench.reports.page import read_results
from asag_deploy.errors import ConfigError

_MACHINE = {
    "date": "2026-01-01",
    "processor": "a processor",
    "cores": 2,
    "memory_gib": 8.0,
    "system": "Linux",
    "python": "3.11",
    "packages": {},
}
_HOW = "asag-a-100 with these settings, and not trained with them; needs a network: the paper's text: + 2.0"


def _row(label: str, ap: float | None, paper: float | None, state: str = "") -> dict[str, Any]:
    return {
        "labels": [label],
        "here": {"AP": ap, "#An": None if ap is None else 10 * ap},
        "paper": {} if paper is None else {"AP": paper},
        "state": state,
        "of_paper": [],
    }


def _run(folder: Path, aps: tuple[float | None, ...], states: tuple[str, ...] = ("", "", "")) -> Path:
    labels, papers = ("all of it", "dynamic queries", "nothing"), (42.6, 40.6, None)
    table = {
        "number": "5a",
        "about": "the components",
        "heads": ["without"],
        "columns": ["AP", "#An"],
        "rows": [_row(*each) for each in zip(labels, aps, papers, states, strict=True)],
    }
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "command": "asag-paper tables",
        "header": ["Here: scenes val2017, 3 images, 9 objects, 5 classes.", f"Networks: of {folder.name}."],
        "machine": _MACHINE,
        "measured": {},
        "tables": [table, {**table, "number": "1"}],
    }
    (folder / "paper.json").write_text(json.dumps(content))
    return folder


def test_means_and_gains_are_of_all_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A gain is taken within a seed: here it is the same in both, though the seeds lie 10 AP apart."""
    folders = [_run(tmp_path / "s0", (30.0, 28.0, None)), _run(tmp_path / "s1", (40.0, 38.0, None))]
    assert main(["seeds", *map(str, folders), "--output-dir", str(tmp_path / "out")]) == 0
    content = json.loads((tmp_path / "out" / "seeds.json").read_text())
    five, one = content["seeds"]
    whole, fixed, nothing = five["rows"]
    assert whole["here"]["AP"] == {"mean": 35.0, "low": 30.0, "high": 40.0}
    assert "gain" not in whole
    assert fixed["here"]["#An"] == {"mean": 330.0, "low": 280.0, "high": 380.0}
    assert fixed["gain"] == {"mean": -2.0, "low": -2.0, "high": -2.0}
    assert fixed["paper_gain"] == -2.0
    assert nothing["here"]["AP"] is None
    assert [row["runs"] for row in five["rows"]] == [2, 2, 0]
    assert "gain" not in one["rows"][1], "the rows of table 1 are other detectors"
    picture = cv2.imread(str(tmp_path / "out" / "seeds.png"))
    assert picture is not None
    assert picture.std() > 5, "something is drawn"
    written = (tmp_path / "out" / "seeds.md").read_text()
    assert "| dynamic queries | 33.0 ±5.0 (40.6) | 330.0 ±50.0 (-) | -2.0 ±0.0 (-2.0) | 2 |  |" in written
    assert "Networks: of s1." in written
    assert "33.0 ±5.0 (40.6)" in capsys.readouterr().out
    assert page(content) == written, "the page is made of the file alone"
    assert read_results(tmp_path / "out")["seeds.json"].machine.processor == "a processor"


def test_a_row_is_of_the_runs_that_have_its_network(tmp_path: Path) -> None:
    """Only one seed was trained without dynamic queries: what stands in for it does not count."""
    there = _run(tmp_path / "s0", (30.0, 25.0, 20.0), ("", "the paper's text: + 2.0", ""))
    content = json.loads((there / "paper.json").read_text())
    content["tables"][0]["rows"][1] |= {"paper": {}, "paper_gain": -1.5}
    (there / "paper.json").write_text(json.dumps(content))
    instead = _run(tmp_path / "s1", (40.0, 39.5, None), ("", _HOW, "needs a network"))
    runs = [read_run(there), read_run(instead)]
    _, fixed, nothing = over_seeds(runs)[0]["rows"]
    assert fixed["here"]["AP"]["mean"] == 25.0
    assert fixed["runs"] == 1
    assert fixed["gain"]["mean"] == -5.0
    assert fixed["paper_gain"] == -1.5, "where the paper says it in words"
    assert fixed["state"] == "the paper's text: + 2.0"
    assert nothing["here"]["AP"]["mean"] == 20.0
    written = page(as_file(runs, over_seeds(runs), "asag-paper seeds"))
    assert "1. the paper's text: + 2.0" in written
    assert "| dynamic queries | 25.0 (-) | 250.0 (-) | -5.0 (-1.5) | 1 | 1 |" in written, "of one: no ±"
    assert "| all of it | 35.0 ±5.0 (42.6) |" in written
    alone = page(as_file(runs[:1], over_seeds(runs[:1]), "asag-paper seeds"))
    assert "Of one seed" in alone
    assert "±" not in alone


_RECORDED = Path(__file__).parents[3] / "benchmarks" / "results"


@pytest.mark.parametrize("file", sorted(_RECORDED.glob("paper-*.json")), ids=lambda file: file.stem)
def test_a_recorded_page_is_of_its_file(file: Path) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    assert file.with_suffix(".md").read_text(encoding="utf-8") == page(content)


def test_runs_that_do_not_belong_together_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = _run(tmp_path / "s0", (1.0, 2.0, 3.0)), _run(tmp_path / "s1", (2.0, 3.0, 4.0))
    assert main(["seeds", str(one), str(one)]) == 2
    assert "'s0' has the figures of 's0': give each seed once" in capsys.readouterr().err
    assert main(["seeds", str(one), str(tmp_path / "my seed")]) == 2
    said = f"holds no tables: measure each seed with `asag-paper tables --output-dir '{tmp_path}/my seed'`"
    assert said in capsys.readouterr().err

    content = json.loads((other / "paper.json").read_text())
    for change, sentence in (
        ({"header": ["Here: bccd."]}, "on other data"),
        ({"tables": [{**content["tables"][0], "number": "8"}]}, "no table in common"),
        ({"tables": [{**content["tables"][0], "rows": content["tables"][0]["rows"][:1]}]}, "table 5a"),
    ):
        (other / "paper.json").write_text(json.dumps({**copy.deepcopy(content), **change}))
        with pytest.raises(ConfigError, match=sentence):
            over_seeds([read_run(one), read_run(other)])

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "seeds.md").write_text("mine")
    _run(tmp_path / "s1", (2.0, 3.0, 4.0))
    assert main(["seeds", str(one), str(other), "--output-dir", str(tmp_path / "out")]) == 2
    assert "seeds.md' is there" in capsys.readouterr().err
