"""The log of a run: tables of steps and evaluations, and TensorBoard where it is installed."""

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

    A row is in its file when `add` returns.  Opening an existing table continues it; raises OutputError if
    that cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns: list[str] = []
        try:
            if path.exists():
                with path.open(newline="", encoding="utf-8") as file:
                    self.columns = next(csv.reader(file), [])
        except (OSError, ValueError, csv.Error) as error:
            raise OutputError(f"'{path}' is no table that can be continued: move it away") from error

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

    def keep_up_to(self, column: str, last: int) -> None:
        """Drop the rows whose `column` is above `last`: a resumed run writes them again.

        So it does a row that was cut short when the run was killed.
        """
        if self.path.exists():
            kept = [row for row in self._rows() if row[column].isdecimal() and int(row[column]) <= last]
            self._rewrite(kept)

    def _widen(self, new: list[str]) -> None:
        rows = self._rows() if self.path.exists() else []
        self.columns += new
        self._rewrite(rows)

    def _rows(self) -> list[dict[str, str]]:
        """Read the rows that are whole."""
        with self.path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))[1:]
        return [dict(zip(self.columns, row, strict=True)) for row in rows if len(row) == len(self.columns)]

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        with atomic_write(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, restval="")
            writer.writeheader()
            writer.writerows(rows)


class RunLog:
    """Both tables of a run, and TensorBoard's events if `tensorboard` is installed.

    For the main process alone: others would write the same files.
    """

    def __init__(self, folder: Path, *, step: int = 0, epoch: int = 0) -> None:
        """Continue the logs in `folder` after `step` updates and `epoch` epochs; what is beyond is dropped.

        Raises OutputError if a table cannot be read or written.
        """
        self.steps = CsvLog(folder / STEPS)
        self.evaluations = CsvLog(folder / EVALUATIONS)
        self.steps.keep_up_to("step", step)
        self.evaluations.keep_up_to("epoch", epoch)
        self._board = _tensorboard(folder, step + 1)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Note one update; `step` counts them from 1."""
        self.steps.add({"step": step, **values})
        self._scalars(step, values)

    def evaluation(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        """Note one evaluation, after so many epochs and updates."""
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
    """Open TensorBoard's writer, or return None where it is not installed."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)


def _short(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
