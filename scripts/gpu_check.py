"""Everything that takes an NVIDIA GPU, in one go, with one report.

    python scripts/gpu_check.py --output-dir gpu-report

Compiles the kernels, runs the tests marked `gpu`, the kernels' own check under compute-sanitizer, builds and
judges engines with every GPU backend that this machine has, alone and in batches, compares pictures that were
prepared on the GPU with the CPU's, and times all.  Writes `gpu_check.json` and
`gpu_check.md`.  A step that cannot be done says why; the others go on.

Exit codes: 0 if nothing failed, 1 if something did, 2 if there is no GPU to check.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gpu_equality import Recorder, compare_batches, compare_processing, kernels_at, pictures
from gpu_loops import compare_loops

from asag_deploy import __version__
from asag_deploy.atomic import atomic_write
from asag_deploy.backends import BACKENDS, open_network
from asag_deploy.backends.tensorrt import EngineNetwork
from asag_deploy.bundle import Bundle
from asag_deploy.command_line import OneSentenceParser, exit_code
from asag_deploy.cuda import open_cuda, why_no_cuda
from asag_deploy.errors import AsagError, BackendError, ConfigError
from asag_deploy.kernels import LIBRARY_VARIABLE
from asag_deploy.manifest import Level, Manifest
from asag_deploy.probing import StopRule, detect
from asag_deploy.stages import Network

PROGRAM = "gpu_check"
ROOT = Path(__file__).resolve().parent.parent
GPU_BACKENDS = ("tensorrt-rtx", "tensorrt", "onnxruntime-cuda")
ENGINES = ("tensorrt-rtx", "tensorrt")
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
LIBRARIES = ("cuda-bindings", "tensorrt-rtx", "tensorrt", "onnxruntime-gpu", "numpy", "torch")
LAST_LINES = 40
WARM_UPS = 20


@dataclass(kw_only=True)
class Step:
    """What came of one step."""

    name: str
    state: str = "passed"
    """`passed`, `failed` or `skipped`."""
    detail: str = ""
    seconds: float = 0.0
    data: dict[str, Any] = field(default_factory=dict)


class Skip(Exception):
    """A step cannot be done on this machine, for the reason given."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run every step and return the exit code."""
    return exit_code(PROGRAM, lambda: _run(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = OneSentenceParser(prog=PROGRAM, description="Check everything that takes an NVIDIA GPU.")
    add = parser.add_argument
    add("--output-dir", metavar="DIR", type=Path, default=Path("gpu-report"), help="default %(default)s")
    add("--bundle", metavar="DIR", type=Path, help="a bundle to time; default: random weights are exported")
    add("--variant", metavar="NAME", default="asag-a-r50-100", help="of that export; default %(default)s")
    add("--images", metavar="DIR", type=Path, help="photographs to prepare on the GPU; default: drawn ones")
    add("--repeats", metavar="N", type=int, default=200, help="calls that are timed; default %(default)s")
    add("--shape", metavar="HxW", default="800x1088", help="of the image that is timed; default %(default)s")
    return parser


def _run(options: argparse.Namespace) -> int:
    problem = why_no_cuda()
    if problem is not None:
        raise BackendError(f"there is nothing to check without a GPU: {problem}")
    shape = parse_shape(options.shape)
    if options.repeats < 1:
        raise ConfigError(f"--repeats is {options.repeats}; expected at least 1")
    output: Path = options.output_dir
    build = output / "build"
    bundle = options.bundle or output / "bundle"
    plan: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        ("compile the kernels", partial(compile_kernels, build)),
        ("tests on the GPU", partial(run_gpu_tests, build)),
        *((f"compute-sanitizer {tool}", partial(sanitize, build, tool)) for tool in SANITIZER_TOOLS),
    ]
    if options.bundle is None:
        plan.append(("export a bundle", partial(export, bundle, options.variant)))
    plan += [(f"engines with {name}", partial(build_and_judge, bundle, name)) for name in ENGINES]
    for name in ENGINES:
        plan += [
            (f"batches with {name}", partial(check_batches, bundle, name, shape)),
            (f"pictures with {name}", partial(check_pictures, bundle, name, build, options.images)),
            (f"loops with {name}", partial(check_loops, bundle, name, build, shape, options.repeats)),
        ]
    plan += [
        (f"time {name}", partial(time_backend, name, bundle, shape, options.repeats)) for name in GPU_BACKENDS
    ]
    output.mkdir(parents=True, exist_ok=True)
    steps = []
    for name, action in plan:
        steps.append(do(name, action))
        print(f"{steps[-1].state:<8} {name}  {steps[-1].detail}", file=sys.stderr)
        write_report(output, describe_machine(), steps)
    return 1 if any(step.state == "failed" for step in steps) else 0


def parse_shape(text: str) -> tuple[int, int]:
    """`800x1088` as (height, width), each a multiple of 32.  Raises ConfigError for anything else."""
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdigit() and int(side) and int(side) % 32 == 0 for side in sides):
        raise ConfigError(f"the shape is '{text}'; expected HxW in multiples of 32, such as 800x1088")
    return int(sides[0]), int(sides[1])


