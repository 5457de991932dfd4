"""The steps, in the order of what they are worth, and the most seconds each may take."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from asag_bench.gpu_machine.programs import last_lines
from asag_bench.gpu_machine.steps import Failed, Skip, Step
from asag_bench.gpu_machine.work import ONNXRUNTIME, ROOT, Work
from asag_deploy.backends import BACKENDS
from asag_deploy.errors import BackendError

# As in `asag_export.demo.networks`; a test holds that they are the same.
CHECKPOINT = ROOT / "export" / "asag_export" / "asag-a-scenes.safetensors"
SEED = 2
VAL_SPLIT = "val2017"

ENGINES = ("tensorrt-rtx", "tensorrt")
CUDA = "onnxruntime-cuda"
REFERENCES = ("torch-eager-cuda", "torch-cuda", "torch-cuda-device")
COMPILED = ("torch-compile-cuda", "torch-cuda-device")
SHAPE = "800x1088"
VARIANT = "asag-a-r50-100"
HALF, FULL, SCENES, SCENES_HALF = "r50-fp16", "r50-fp32", "scenes-fp32", "scenes-fp16"
"""Bundles that are made in the background: the published size with random weights, and the demo's network."""
DATA = "scenes"
_KERNELS = "tests/plugins/test_on_gpu.py"
_LOOPS = "tests/gpu/"
_OF_ONNXRUNTIME = "tests/deploy/backends/test_onnxruntime_backend.py"
_CHECK = "asag_check_device"
_GPU_MARK = "mark.gpu"
_SANITIZER_FAILED = "9"
_SECONDS_A_ROW = 4
_REHEARSAL = 5
"""How much longer a step may take where a CPU does what a GPU would."""
_FEW = ("--limit", "2", "--warmup", "1")
"""Pictures and calls before, where the CPU is slow."""
_WALL = "loops_wall_ms"
"""What the rows of an exit level have, and no other figure."""
_COMPUTE = ("fp32", "bf16", "fp16")
_PARTS = ("kernels", "graph")
"""Of the kernels' own check."""
_SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")


def plan(work: Work) -> list[Step]:
    """Return the steps, most valuable first; what takes engines is skipped on a GPU that has none."""

    def step(
        name: str,
        limit: float,
        action: Callable[..., dict[str, Any]],
        *given: Any,
        needs: tuple[str, ...] = (),
    ) -> Step:
        patience = 1 if work.gpu else _REHEARSAL
        needed = tuple(dict.fromkeys(_made_for(work, need) for need in needs))
        return Step(name=name, limit=limit * patience, action=partial(action, work, *given), needs=needed)

    files = gpu_tests()
    loops = [file for file in files if file.startswith(_LOOPS)]
    rest = [file for file in files if file not in (_KERNELS, *loops)]
    return [
        step("compile the kernels", 120, compile_kernels),
        step("kernels against the CPU", 60, check_kernels),
        *(step(f"tests: {file}", 120, run_tests, file) for file in (_KERNELS, *loops)),
        step("both loops over PyTorch's stages", 120, time_loops, VARIANT),
        *(step(f"tests: {file}", 120, run_tests, file) for file in rest),
        *(engine_step for name in ENGINES for engine_step in engine_steps(work, step, name)),
        *(step(f"compute-sanitizer {tool}", 60, sanitize, tool) for tool in _SANITIZERS),
        # These need nothing that is still being made.
        *(step(f"a training step in {compute}", 60, train, compute) for compute in _COMPUTE),
        step(f"parity of {CUDA}, float32", 60, judge, CUDA, SCENES, needs=(SCENES,)),
        step(f"parity of {CUDA}, float16", 60, judge, CUDA, SCENES_HALF, needs=(SCENES_HALF,)),
        step(f"AP of {CUDA}", 60, measure_ap, CUDA, needs=(SCENES, DATA)),
        step(f"time {CUDA}, float32", 60, time_backends, CUDA, FULL, needs=(FULL,)),
        step(f"time {CUDA}, float16", 60, time_backends, CUDA, HALF, needs=(HALF,)),
        step("time PyTorch, eager and as graphs", 90, time_references, REFERENCES, needs=(HALF,)),
        # This takes longest, and says least.
        step("time PyTorch, compiled", 120, time_references, COMPILED, needs=(HALF,)),
    ]


