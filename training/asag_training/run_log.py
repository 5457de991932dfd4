"""What a run leaves to be looked at: tables of steps and evaluations, TensorBoard where it is installed."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from asag_deploy.atomic import atomic_write
from asag_deploy.errors import OutputError

STEPS, EVALUATIONS = "steps.csv", "evaluations.csv"


class CsvLog:
    """A table that grows a row at a time; columns that come up later are added to the header.

    A row is on disk when `add` returns.  Opening an existing table continues it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns: list[str] = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                self.columns = next(csv.reader(file), [])

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row (OutputError if it cannot be written)."""
        new = [name for name in row if name not in self.columns]
        try:
            if new:
                self._widen(new)
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow([_short(row.get(name, "")) for name in self.columns])
        except OSError as error:
            raise OutputError(f"could not write '{self.path}': {error.strerror}") from error

    def keep_below(self, column: str, limit: float) -> None:
        """Drop the rows whose `column` is `limit` or more: a resumed run writes them again."""
        if not self.path.exists():
            return
        with self.path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if float(row[column]) < limit]
        self._rewrite(rows)

    def _widen(self, new: list[str]) -> None:
        rows: list[dict[str, str]] = []
        if self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        self.columns += new
        self._rewrite(rows)

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        with atomic_write(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, restval="")
            writer.writeheader()
            writer.writerows(rows)


class RunLog:
    """Both tables of a run, and TensorBoard's events if `tensorboard` is installed."""

    def __init__(self, folder: Path, first_step: int, first_epoch: int) -> None:
        self.steps = CsvLog(folder / STEPS)
        self.evaluations = CsvLog(folder / EVALUATIONS)
        self.steps.keep_below("step", first_step)
        self.evaluations.keep_below("epoch", first_epoch)
        self._board = _tensorboard(folder, first_step)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Note one optimiser step."""
        self.steps.add({"step": step, **values})
        self._scalars(step, values)

    def evaluation(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        """Note one evaluation."""
        self.evaluations.add({"epoch": epoch, **values})
        self._scalars(step, {f"evaluation/{name}": value for name, value in values.items()})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._board is not None:
            self._board.close()

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)


def _tensorboard(folder: Path, first_step: int) -> Any:
    """TensorBoard's writer, or None where it is not installed."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)


def _short(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