def do(name: str, action: Callable[[], dict[str, Any]]) -> Step:
    """Run one step; whatever goes wrong is its result."""
    step, start = Step(name=name), time.perf_counter()
    try:
        step.data = action()
        step.detail = str(step.data.pop("detail", ""))
    except Skip as reason:
        step.state, step.detail = "skipped", str(reason)
    except AsagError as error:
        step.state, step.detail = "failed", str(error)
    except Exception as error:
        step.state, step.detail = "failed", f"{type(error).__name__}: {error}"
    step.seconds = round(time.perf_counter() - start, 2)
    return step


def compile_kernels(build: Path) -> dict[str, Any]:
    """The libraries and programs of `plugins/`, with CMake."""
    for program in ("cmake", "nvcc"):
        if shutil.which(program) is None:
            raise Skip(f"{program} is not installed")
    root = os.environ.get("TENSORRT_ROOT")
    tensorrt = [f"-DTensorRT_ROOT={root}"] if root else []
    shell(["cmake", "-S", ROOT / "plugins", "-B", build, "-DCMAKE_BUILD_TYPE=Release", *tensorrt])
    shell(["cmake", "--build", build, "--parallel", str(os.cpu_count() or 1)])
    return {"detail": ", ".join(sorted(path.name for path in build.glob("*asag*") if path.is_file()))}


def run_gpu_tests(build: Path) -> dict[str, Any]:
    """Every test that is marked `gpu`."""
    library = build / "libasag_kernels.so"
    extra = {"ASAG_KERNELS_LIBRARY": str(library.resolve())} if library.is_file() else {}
    pytest = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    text = shell([*pytest, ROOT / "tests"], environment=extra)
    return {"detail": text.strip().splitlines()[-1], "output": last_lines(text)}


def sanitize(build: Path, tool: str) -> dict[str, Any]:
    """The kernels' own check under compute-sanitizer."""
    sanitizer, check = shutil.which("compute-sanitizer"), build / "asag_check_device"
    if sanitizer is None:
        raise Skip("compute-sanitizer is not installed")
    if not check.is_file():
        raise Skip(f"there is no {check.name}, since the kernels were not compiled")
    text = shell([sanitizer, "--tool", tool, "--error-exitcode", "9", check])
    return {"detail": last_lines(text, 1), "output": last_lines(text)}


def export(bundle: Path, variant: str) -> dict[str, Any]:
    """A bundle of the full network with random weights, in float16."""
    options = ["--untrained", "--variant", variant, "--precision", "fp16", "--overwrite", "--quiet"]
    shell([sys.executable, "-m", "asag_export.cli", *options, "--output-dir", bundle])
    return {"detail": f"{variant}, fp16, random weights"}


def build_and_judge(bundle: Path, backend: str) -> dict[str, Any]:
    """Engines for this GPU, and whether they detect what ONNX Runtime detects on the CPU."""
    require(backend)
    text = shell([sys.executable, "-m", "asag_deploy.engines.cli", bundle, "--format", backend])
    opened = Bundle.open(bundle)
    shape = (320, 416)
    expected = outputs_of(open_network(None, opened), opened.manifest, shape)
    network = open_network(backend, opened)
    actual = outputs_of(network, opened.manifest, shape)
    differences = {name: difference(expected[name], actual[name]) for name in expected}
    detail = f"logits differ by {differences['logits']}"
    layers = network.layers() if isinstance(network, EngineNetwork) else {}
    return {"detail": detail, "differences": differences, "layers": layers, "output": text}


