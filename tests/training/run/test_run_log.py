"""The tables of a run."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from asag_deploy.errors import OutputError
from asag_training.run.log import EVALUATIONS, STEPS, CsvLog, RunLog


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(autouse=True)
def _without_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)


def test_columns_that_come_up_later(tmp_path: Path) -> None:
    log = CsvLog(tmp_path / "t.csv")
    log.add({"step": 1, "loss": 0.123456789})
    log.add({"step": 2, "loss": 2.0, "new": "a, b"})
    log.add({"new": "c", "step": 3})
    assert log.path.read_text().splitlines()[0] == "step,loss,new"
    assert rows(log.path) == [
        {"step": "1", "loss": "0.123457", "new": ""},
        {"step": "2", "loss": "2", "new": "a, b"},
        {"step": "3", "loss": "", "new": "c"},
    ]


def test_a_table_is_continued(tmp_path: Path) -> None:
    CsvLog(tmp_path / "t.csv").add({"step": 1, "loss": 5.0})
    CsvLog(tmp_path / "t.csv").add({"loss": 4.0, "step": 2})
    assert rows(tmp_path / "t.csv") == [{"step": "1", "loss": "5"}, {"step": "2", "loss": "4"}]


def test_resuming_drops_what_is_done_again(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        for step in range(1, 6):
            log.step(step, {"loss": float(step)})
        for epoch in (1, 2):
            log.evaluation(epoch, 2 * epoch, {"AP": epoch / 10})
    with RunLog(tmp_path, step=3, epoch=1) as log:
        log.step(4, {"loss": 40.0})
        log.evaluation(2, 4, {"AP": 0.5})
    assert [row["loss"] for row in rows(tmp_path / STEPS)] == ["1", "2", "3", "40"]
    assert [(row["epoch"], row["AP"]) for row in rows(tmp_path / EVALUATIONS)] == [("1", "0.1"), ("2", "0.5")]


def test_starting_anew_empties_the_tables(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.step(1, {"loss": 1.0})
    with RunLog(tmp_path) as log:
        log.step(1, {"loss": 7.0})
    assert [row["loss"] for row in rows(tmp_path / STEPS)] == ["7"]


def test_a_row_that_was_cut_short_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / STEPS
    path.write_text("step,loss,rate\r\n1,2,3\r\n2,")
    with RunLog(tmp_path, step=2) as log:
        log.step(2, {"loss": 8.0, "rate": 9.0})
    assert [list(row.values()) for row in rows(path)] == [["1", "2", "3"], ["2", "8", "9"]]


def test_an_empty_table(tmp_path: Path) -> None:
    (tmp_path / STEPS).touch()
    with RunLog(tmp_path, step=2) as log:
        log.step(3, {"loss": 8.0})
    assert rows(tmp_path / STEPS) == [{"step": "3", "loss": "8"}]


def test_a_table_that_cannot_be_written(tmp_path: Path) -> None:
    log = CsvLog(tmp_path / "folder" / "t.csv")
    log.add({"step": 1})
    log.path.unlink()
    log.path.mkdir()
    with pytest.raises(OutputError, match=r"could not write .*t\.csv"):
        log.add({"step": 2})


def test_a_file_that_is_no_table(tmp_path: Path) -> None:
    (tmp_path / STEPS).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(OutputError, match=r"steps\.csv' is no table that can be continued"):
        RunLog(tmp_path)


def test_tensorboard_gets_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def writer(folder: str, purge_step: int) -> Any:
        calls.append((folder, purge_step))
        return SimpleNamespace(
            add_scalar=lambda *values: calls.append(values), close=lambda: calls.append(("closed",))
        )

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with RunLog(tmp_path, step=2, epoch=1) as log:
        log.step(3, {"loss": 1.5})
        log.evaluation(2, 3, {"AP": 0.25})
    assert calls == [
        (str(tmp_path / "tensorboard"), 3),
        ("loss", 1.5, 3),
        ("evaluation/AP", 0.25, 3),
        ("closed",),
    ]
