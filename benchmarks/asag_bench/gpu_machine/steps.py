"""Steps that are done one after the other, whatever becomes of each, until the time is up."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from asag_deploy.errors import AsagError

State = Literal["passed", "failed", "skipped"]
_LEAST_SECONDS = 5.0


class Skip(Exception):
    """A step cannot be done here, for the reason given."""


class Failed(Exception):
    """A step went wrong, but there is something to be kept."""

    def __init__(self, reason: str, data: dict[str, Any]) -> None:
        super().__init__(reason)
        self.data = data


@dataclass(frozen=True, kw_only=True)
class Step:
    """Something to do, and the most seconds it may take."""

    name: str
    limit: float
    action: Callable[[float], dict[str, Any]]
    """Takes the seconds it has; gives plain JSON values, of which `detail` is a line for people."""
    needs: tuple[str, ...] = ()
    """What has to be made in the background for it."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of a step."""

    name: str
    state: State
    detail: str = ""
    seconds: float = 0.0
    data: dict[str, Any] = field(default_factory=dict)


def run_steps(steps: Sequence[Step], end: float, report: Callable[[Sequence[Result]], None]) -> list[Result]:
    """Do all steps until `end`, as `time.monotonic` tells it; `report` is given the results after each."""
    results: list[Result] = []
    for step in steps:
        results.append(run_step(step, end - time.monotonic()))
        last = results[-1]
        print(f"{last.state:<8}{last.seconds:7.1f} s  {last.name}  {_line(last.detail)}", file=sys.stderr)
        report(results)
    return results


def run_step(step: Step, left: float) -> Result:
    """Do one step in what is left of the time; whatever goes wrong is its result."""
    if left < min(step.limit, _LEAST_SECONDS):
        return Result(name=step.name, state="skipped", detail="no time was left")
    begin = time.monotonic()
    state: State = "passed"
    data: dict[str, Any] = {}
    try:
        data = step.action(min(step.limit, left))
        detail = str(data.pop("detail", ""))
    except Skip as reason:
        state, detail = "skipped", str(reason)
    except Failed as error:
        state, detail, data = "failed", str(error), error.data
    except AsagError as error:
        state, detail = "failed", str(error)
    except Exception as error:  # a step may call anything, and the others are to go on
        state, detail = "failed", f"{type(error).__name__}: {error}"
    seconds = round(time.monotonic() - begin, 1)
    return Result(name=step.name, state=state, detail=detail, seconds=seconds, data=data)


def _line(text: str) -> str:
    """Cut a text to its beginning and its end, where errors say what was wrong."""
    line = " ".join(text.split())
    return line if len(line) <= 160 else f"{line[:60]} … {line[-100:]}"