def check_batches(bundle: Path, backend: str, shape: tuple[int, int]) -> dict[str, Any]:
    """Whether an image is the same alone, in a batch, and beside its like."""
    require(backend)
    return compare_batches(Bundle.open(bundle), backend, *picture(shape))


def check_pictures(bundle: Path, backend: str, build: Path, folder: Path | None) -> dict[str, Any]:
    """Whether the kernels prepare pictures and finish detections to the bit as the CPU does."""
    require(backend)
    with kernels_at(compiled(build)):
        return compare_processing(Bundle.open(bundle), backend, pictures(folder))


def check_loops(
    bundle: Path, backend: str, build: Path, shape: tuple[int, int], repeats: int
) -> dict[str, Any]:
    """Whether the loop on the device is that of the host, and how long it takes beside it."""
    require(backend)
    with kernels_at(compiled(build)):
        return compare_loops(Bundle.open(bundle), backend, *picture(shape), repeats)


def compiled(build: Path) -> Path:
    """The library of the kernels; the step is skipped if there is none."""
    library = build / "libasag_kernels.so"
    if not library.is_file() and LIBRARY_VARIABLE not in os.environ:
        raise Skip(f"there is no {library.name}, since the kernels were not compiled")
    return library


def require(backend: str) -> None:
    """Skip a step whose backend this machine does not have."""
    missing = BACKENDS[backend].available()
    if missing is not None:
        raise Skip(missing)


def difference(expected: Any, actual: Any) -> float | str:
    """The largest one of two arrays, or that they have other shapes."""
    if expected.shape != actual.shape:
        return "all, since other queries passed"
    return float(np.abs(expected - actual).max(initial=0))


def outputs_of(network: Network, manifest: Manifest, shape: tuple[int, int]) -> dict[str, Any]:
    """The decoder's floating outputs for a picture of noise, on the host."""
    image, size = picture(shape)
    probed = detect(network, manifest.probing, StopRule(max_level="P5"), network.upload(image), size)
    count = int(network.download(probed.outputs["anchor_count"]).max())
    return {
        name: network.download(probed.outputs[name])[:, :count] for name in ("logits", "boxes", "anchors")
    }


def time_backend(backend: str, path: Path, shape: tuple[int, int], repeats: int) -> dict[str, Any]:
    """Milliseconds a detection takes to each level, and the share of what comes before probing."""
    require(backend)
    bundle = Bundle.open(path)
    network = open_network(backend, bundle)
    levels: list[Level] = ["P5", *(level.level for level in bundle.manifest.probing.levels)]
    times = {level: time_level(network, bundle.manifest, level, shape, repeats) for level in levels}
    first = times["P5"]
    detail = f"{first['total_ms']['p50']:.2f} ms to P5, of which backbone {first['backbone_ms']['p50']:.2f}"
    data = {"precision": bundle.manifest.precision, "shape": list(shape), "batch": 1, "repeats": repeats}
    return {"detail": detail, **data, "levels": times}


def time_level(
    network: Network, manifest: Manifest, level: Level, shape: tuple[int, int], repeats: int
) -> dict[str, Any]:
    """Wall times of the loop up to a manual stop; the result is read, so that all of it is waited for.

    `backbone` is the stage by itself: backbone, neck and the first level's anchors, with the read of its
    counts.  `rest` is all that follows.  `overhead` is what the loop takes beyond its stages run one by one
    on the same inputs with one wait at the end: decisions, launches and the reads between levels.
    """
    image, size = picture(shape)
    uploaded = network.upload(image)
    recorder = Recorder(network)
    rule = StopRule(max_level=level)
    totals, backbones, stages = [], [], []
    exits: dict[str, int] = {}
    for i in range(WARM_UPS + repeats):
        start = time.perf_counter()
        probed = detect(network, manifest.probing, rule, uploaded, size)
        network.download(probed.outputs["anchor_count"])
        total = time.perf_counter() - start
        if i == 0:
            detect(recorder, manifest.probing, rule, uploaded, size)
        start = time.perf_counter()
        for name, inputs in recorder.calls:
            outputs = network.stage(name)(inputs)
        network.download(outputs["anchor_count"])
        alone = time.perf_counter() - start
        if i >= WARM_UPS:
            totals.append(total)
            stages.append(alone)
            backbones.append(probed.times_ms["backbone"] / 1000)
            exits[probed.levels[-1].level] = exits.get(probed.levels[-1].level, 0) + 1
    rest = [total - backbone for total, backbone in zip(totals, backbones, strict=True)]
    overhead = [total - alone for total, alone in zip(totals, stages, strict=True)]
    return {
        "exits": exits,
        "total_ms": percentiles(totals),
        "backbone_ms": percentiles(backbones),
        "rest_ms": percentiles(rest),
        "overhead_ms": percentiles(overhead),
        "rest_share_of_backbone": round(statistics.median(rest) / statistics.median(backbones), 4),
    }


