"""Runs of `asag-batch` for tests: pictures, a Ray cluster of one machine, and what came of a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np

SECONDS = 120
_CLUSTER = """
import sys, logging, ray
quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False}
ray.init(address="local", num_cpus=4, object_store_memory=200_000_000, **quiet)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
ray.shutdown()
"""


def make_pictures(folder: Path, count: int) -> list[Path]:
    """Write so many pictures of few colours, `0000.png` and on, most of them links to the first ones."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:04d}.png" for i in range(count)]
    for i, path in enumerate(paths):
        if i < 8:
            cv2.imwrite(str(path), np.full((64, 64 + i, 3), (0, i % 3, i), np.uint8))
        else:
            path.hardlink_to(paths[i % 8])
    return paths


@contextmanager
def cluster(home: Path | None = None) -> Iterator[str]:
    """Run a Ray cluster of four CPUs, and give its address; it wants the token that a home has."""
    auth = {"RAY_AUTH_MODE": "disabled"} if home is None else {"HOME": str(home)}
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", **auth}
    with subprocess.Popen(
        [sys.executable, "-c", _CLUSTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
            process.stdin.close()
            process.wait(SECONDS)
        finally:
            process.kill()


def start(arguments: Sequence[str | Path], home: Path | None = None) -> subprocess.Popen[str]:
    """Start `asag-batch`, with another home if one is given."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "asag_deploy.batch.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **({} if home is None else {"HOME": str(home)})},
    )


def run(arguments: Sequence[str | Path], home: Path | None = None) -> tuple[int, str, str]:
    """Run `asag-batch`, and return its exit code and what it printed on stdout and stderr."""
    with start(arguments, home) as process:
        try:
            out, err = process.communicate(timeout=SECONDS)
        finally:
            process.kill()
    return process.returncode, out, err


def wait_until(happens: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait for something that a program does, which must not end before."""
    end = time.monotonic() + SECONDS
    while not happens():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def parts(output: Path) -> list[Path]:
    """The files of results that are there."""
    return sorted((output / "results").glob("part-*.parquet"))


def rows(output: Path) -> list[dict[str, Any]]:
    """All rows of the results, by path."""
    from pyarrow.parquet import ParquetFile

    found = [row for file in parts(output) for row in ParquetFile(file).read().to_pylist()]
    return sorted(found, key=lambda row: row["path"])


def word_of(output: Path) -> dict[str, Any]:
    """The word that a process at work has left of one part; empty if there is none just now."""
    for file in (output / "attempts").glob("*/part-*.json"):
        try:
            word: dict[str, Any] = json.loads(file.read_text())
        except (OSError, ValueError):
            continue
        return word
    return {}