def engine_steps(work: Work, step: Callable[..., Step], backend: str) -> Iterator[Step]:
    """Yield the steps of one library: engines are built, judged, and timed with both loops."""
    served = (HALF,) if missing(work, backend) is None else ()
    yield step(f"engines of {backend}", 150, build_engines, backend, needs=served)
    yield step(f"parity of {backend}", 120, judge, backend, HALF, needs=served)
    yield step(f"time {backend}", 60, time_backends, backend, HALF, "host-loop", "device-loop", needs=served)


def begin(work: Work, steps: Sequence[Step]) -> None:
    """Start what takes long and needs no GPU, but for what an earlier run left in the same folder.

    Only what the steps need is made, each on cores of its own.
    """
    export = partial(work.python, "asag_export.cli", "--overwrite", "--quiet", "--keep-failed")
    demo = ("--checkpoint", CHECKPOINT)
    untrained = ("--untrained", "--variant", VARIANT)
    scenes = ("--count", "200", "--seed", str(SEED), "--split", VAL_SPLIT)
    commands = {
        HALF: export(*untrained, "--precision", "fp16", "--output-dir", work.folder / HALF),
        SCENES: export(*demo, "--output-dir", work.folder / SCENES),
        SCENES_HALF: export(*demo, "--precision", "fp16", "--output-dir", work.folder / SCENES_HALF),
        DATA: work.python("asag_evaluation.data.cli", "scenes", *scenes, "--output-dir", work.folder / DATA),
        FULL: export(*untrained, "--output-dir", work.folder / FULL),
    }
    needed = {name for step in steps for name in step.needs}
    missing_ones = [name for name in commands if name in needed and not _is_made(work, name)]
    for place, name in enumerate(missing_ones):
        shutil.rmtree(work.folder / name, ignore_errors=True)  # of a run that was ended
        work.background[name] = work.start(commands[name], beside=(place, len(missing_ones)))


def _is_made(work: Work, name: str) -> bool:
    return (work.folder / name / ("annotations" if name == DATA else "manifest.json")).exists()


def _made_for(work: Work, name: str) -> str:
    """Return what a step works with: without a GPU the small network stands in for the large one."""
    return SCENES if work.gpu is None and name != DATA else name


def gpu_tests() -> list[str]:
    """Return the files with tests for a GPU.

    All of `tests/` cannot be collected where packages are missing.
    """
    found = (path for path in sorted((ROOT / "tests").rglob("test_*.py")))
    return [str(p.relative_to(ROOT)) for p in found if _GPU_MARK in p.read_text(encoding="utf-8")]


def compile_kernels(work: Work, limit: float) -> dict[str, Any]:
    """Compile the libraries and programs of `plugins/`, for this GPU alone."""
    for program in ("cmake", "nvcc"):
        if shutil.which(program) is None:
            raise Skip(f"{program} is not installed")
    end = time.monotonic() + limit
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    architecture = (work.gpu or "sm90").removeprefix("sm")
    options = ["-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_CUDA_ARCHITECTURES={architecture}-real"]
    work.run(["cmake", "-S", ROOT / "plugins", "-B", work.build, *generator, *options], limit)
    work.run(["cmake", "--build", work.build, "--parallel"], end - time.monotonic())
    names = sorted(path.name for path in work.build.glob("*asag*") if path.is_file())
    return {"detail": f"for SM{architecture}: {', '.join(names)}"}


def check_kernels(work: Work, limit: float) -> dict[str, Any]:
    """Check every kernel against the same steps on the CPU, without Python; plugins too, if there are any."""
    program = _checks(work)
    text = work.run([program], limit)
    plugins, library = program.with_name("asag_check_plugins"), _tensorrt()
    if plugins.is_file() and library is not None:
        text += work.run([plugins, library], limit)
    return {"detail": last_lines(text, 1)}


def sanitize(work: Work, tool: str, limit: float) -> dict[str, Any]:
    """Run the kernels' own check under compute-sanitizer, one part after the other.

    What the tool says of one part so stands, whatever ends the other.

    Raises Failed, which tells what the tool found from a tool or a program that broke off.
    """
    program = _checks(work)
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        raise Skip("compute-sanitizer is not installed")
    command: list[str | Path] = [sanitizer, "--tool", tool, "--error-exitcode", _SANITIZER_FAILED, program]
    end = time.monotonic() + limit
    said, passed = [], True
    for part in _PARTS:
        try:
            words = last_lines(work.run([*command, part], end - time.monotonic()), 1).strip("= ")
        except BackendError as error:
            passed = False
            found = f"ended with {_SANITIZER_FAILED}:" in str(error)
            words = f"{'errors were found' if found else 'broke off, which is no finding'}: {error}"
        said.append(f"{part}: {words}")
    if not passed:
        raise Failed("; ".join(said), {})
    return {"detail": "; ".join(said)}


