"""What it takes to open the annotations of a large data set: seconds, and memory above that of the imports.

The file is generated, as large as COCO's if nothing else is said.  It is read for the first time, opened
again, handed to a worker, and opened by four processes at once; and once more without msgspec, and as a file
that is written in another way than COCO's, which is read whole.  The AP of random detections on 5000 of its
images is measured too.  Where a machine has other work (`load_average`, before the first opening), the
processor's seconds say more than the clock's.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import faster_coco_eval  # noqa: F401  (one of the processes needs it, and would end without)

from asag_bench.measuring.annotation_files import write_annotated
from asag_bench.measuring.machine import describe_machine
from asag_bench.result import to_json
from asag_deploy.command_line import progress
from asag_deploy.errors import ConfigError, DataError
from asag_deploy.scratch import scratch_folder

_TOGETHER = 4
_CHILD = "from asag_bench.measuring.opening import main; main()"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnnotationsPlan:
    """What to measure.  Raises ConfigError when it makes no sense."""

    images: int = 118_287
    objects: int = 860_001
    """Objects in all of them, as in COCO's train2017."""
    repeats: int = 3
    """Times that each opening is measured; the median counts."""

    def __post_init__(self) -> None:
        for name in ("images", "objects", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} must be at least 1")


def measure(plan: AnnotationsPlan) -> dict[str, Any]:
    """Measure everything; returns plain JSON values."""
    with scratch_folder() as folder, progress(total=7, unit="measurement") as bar:

        def done(figures: Any) -> Any:
            bar.update()
            return figures

        file = write_annotated(folder / "data", images=plan.images, objects=plan.objects)
        size, load = file.stat().st_size, os.getloadavg()[0]
        cache = folder / "cache"
        first = done([_first(folder / "data", cache) for _ in range(plan.repeats)])
        again = done([_alone("open", folder / "data", cache) for _ in range(plan.repeats)])
        figures = {
            "worker": done(_alone("hand to a worker", folder / "data", cache)),
            "evaluation": done(_alone("evaluate", folder / "data", cache)),
            "four_at_once_first": done(_at_once(folder / "data", folder / "another")),
            "without_msgspec": done(_alone("open without msgspec", folder / "data", folder / "third")),
        }
        shutil.rmtree(folder / "data")
        write_annotated(folder / "data", images=plan.images, objects=plan.objects, as_text=True)
        figures["of_another_kind"] = done(_alone("open", folder / "data", cache))
    return {
        "machine": to_json(describe_machine()),
        "images": plan.images,
        "objects": plan.objects,
        "file_mb": round(size / 1e6, 1),
        "load_average": round(load, 1),
        "first": _typical(first),
        "again": _typical(again),
        **figures,
    }


def _first(data: Path, cache: Path) -> dict[str, Any]:
    shutil.rmtree(cache, ignore_errors=True)
    return _alone("open", data, cache)


def _alone(what: str, data: Path, cache: Path) -> dict[str, Any]:
    """Do it in a process of its own, and return what it says."""
    with _started(what, data, cache, 1) as (process,):
        return _figures(process)


def _at_once(data: Path, cache: Path) -> dict[str, Any]:
    """Let processes open what none of them has opened before."""
    begin = time.perf_counter()
    with _started("open", data, cache, _TOGETHER) as processes:
        several = [_figures(process) for process in processes]
    return {
        "seconds_with_imports": round(time.perf_counter() - begin, 2),
        **{name: [each[name] for each in several] for name in ("seconds", "cpu_seconds", "peak_mib")},
    }


@contextmanager
def _started(what: str, data: Path, cache: Path, count: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Give processes that do it; those that have not ended by then are ended."""
    environment = {**os.environ, "ASAG_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", _CHILD, what, str(data)]
    with ExitStack() as stack:
        processes = []
        for _ in range(count):
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
            stack.enter_context(process)
            stack.callback(process.kill)  # before it is waited for
            processes.append(process)
        yield processes


def _figures(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, _ = process.communicate()
    if process.returncode:
        raise DataError(f"a process that opens the data set ended with code {process.returncode}")
    figures: dict[str, Any] = json.loads(output)
    return figures


def _typical(several: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the median of each figure, and all seconds."""
    return {
        **{name: median(each[name] for each in several) for name in several[0]},
        "all_seconds": [each["seconds"] for each in several],
    }
