"""Both loops over PyTorch's stages: whether they agree, how long they take, and what deciding costs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from asag_bench.gpu_machine.steps import Failed
from asag_bench.gpu_machine.work import Work
from asag_deploy.errors import BackendError

_WALL = "loops_wall_ms"
"""What the rows of an exit level have, and no other figure."""


def time_loops(work: Work, variant: str, limit: float) -> dict[str, Any]:
    """Return the figures of `asag-bench torch-cuda-loop`, which writes them as they come.

    Raises Failed with those that there are if it fails or takes too long.
    """
    work.need_gpu()
    output = work.folder / "loops.json"
    try:
        work.run(work.asag_bench("torch-cuda-loop", "--variant", variant, "--output", output), limit)
    except BackendError as error:
        raise Failed(str(error), _figures(output)) from error
    figures = _figures(output)
    return {"detail": "; ".join(_rows_in_words(figures.get("result", {}))), **figures}


def _figures(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return {"result": result, "page": _page(result)}


def _exits(result: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, row in result.items():
        if isinstance(row, Mapping) and _WALL in row:
            yield name, row


def _rows_in_words(result: Mapping[str, Any]) -> Iterator[str]:
    for name, row in _exits(result):
        wall = row[_WALL]
        yield f"{name}: host {wall['host']:.2f} ms, device {wall['device']:.2f}, eager {wall['eager']:.2f}"


def _page(result: Mapping[str, Any]) -> str:
    """Tell wall times by exit level, and what the graph takes with and without conditional nodes."""
    lines = [
        "| stops at | eager | host's loop | device's loop | times as fast | deciding | largest difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in _exits(result):
        wall, deciding = row[_WALL], row["deciding_us"]
        cells = [name, *(f"{wall[side]:.2f} ms" for side in ("eager", "host", "device"))]
        cells.append(f"{row['times_as_fast_as_eager']:.2f}")
        cells.append(", ".join(f"{value:.0f} us ({side})" for side, value in deciding.items()))
        lines.append(f"| {' | '.join([*cells, str(row['largest_difference'])])} |")
    parts = result.get("parts", {})
    told = ", ".join(f"{name} {value:.3f} ms" for name, value in parts.items())
    return "\n".join([*lines, "", f"Stages one by one: {told or 'not measured'}."])