def run_tests(work: Work, file: str, limit: float) -> dict[str, Any]:
    """Run one file of tests in a process of its own: a crash takes only these down."""
    return work.tests(file, limit, packages=[ONNXRUNTIME] if file == _OF_ONNXRUNTIME else [])


def build_engines(work: Work, backend: str, limit: float) -> dict[str, Any]:
    """Build engines for this GPU, beside the bundle's graphs."""
    require(work, backend)
    end = time.monotonic() + limit
    bundle = work.made(HALF, limit)
    plugins = work.build / "libasag_plugins.so"
    more: list[str | Path] = ["--plugins", plugins] if backend == "tensorrt" and plugins.is_file() else []
    command = work.python("asag_deploy.engines.cli", bundle, "--format", backend, *more)
    text = work.run(command, end - time.monotonic())
    return {"detail": last_lines(text, 1)}


def judge(work: Work, backend: str, bundle: str, limit: float) -> dict[str, Any]:
    """Put the exporter's parity gate to a backend, against PyTorch on the CPU."""
    backend = stand_in(work, backend)
    require(work, backend)
    end = time.monotonic() + limit
    path = work.made(_made_for(work, bundle), limit)
    output = work.folder / f"parity-{backend}-{bundle}.json"
    weights: list[str | Path] = ["--checkpoint", CHECKPOINT] if path.name in (SCENES, SCENES_HALF) else []
    command = work.asag_bench("parity", path, "--backend", backend, *weights)
    text = work.run([*command, "--output", output], end - time.monotonic(), [ONNXRUNTIME])
    return {"detail": last_lines(text, 1), "parity": json.loads(output.read_text(encoding="utf-8"))}


def measure_ap(work: Work, backend: str, limit: float) -> dict[str, Any]:
    """Measure AP and times on the demo's scenes, as the trained network finds them."""
    backend = stand_in(work, backend)
    require(work, backend)
    end = time.monotonic() + limit
    bundle = work.made(SCENES, limit)
    data = work.made(DATA, end - time.monotonic())
    options: list[str | Path] = ["--data", data, "--backend", backend, "--duration", "1"]
    found = work.bench([bundle, *options, *_few(work)], end - time.monotonic(), [ONNXRUNTIME])
    accuracy = found["result"]["accuracy"].get(backend, {}).get("ap")
    if accuracy is not None:
        found["detail"] = f"AP {100 * accuracy:.1f}; {found['detail']}"
    return found


def time_backends(work: Work, backend: str, bundle: str, *more: Any) -> dict[str, Any]:
    """Time each exit level at the published size; `more` are references, and the limit at last."""
    *references, limit = more
    backend = stand_in(work, backend)
    require(work, backend)
    end = time.monotonic() + limit
    options: list[str | Path] = ["--backend", backend]
    options += ["--reference", ",".join(references)] if references else []
    options += ["--shape", SHAPE] if work.gpu else []
    options += ["--duration", str(_SECONDS_A_ROW if work.gpu else 1), *_few(work)]
    path = work.made(_made_for(work, bundle), limit)
    return work.bench([path, *options], end - time.monotonic(), [ONNXRUNTIME])


def time_references(work: Work, references: Sequence[str], limit: float) -> dict[str, Any]:
    """Time PyTorch on the GPU, beside ONNX Runtime: there if it was carried, else by few calls on the CPU."""
    on_gpu = work.gpu is not None and missing(work, CUDA) is None
    if work.gpu is None:
        references = ("torch",)  # on the CPU
    end = time.monotonic() + limit
    bundle = work.made(_made_for(work, HALF), limit)
    options: list[str | Path] = ["--backend", CUDA if on_gpu else "onnxruntime"]
    options += ["--reference", ",".join(references)]
    options += ["--shape", SHAPE] if work.gpu else ["--checkpoint", CHECKPOINT]
    options += ["--duration", str(_SECONDS_A_ROW), *(_few(work) if on_gpu else _FEW)]
    return work.bench([bundle, *options], end - time.monotonic(), [ONNXRUNTIME])