def picture(shape: tuple[int, int]) -> tuple[Any, Any]:
    """A normalised image of soft noise, float32 (1, 3, H, W), and its size."""
    rng = np.random.default_rng(0)
    coarse = rng.normal(size=(1, 3, shape[0] // 32, shape[1] // 32)).astype(np.float32)
    return coarse.repeat(32, axis=2).repeat(32, axis=3), np.array([shape], dtype=np.int64)


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99 in milliseconds."""
    values = np.percentile(np.array(seconds) * 1000, [50, 90, 99])
    return {name: round(float(value), 4) for name, value in zip(("p50", "p90", "p99"), values, strict=True)}


def describe_machine() -> dict[str, Any]:
    """The GPU, its driver, and the libraries."""
    cuda = open_cuda()
    driver, runtime = cuda.versions()
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "asag-deploy": __version__,
        "gpu": cuda.name,
        "compute_capability": cuda.capability,
        "driver_cuda": driver,
        "runtime_cuda": runtime,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "libraries": versions,
    }


def write_report(output: Path, machine: dict[str, Any], steps: Sequence[Step]) -> None:
    """`gpu_check.json` and `gpu_check.md`."""
    report = {"machine": machine, "steps": [asdict(step) for step in steps]}
    with atomic_write(output / "gpu_check.json") as file:
        file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    with atomic_write(output / "gpu_check.md") as file:
        file.write_text(as_markdown(machine, steps), encoding="utf-8")


def as_markdown(machine: dict[str, Any], steps: Sequence[Step]) -> str:
    """The report for people."""
    gpu = f"{machine['gpu']} ({machine['compute_capability']})"
    lines = ["# GPU check", "", f"{gpu}, {machine['system']}, asag-deploy {machine['asag-deploy']}", ""]
    lines += [f"- {name} {version}" for name, version in machine["libraries"].items()]
    lines += ["", "| step | state | seconds | |", "|---|---|---|---|"]
    for step in steps:
        detail = " ".join(step.detail.split()).replace("|", "/")
        lines.append(f"| {step.name} | {step.state} | {step.seconds} | {detail} |")
    for step in steps:
        if "levels" in step.data:
            lines += ["", f"## {step.name}: {step.data['precision']}, {step.data['shape']}, batch 1", ""]
            lines += ["| to | exits | total | backbone | rest | overhead |", "|---|---|---|---|---|---|"]
            for level, row in step.data["levels"].items():
                cells = [row[f"{key}_ms"]["p50"] for key in ("total", "backbone", "rest", "overhead")]
                lines.append(f"| {level} | {row['exits']} | " + " | ".join(f"{c} ms" for c in cells) + " |")
    return "\n".join(lines) + "\n"


def shell(command: Sequence[str | Path], environment: dict[str, str] | None = None) -> str:
    """Run a program; its output.  Raises BackendError with the end of it if the program fails."""
    arguments = [os.fspath(part) for part in command]
    done = subprocess.run(
        arguments, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **(environment or {})}
    )
    text = done.stdout + done.stderr
    if done.returncode != 0:
        raise BackendError(f"`{' '.join(arguments)}` ended with {done.returncode}: {last_lines(text)}")
    return last_lines(text)


def last_lines(text: str, count: int = LAST_LINES) -> str:
    """The end of a program's output."""
    return "\n".join(text.strip().splitlines()[-count:])


if __name__ == "__main__":
    sys.exit(main())
