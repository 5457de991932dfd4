"""What a process takes that opens a data set, and one that is handed it: run in processes of their own."""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from asag_evaluation.data.coco import CocoDataset

_DETECTIONS = 100
"""Of an image, as COCO measures them."""


def main() -> None:
    """Do what the first argument says with the data set that the second names, and print figures as JSON."""
    doing: dict[str, Callable[[Path], dict[str, Any]]] = {
        "open": _open,
        "open without msgspec": _open_without_msgspec,
        "hand to a worker": _hand_to_a_worker,
        "evaluate": _evaluate,
    }
    print(json.dumps(doing[sys.argv[1]](Path(sys.argv[2]))))


def _open(root: Path) -> dict[str, Any]:
    before = _memory()
    begin, busy = time.perf_counter(), time.process_time()
    dataset = CocoDataset.open(root)
    seconds, busy = time.perf_counter() - begin, time.process_time() - busy
    after = _memory()
    return {
        "seconds": round(seconds, 4),
        "cpu_seconds": round(busy, 4),
        "peak_mib": round(after["VmHWM"] - before["VmRSS"], 1),
        "own_mib_then": round(after["RssAnon"] - before["RssAnon"], 1),
        "objects": dataset.counts.objects,
    }


def _open_without_msgspec(root: Path) -> dict[str, Any]:
    sys.modules["msgspec"] = None  # type: ignore[assignment]
    return _open(root)


def _hand_to_a_worker(root: Path) -> dict[str, Any]:
    """Start a process like those that read images, with the data set and without."""
    dataset = CocoDataset.open(root).for_training()
    context = multiprocessing.get_context("forkserver")
    told = []
    for handed in (None, None, dataset):  # the first one starts the server
        here, there = context.Pipe()
        begin = time.perf_counter()
        process = context.Process(target=_work, args=(handed, there))
        process.start()
        here.recv()
        seconds = time.perf_counter() - begin
        told.append((seconds, here.recv()))
        process.join()
    (without, little), (with_data, much) = told[1:]
    return {
        "seconds": round(with_data - without, 4),
        "own_mib": round(much["RssAnon"] - little["RssAnon"], 1),
        "shared_mib": round(sum(much[name] - little[name] for name in ("RssFile", "RssShmem")), 1),
    }


def _work(dataset: CocoDataset | None, there: Connection) -> None:
    """Say when the data set has come, then look at all of it, and say what memory there is."""
    there.send("here")
    if dataset is not None:
        for record in dataset.records:
            record.boxes.sum()
    there.send(_memory())


def _evaluate(root: Path) -> dict[str, Any]:
    """Measure AP of random detections on as many images as COCO has for it."""
    from asag_evaluation.metrics.coco import coco_metrics

    dataset = CocoDataset.open(root).first(5000)
    rng = np.random.default_rng(0)
    results = []
    for record in dataset.records:
        corner = rng.random((_DETECTIONS, 2)) * (record.width, record.height)
        boxes = np.concatenate([corner, rng.random((_DETECTIONS, 2)) * 100 + 2], axis=1).tolist()
        labels = rng.integers(0, len(dataset.categories), _DETECTIONS).tolist()
        results += [
            {"image_id": record.image_id, "category_id": dataset.categories[c].id, "bbox": b, "score": s}
            for b, c, s in zip(boxes, labels, rng.random(_DETECTIONS).tolist(), strict=True)
        ]
    before = _memory()
    begin, busy = time.perf_counter(), time.process_time()
    coco_metrics(dataset.ground_truth(), results)
    return {
        "images": len(dataset),
        "detections": len(results),
        "seconds": round(time.perf_counter() - begin, 4),
        "cpu_seconds": round(time.process_time() - busy, 4),
        "peak_mib": round(_memory()["VmHWM"] - before["VmRSS"], 1),
    }


def _memory() -> dict[str, float]:
    """Return what this process has in RAM, and the most it had (VmHWM), in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    names = ("VmHWM", "VmRSS", "RssAnon", "RssFile", "RssShmem")
    return {name: int(fields[name].split()[0]) / 1024 for name in names}