def time_loops(work: Work, variant: str, limit: float) -> dict[str, Any]:
    """Return the figures of `asag-bench torch-cuda-loop`, which writes them as they come.

    Raises Failed with those that there are if it fails or takes too long.
    """
    work.need_gpu()
    output = work.folder / "loops.json"
    try:
        work.run(work.asag_bench("torch-cuda-loop", "--variant", variant, "--output", output), limit)
    except BackendError as error:
        raise Failed(str(error), _loop_figures(output)) from error
    figures = _loop_figures(output)
    return {"detail": "; ".join(_rows_in_words(figures.get("result", {}))), **figures}


def _loop_figures(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return {"result": result, "page": _loop_page(result)}


def _loop_exits(result: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, row in result.items():
        if isinstance(row, Mapping) and _WALL in row:
            yield name, row


def _rows_in_words(result: Mapping[str, Any]) -> Iterator[str]:
    for name, row in _loop_exits(result):
        wall = row[_WALL]
        yield f"{name}: host {wall['host']:.2f} ms, device {wall['device']:.2f}, eager {wall['eager']:.2f}"


def _loop_page(result: Mapping[str, Any]) -> str:
    """Tell wall times by exit level, and what the graph takes with and without conditional nodes."""
    lines = [
        "| stops at | eager | host's loop | device's loop | times as fast | deciding | largest difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in _loop_exits(result):
        wall, deciding = row[_WALL], row["deciding_us"]
        cells = [name, *(f"{wall[side]:.2f} ms" for side in ("eager", "host", "device"))]
        cells.append(f"{row['times_as_fast_as_eager']:.2f}")
        cells.append(", ".join(f"{value:.0f} us ({side})" for side, value in deciding.items()))
        lines.append(f"| {' | '.join([*cells, str(row['largest_difference'])])} |")
    parts = result.get("parts", {})
    told = ", ".join(f"{name} {value:.3f} ms" for name, value in parts.items())
    return "\n".join([*lines, "", f"Stages one by one: {told or 'not measured'}."])


def train(work: Work, compute: str, limit: float) -> dict[str, Any]:
    """Time a training step and its parts."""
    output = work.folder / f"training-{compute}.json"
    options: list[str | Path] = ["--set", f"optimisation.compute={compute}", "--output", output]
    options += ["--device", "cuda"] if work.gpu else ["--side", "64", "--updates", "1", "--warm-up", "0"]
    work.run(work.asag_bench("training-step", *options), limit)
    result = json.loads(output.read_text(encoding="utf-8"))
    return {"detail": f"{result['update_ms']['median']} ms an update", "result": result}


def require(work: Work, backend: str) -> None:
    """Skip a step whose backend this machine does not have, in the backend's own words."""
    if backend in ENGINES:
        work.need_gpu()
    reason = missing(work, backend)
    if reason is not None:
        raise Skip(reason)


def missing(work: Work, backend: str) -> str | None:
    """Say why a backend cannot run; None if it can, or if its library was carried and has to show it."""
    carried = backend.startswith(CUDA) and ONNXRUNTIME in work.packages
    problem = None if carried else BACKENDS[backend].problem()
    return None if problem is None else str(problem)


def stand_in(work: Work, backend: str) -> str:
    """Return the backend that is rehearsed where there is no GPU: the same library on the CPU."""
    return "onnxruntime" if work.gpu is None and backend.startswith(CUDA) else backend


def _few(work: Work) -> Sequence[str]:
    """Ask for so few pictures that a rehearsal takes seconds."""
    return () if work.gpu else _FEW


def _tensorrt() -> Path | None:
    """Find TensorRT's library, in the folder whose headers the plugins were compiled with."""
    root = Path(os.environ.get("TENSORRT_ROOT", ""))
    found = (
        path for name in ("nvinfer", "nvinfer_lean") for path in sorted(root.glob(f"lib/lib{name}.so.*"))
    )
    return next(found, None) if "TENSORRT_ROOT" in os.environ else None


def _checks(work: Work) -> Path:
    program = work.build / _CHECK
    if not program.is_file():
        raise Skip(f"there is no {program.name}, since the kernels were not compiled")
    work.need_gpu()
    return program
