"""What the detector costs beyond its backbone, how fast it loads, and whether its memory stays flat.

    python -m asag_bench.measuring.runtime_cost BUNDLE [--runs 15] [--memory-images 500] [--output FILE.json]

Every round runs all measurements in turn, so that a machine that slows down slows all of them: a ratio within
a round is fairer than the quotient of two medians.  Inputs are generated scenes, the same for everyone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from tqdm import tqdm

from asag_bench.measuring.machine import describe_machine, resident_mib
from asag_deploy import Bundle, Detector
from asag_deploy.atomic import atomic_write
from asag_deploy.bundle.manifest import Level
from asag_deploy.errors import AsagError
from asag_evaluation.data.doodles import draw_scene

HEIGHT, WIDTH = 800, 1088
_FEATURES = ("p2", "p3", "p4", "p5")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; returns 0, or 2 with the reason in one sentence on stderr."""
    parser = argparse.ArgumentParser(prog="runtime_cost", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--runs", type=int, default=15, help="rounds that count, after two that do not")
    parser.add_argument("--memory-images", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(argv)
    try:
        result = measure(options.bundle, options.runs, options.memory_images, options.threads)
        text = json.dumps(result, indent=2)
        if options.output is not None:
            with atomic_write(options.output) as temporary:
                temporary.write_text(text + "\n", encoding="utf-8")
    except AsagError as error:
        print(f"runtime_cost: error: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0


def measure(path: Path, runs: int, memory_images: int, threads: int) -> dict[str, Any]:
    """All measurements of one bundle, as plain JSON values."""
    start = time.perf_counter()
    bundle = Bundle.open(path)
    Detector.load(bundle, threads=threads).close()
    load_s = time.perf_counter() - start
    return {
        "command": f"python -m asag_bench.measuring.runtime_cost BUNDLE --runs {runs} "
        f"--memory-images {memory_images} --threads {threads}",
        "machine": describe_machine(),
        "bundle": {"variant": bundle.manifest.variant, "precision": bundle.manifest.precision},
        "input": f"1x3x{HEIGHT}x{WIDTH}, a generated scene",
        "threads": threads,
        "load_s": round(load_s, 2),
        **_latency(bundle, runs, threads),
        "memory": _memory(bundle, memory_images, threads),
    }


def _latency(bundle: Bundle, runs: int, threads: int) -> dict[str, Any]:
    """Median milliseconds of backbone and neck alone, and of the whole network to each level."""
    image = _normalised()
    size = np.array([[HEIGHT, WIDTH]])
    levels: list[Level] = ["P5", *(level.level for level in bundle.manifest.probing.levels)]
    detectors = {level: Detector.load(bundle, max_level=level, threads=threads) for level in levels}
    pyramid = _pyramid_alone(bundle, threads)

    times: dict[str, list[float]] = {"backbone_and_neck": [], **{f"to_{level}": [] for level in levels}}
    anchors: dict[str, int] = {}
    patches: dict[str, list[int]] = {}
    for round_ in tqdm(range(runs + 2), desc="latency", unit="round", file=sys.stderr):
        measured = {"backbone_and_neck": _time(lambda: pyramid(image))}
        for level, detector in detectors.items():
            begin = time.perf_counter()
            output = detector.forward(image, size)
            measured[f"to_{level}"] = (time.perf_counter() - begin) * 1000
            anchors[level] = int(output.anchor_count[0])
            patches[level] = [run.patches for run in output.trace[0].levels]
        if round_ >= 2:
            for name, value in measured.items():
                times[name].append(value)

    base = times["backbone_and_neck"]
    return {
        "latency_ms": {name: _spread(values) for name, values in times.items()},
        "anchors": anchors,
        "patches": patches,
        "rest_as_share_of_backbone_and_neck": {
            level: round(median((t - b) / b for t, b in zip(times[f"to_{level}"], base, strict=True)), 3)
            for level in levels
        },
        "probing_as_share_of_stopping_at_P5": {
            level: round(
                median((t - s) / s for t, s in zip(times[f"to_{level}"], times["to_P5"], strict=True)), 3
            )
            for level in levels[1:]
        },
    }


def _memory(bundle: Bundle, images: int, threads: int) -> dict[str, Any]:
    """Resident memory while images of many sizes pass through one detector."""
    rng = np.random.default_rng(0)
    seen: dict[str, float] = {}
    with Detector.load(bundle, threads=threads) as detector:
        for i in tqdm(range(images), desc="memory", unit="image", file=sys.stderr):
            height, width = (int(side) for side in rng.integers(200, 420, 2) // 32 * 32)
            noise = rng.standard_normal((1, 3, height, width), dtype=np.float32)
            detector.forward(noise, np.array([[height, width]]))
            if i + 1 in (20, 50, 100, 200, 300, 400, images):
                seen[str(i + 1)] = round(resident_mib(), 1)
    return {"images_seen_to_resident_mib": seen, "sizes": "200..416 pixels a side, random"}


def _pyramid_alone(bundle: Bundle, threads: int) -> Callable[[NDArray[np.float32]], object]:
    """The part of the backbone graph that computes P2..P5, without the anchors of the first level."""
    whole = onnx.load(str(bundle.graph_path("backbone")))
    part = onnx.utils.Extractor(whole).extract_model(["image"], list(_FEATURES))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(
        part.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )

    def run(image: NDArray[np.float32]) -> object:
        binding = session.io_binding()
        binding.bind_cpu_input("image", image)
        for name in _FEATURES:
            binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding)
        return binding.get_outputs()

    return run


def _normalised() -> NDArray[np.float32]:
    pixels = draw_scene(HEIGHT, WIDTH, seed=0).astype(np.float32)
    normal = (pixels - [123.675, 116.28, 103.53]) / [58.395, 57.12, 57.375]
    return np.ascontiguousarray(normal.transpose(2, 0, 1)[None], dtype=np.float32)


def _time(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1000


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(median(values), 1),
        "min": round(min(values), 1),
        "p90": round(float(np.percentile(values, 90)), 1),
        "max": round(max(values), 1),
    }


if __name__ == "__main__":
    sys.exit(main())
