"""A run that is interrupted anywhere goes on as if it had not been."""

from __future__ import annotations

import csv
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

from asag_deploy import atomic
from asag_deploy.errors import DataError, TrainingError
from asag_deploy.interruption import Interruption
from asag_evaluation.data.coco import CocoDataset
from asag_training.network import backbone
from asag_training.run import log, run_loop, state, trainer
from asag_training.run.process import Process
from asag_training.run.run_loop import Rhythm, TrainingRun
from asag_training.run.state import STATE
from support.training_runs import make_loader, make_trainer, tiny_recipe, write_pictures

RECIPE = tiny_recipe(
    "optimisation.batch_statistics=true",
    "optimisation.accumulate=2",
    "network.heads=1",
    "patches.denoising_queries=0",
)
"""With what a broken off update could leave its mark on: statistics, and gradients of several passes."""

RUN = frozenset(module.__file__ for module in (atomic, log, run_loop, state, trainer))
FORWARD = frozenset([backbone.__file__])
LINES = {RUN: (0.48, 0.62), FORWARD: (0.77,)}
"""Where runs are interrupted: at these parts of the lines they execute in these modules."""
KILLED = (0.46, 0.8)
"""Where they are killed: at these parts of the lines in `RUN`."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_pictures(tmp_path_factory.mktemp("data"))
    return write_pictures(root, "val2017", count=1, seed=1)


def go_on(data: Path, folder: Path) -> None:
    """Start or resume the run, and let it come to its end."""
    with Interruption() as interruption:
        one = make_trainer(data, folder, RECIPE)
        one.interruption = interruption
        one.resume()
        validation = CocoDataset.open(data, "val2017", categories=one.categories)
        TrainingRun(one, make_loader(data, RECIPE), validation, Rhythm(pictures=0))()


@contextmanager
def at_every_line(action: Callable[[frozenset[str | None]], object]) -> Iterator[None]:
    """Call `action` before every line of these modules, with the set that the module is of."""

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        modules = next((each for each in LINES if frame.f_code.co_filename in each), None)
        if modules is None:
            return None
        if event == "line":
            action(modules)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def saved(folder: Path) -> Mapping[str, Any]:
    return dict(torch.load(folder / STATE, weights_only=True))


def differing(one: Any, other: Any, name: str = "") -> list[str]:
    """The names of what differs in two nested states."""
    if isinstance(one, Tensor):
        return [] if torch.equal(one, other) else [name]
    if isinstance(one, Mapping):
        assert one.keys() == other.keys()
        return [found for key in one for found in differing(one[key], other[key], f"{name}/{key}")]
    return [] if one == other else [name]


def logged(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / name).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [{name: text for name, text in row.items() if not name.startswith("ms_")} for row in rows]


def assert_same(folder: Path, whole: Path) -> None:
    assert differing(saved(folder), saved(whole)) == []
    for name in (log.STEPS, log.EVALUATIONS):
        assert logged(folder, name) == logged(whole, name)


Whole = tuple[Path, Counter[frozenset[str | None]]]


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A run that is not interrupted, and how many lines of either kind it takes."""
    folder, lines = tmp_path_factory.mktemp("whole"), Counter[frozenset[str | None]]()
    with at_every_line(lambda modules: lines.update([modules])):
        go_on(data, folder)
    return folder, lines


@pytest.mark.slow
@pytest.mark.parametrize(
    ("modules", "part"), [(each, part) for each, parts in LINES.items() for part in parts]
)
def test_interrupted_at_any_line(
    data: Path, tmp_path: Path, whole: Whole, modules: frozenset[str | None], part: float
) -> None:
    """In the middle of a forward pass too, whose statistics are then those of before."""
    folder, lines = whole
    left = int(lines[modules] * part)

    def interrupt(where: frozenset[str | None]) -> None:
        nonlocal left
        left -= where == modules
        if left == 0:
            left = -1
            signal.raise_signal(signal.SIGTERM if part > 0.5 else signal.SIGINT)

    with at_every_line(interrupt), pytest.raises(KeyboardInterrupt):
        go_on(data, tmp_path / "run")
    go_on(data, tmp_path / "run")
    assert_same(tmp_path / "run", folder)


@pytest.mark.slow
def test_killed_at_any_line(data: Path, tmp_path: Path, whole: Whole) -> None:
    """What lies in the folder when nothing can be done any more is enough to go on from."""
    folder, lines = whole
    copies, count = [int(lines[RUN] * part) for part in KILLED], 0

    def copy(where: frozenset[str | None]) -> None:
        nonlocal count
        count += where == RUN
        if where == RUN and count in copies:
            shutil.copytree(tmp_path / "run", tmp_path / f"killed{count}")

    with at_every_line(copy):
        go_on(data, tmp_path / "run")
    for number in copies:
        go_on(data, tmp_path / f"killed{number}")
        assert_same(tmp_path / f"killed{number}", folder)


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (
            RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"),
            TrainingError,
            "another process",
        ),
        (DataError("image 5 cannot be read"), DataError, "image 5"),
        (torch.OutOfMemoryError("CUDA out of memory"), TrainingError, "memory ran out"),
    ],
)
def test_what_ends_a_run_loses_nothing(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    raised: type[Exception],
    message: str,
) -> None:
    """All updates that were done are saved, and the one under way has left no trace."""
    one = make_trainer(data, tmp_path / "run", RECIPE)
    validation = CocoDataset.open(data, "val2017", categories=one.categories)
    one.process = Process(world_size=2)
    begin, kept = one._begin_update, dict[str, Tensor]()

    def fail_in_the_second() -> None:
        begin()
        if one.position.step == 1:
            kept.update({name: tensor.clone() for name, tensor in one.model.state_dict().items()})
            for buffer in one.model.buffers():
                buffer.add_(1)  # as a forward pass does
            raise error

    monkeypatch.setattr(one, "_begin_update", fail_in_the_second)
    with pytest.raises(raised, match=message):
        TrainingRun(one, make_loader(data, RECIPE), validation, Rhythm(pictures=0))()
    state = saved(tmp_path / "run")
    assert state["position"]["step"] == 1
    assert differing(state["model"], kept) == []
