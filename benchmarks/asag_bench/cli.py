"""`asag-bench`: each command reads its options, calls one function, and says what that found."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from asag_bench.front.commands import (
    add_eval_peer,
    add_front,
    add_train_peer,
    eval_peer,
    front,
    train_peer,
)
from asag_bench.gmacs.commands import add_gmacs, gmacs
from asag_bench.measuring.plan import Plan
from asag_bench.measuring.timing import AGREEMENT
from asag_bench.reports.columns import COLUMNS
from asag_bench.reports.page import PLOT, RESULTS
from asag_bench.reports.report import FIGURES
from asag_bench.result import Options, json_text, read_result, read_shape
from asag_bench.runners.references import REFERENCES
from asag_deploy.atomic import atomic_write_text, check_spares, check_writable, check_writable_file
from asag_deploy.command_line import (
    ALL_FINE,
    MOST_PIXELS,
    MOST_SECONDS,
    MOST_THREADS,
    SOME_FAILED,
    OneSentenceParser,
    exit_code,
    listed,
    numbers,
    real_number,
    whole_number,
)
from asag_deploy.detector_options import add_detector_options, backends_of, detector_options
from asag_deploy.errors import ConfigError, ParityError
from asag_deploy.plain_numbers import LARGEST, unsigned
from asag_deploy.replacing import check_own_file, check_own_folder, is_json_with
from asag_evaluation.data.orientation import add_orientation_option
from asag_training.settings import WEIGHTS_CHOICES

PROGRAM = "asag-bench"
_LIST: dict[str, Any] = {"action": "append", "default": []}
"""An option that takes several values, with commas or by giving it again."""

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run `asag-bench` with these arguments (None: the command line's) and return its exit code.

    0: measured, stable or not; 1: something failed, or does not agree; 2: nothing could be measured, with the
    reason in one sentence on stderr; 130, 143 or 129: interrupted by Ctrl-C, SIGTERM or SIGHUP.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)

    def command() -> int:
        options = _parser().parse_args(arguments)
        options.command = f"{PROGRAM} {shlex.join(arguments)}"
        try:
            return int(options.run(options))
        except KeyboardInterrupt:
            print(f"{PROGRAM}: {options.interrupted}", file=sys.stderr)
            raise

    return exit_code(PROGRAM, command)


def _parser() -> argparse.ArgumentParser:
    """Build the parser of all commands; `run` of what it parses is the function that does it."""
    top = OneSentenceParser(prog=PROGRAM, description="Measure what bundles, training and machines do.")
    top.set_defaults(interrupted="interrupted")
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    for name, summary, add, run in (
        ("run", "what a bundle costs, by exit level, and beside references", _add_run, _run),
        (
            "throughput",
            "how many images a second it gets through, by calling method",
            _add_throughput,
            _throughput,
        ),
        ("compare", "whether two results of `run` agree within what they claim", _add_compare, _compare),
        ("page", "write the page of recorded results, and the plot of docs/speed.md", _add_page, _page),
        ("demo", "measure the network that comes with the project", _add_demo, _demo),
        ("parity", "put the exporter's parity gate to a bundle on any backend", _add_parity, _parity),
        ("training-step", "what an update of a training run costs", _add_training_step, _training_step),
        (
            "annotations",
            "what opening the annotations of a large data set takes",
            _add_annotations,
            _annotations,
        ),
        ("torch-cuda-loop", "what the loop on the GPU costs beside the host's", _add_loop, _torch_cuda_loop),
        ("train-peer", "train a detector of another kind beside a light network", add_train_peer, train_peer),
        ("eval-peer", "the accuracy of such a detector", add_eval_peer, eval_peer),
        (
            "gmacs",
            "what an image costs in multiply-accumulates, beside the paper",
            add_gmacs,
            gmacs,
        ),
        ("front", "accuracy against time, of light networks beside their peers", add_front, front),
    ):
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        add(command)
        command.set_defaults(run=run)
    gpu = commands.add_parser("gpu", help="everything that takes an NVIDIA GPU, with one report")
    steps = gpu.add_subparsers(metavar="COMMAND", required=True)
    _add_gpu_run(steps.add_parser("run", help="on the machine with the GPU: all steps, with one report"))
    _add_gpu_archive(
        steps.add_parser("archive", help="anywhere with a network: what to carry to that machine")
    )
    return top


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        f"References: {'; '.join(f'{name}, {text}' for name, text in REFERENCES.items())}.  "
        f"Columns: {'; '.join(f'{column.title}, {column.measured}' for column in COLUMNS)}."
    )
    add = parser.add_argument
    text = "a bundle's folder or address; several of one network"
    add("bundles", type=Path, nargs="+", metavar="BUNDLE", help=text)
    _add_pictures(parser)
    add("--data", type=Path, metavar="DIR", help="a data set in COCO layout: pictures to time, and its AP")
    add_orientation_option(parser)
    add("--precision", **_LIST, metavar="P,...", help="only these of fp32, fp16, bf16, int8 (default: all)")
    add("--batch", **_LIST, type=numbers(whole_number(1)), metavar="N,...", help="images a call (default: 1)")
    add("--reference", **_LIST, metavar="NAME,...", help="time these beside it, listed below")
    add("--baseline", metavar="NAME", help="whose speed counts as 1 (default: torch, or the first)")
    text = "what the bundle was made from, or its address, for PyTorch"
    add("--checkpoint", type=Path, metavar="FILE", help=text)
    _add_weights(parser)
    add(
        "--duration",
        type=real_number(0, MOST_SECONDS, above=True),
        default=60.0,
        metavar="S",
        help="most for an image group (default: 60)",
    )
    add(
        "--warmup",
        type=whole_number(0),
        default=3,
        metavar="N",
        help="calls of each shape before timing (default: 3)",
    )
    add(
        "--percentile",
        type=numbers(real_number(0, 100)),
        default="50,90,95,99",
        metavar="P,...",
        help="of the times (default: 50,90,95,99)",
    )
    add(
        "--memory-images",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="memory that N pictures of many sizes add",
    )
    add("--output-dir", type=Path, metavar="DIR", help="write result.json, result.md and plots to DIR")
    add("--no-plots", action="store_true", help="no plots beside result.json and result.md")
    add("--quiet", action="store_true", help="no progress and no table")
    add_detector_options(parser, several_backends=True, limits=False)


def _add_weights(parser: argparse.ArgumentParser) -> None:
    text = "which of the checkpoint's weights: those trained (default), or their average, EMA"
    parser.add_argument("--weights", choices=WEIGHTS_CHOICES, default=WEIGHTS_CHOICES[0], help=text)


def _add_pictures(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--images", type=Path, metavar="DIR", help="pictures to time (default: generated scenes)")
    add("--limit", type=whole_number(1), metavar="N", help="use the first N pictures only")
    add("--shape", metavar="HxW", help="generate or resize pictures to this height and width")


def plan_of(options: argparse.Namespace) -> Plan:
    """Read the options of `run`.  Raises ConfigError where they make no sense."""
    return Plan(
        command=options.command,
        bundles=tuple(options.bundles),
        images=options.images,
        data=options.data,
        orientation=options.orientation,
        limit=options.limit,
        baseline=options.baseline,
        checkpoint=options.checkpoint,
        weights=options.weights,
        options=Options(
            backends=backends_of(options),
            precisions=listed(options.precision),
            batches=_whole(options.batch or ["1"]),
            references=listed(options.reference),
            mode=options.mode,
            threads=options.threads,
            shape=None if options.shape is None else read_shape(options.shape),
            duration_s=options.duration,
            warmup=options.warmup,
            percentile=tuple(float(part) for part in options.percentile.split(",")),
            max_level=options.max_level,
            deadline_ms=options.deadline_ms,
            loop=options.loop,
            requests=options.requests,
            memory_images=options.memory_images,
        ),
        quiet=options.quiet,
    )


def _run(options: argparse.Namespace) -> int:
    from asag_bench.measuring.run import run
    from asag_bench.reports.report import check_report, on_screen, write_report
    from asag_evaluation.plots import check_plots

    plan = plan_of(options)
    plots = options.output_dir is not None and not options.no_plots
    if plots:
        check_plots("asag-bench")
    if options.output_dir is not None:
        check_report(options.output_dir)
        check_writable(options.output_dir)  # before what takes minutes
    result = run(plan)
    if options.output_dir is not None:
        write_report(result, options.output_dir, plots=plots)
    if not options.quiet:
        print(on_screen(result))
    return ALL_FINE


def _add_throughput(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("bundle", type=Path, metavar="BUNDLE", help="a bundle's folder or address")
    _add_pictures(parser)
    add(
        "--batch",
        **_LIST,
        type=numbers(whole_number(2)),
        metavar="N,...",
        help="sizes of batches (default: 4)",
    )
    add(
        "--duration",
        type=real_number(0, MOST_SECONDS, above=True),
        default=120.0,
        metavar="S",
        help="most seconds in all (default: 120)",
    )
    add(
        "--window",
        type=real_number(0, MOST_SECONDS, above=True),
        default=2.0,
        metavar="S",
        help="least seconds one by one (default: 2)",
    )
    add("--output-dir", type=Path, metavar="DIR", help="write throughput.json and throughput.md to DIR")
    add("--quiet", action="store_true", help="no progress and no table")
    several = {**_LIST, "dest": "several_requests", "metavar": "N,..."}
    several["type"] = numbers(whole_number(2, MOST_THREADS))
    add("--requests", **several, help="concurrent requests (default: 2, and as many as cores)")
    add_detector_options(parser, own_requests=True, limits=False)


def _throughput(options: argparse.Namespace) -> int:
    from asag_bench.measuring.machine import describe_machine
    from asag_bench.measuring.throughput import ThroughputPlan, measure
    from asag_bench.reports.columns import on_screen
    from asag_bench.reports.throughput import markdown, rows

    cores = describe_machine().cores
    plan = ThroughputPlan(
        command=options.command,
        bundle=options.bundle,
        images=options.images,
        limit=options.limit,
        shape=None if options.shape is None else read_shape(options.shape),
        detector=detector_options(options),
        batches=_whole(options.batch or ["4"]),
        requests=_whole(options.several_requests or [f"2,{max(cores, 2)}"]),
        duration=options.duration,
        window=options.window,
        quiet=options.quiet,
    )
    if options.output_dir is not None:
        is_own = is_json_with("command", "machine", "bundle")
        check_own_folder(options.output_dir, ("throughput.json", "throughput.md"), is_own, FIGURES)
        check_writable(options.output_dir)
    result = measure(plan)
    if options.output_dir is not None:
        atomic_write_text(options.output_dir / "throughput.json", json_text(result))
        atomic_write_text(options.output_dir / "throughput.md", markdown(result))
    if not plan.quiet:
        print("\n".join(on_screen(rows(result))))
    return ALL_FINE


def _add_compare(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("results", type=Path, nargs=2, metavar="RESULT", help="a result.json")
    add(
        "--tolerance",
        type=real_number(0, 1),
        default=AGREEMENT,
        metavar="T",
        help="the most apart (default: 0.05)",
    )


def _compare(options: argparse.Namespace) -> int:
    from asag_bench.reports.compare import compare

    first, second = (read_result(path) for path in options.results)
    text, agree = compare(first, second, options.tolerance)
    print(text)
    return ALL_FINE if agree else SOME_FAILED


def _add_page(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--results", type=Path, default=RESULTS, metavar="DIR", help="results (default: %(default)s)")
    add("--plot", type=Path, default=PLOT, metavar="FILE", help="the plot (default: %(default)s)")


def _page(options: argparse.Namespace) -> int:
    from asag_bench.reports.page import write_page

    print("\n".join(write_page(options.results, options.plot)))
    return ALL_FINE


def _add_demo(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--output-dir", type=Path, default=Path("bench-output"), metavar="DIR", help="default: %(default)s")
    add("--scenes", type=whole_number(1), default=60, metavar="N", help="how many (default: 60)")
    add(
        "--duration",
        type=real_number(0, MOST_SECONDS, above=True),
        default=30.0,
        metavar="S",
        help="most for an image group (default: 30)",
    )


def _demo(options: argparse.Namespace) -> int:
    from asag_bench.demo import bench_demo

    given = {"scenes": options.scenes, "duration": options.duration}
    bench_demo(options.output_dir, **given, command=options.command)
    return ALL_FINE


def _add_parity(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("bundle", type=Path, metavar="BUNDLE", help="the bundle's folder or address")
    add("--backend", required=True, metavar="B", help="what runs it")
    text = "what it was exported from, or its address (default: --untrained)"
    add("--checkpoint", type=Path, metavar="FILE", help=text)
    _add_weights(parser)
    add("--output", type=Path, metavar="FILE", help="write the report here too")


def _parity(options: argparse.Namespace) -> int:
    from asag_bench.measuring.parity import judge
    from asag_export.gate.parity import format_report

    _check_output(options, "passed", "stages", "runs")
    report = judge(options.bundle, options.backend, options.checkpoint, options.weights)
    if options.output is not None:
        atomic_write_text(options.output, json.dumps(report.to_dict(), indent=1) + "\n")
    print(format_report(report))
    if not report.passed:
        raise ParityError(f"the bundle at '{options.bundle}' failed the parity gate on {options.backend}")
    return ALL_FINE


def _add_training_step(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--recipe", default="asag-a-r50-100-1x", metavar="NAME", help="(default: %(default)s)")
    changes: dict[str, Any] = {"dest": "changes", "action": "append", "default": []}
    add("--set", **changes, metavar="PART.NAME=VALUE", help="change a setting of the recipe")
    add(
        "--batch",
        type=whole_number(1),
        default=2,
        metavar="N",
        help="images an update (default: %(default)s)",
    )
    add(
        "--side",
        type=whole_number(32, MOST_PIXELS),
        default=640,
        metavar="PIXELS",
        help="side of the images (default: %(default)s)",
    )
    add("--updates", type=whole_number(1), default=10, metavar="N", help="that count (default: %(default)s)")
    add(
        "--warm-up",
        type=whole_number(0),
        default=2,
        metavar="N",
        help="before, that do not (default: %(default)s)",
    )
    add(
        "--workers",
        type=whole_number(0, MOST_THREADS),
        default=2,
        metavar="N",
        help="processes that read images (default: 2)",
    )
    add(
        "--threads",
        type=whole_number(1, MOST_THREADS),
        default=2,
        metavar="N",
        help="of PyTorch on the CPU (default: %(default)s)",
    )
    add("--device", default="cpu", metavar="D", help="cpu or cuda (default: %(default)s)")
    add("--output", type=Path, metavar="FILE", help="write the result here too")


def _training_step(options: argparse.Namespace) -> int:
    from asag_bench.measuring.training_step import TrainingStepPlan, measure

    plan = TrainingStepPlan(
        recipe=options.recipe,
        changes=tuple(options.changes),
        batch=options.batch,
        side=options.side,
        updates=options.updates,
        warm_up=options.warm_up,
        workers=options.workers,
        threads=options.threads,
        device=options.device,
    )
    _check_output(options, "command", "machine")
    text = json.dumps({"command": options.command, **measure(plan)}, indent=2)
    if options.output is not None:
        atomic_write_text(options.output, text + "\n")
    print(text)
    return ALL_FINE


def _add_annotations(parser: argparse.ArgumentParser) -> None:
    add, count = parser.add_argument, whole_number(1)
    add("--images", type=count, default=118_287, metavar="N", help="(default: %(default)s, COCO's)")
    add("--objects", type=count, default=860_001, metavar="N", help="(default: %(default)s, COCO's)")
    add("--repeats", type=count, default=3, metavar="N", help="of what takes seconds (default: %(default)s)")
    add("--output", type=Path, metavar="FILE", help="write the result here too")


def _annotations(options: argparse.Namespace) -> int:
    from asag_bench.measuring.annotations import AnnotationsPlan, measure

    plan = AnnotationsPlan(images=options.images, objects=options.objects, repeats=options.repeats)
    _check_output(options, "command", "machine")
    text = json.dumps({"command": options.command, **measure(plan)}, indent=2)
    if options.output is not None:
        atomic_write_text(options.output, text + "\n")
    print(text)
    return ALL_FINE


def _add_loop(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--variant", default="asag-a-r50-100", metavar="NAME", help="random weights (default: %(default)s)")
    add("--checkpoint", type=Path, metavar="FILE", help="trained weights instead, a file or its address")
    _add_weights(parser)
    add("--precision", choices=("fp16", "fp32"), default="fp16", help="default: %(default)s")
    add("--shape", default="800x1088", metavar="HxW", help="of the image (default: %(default)s)")
    add(
        "--repeats",
        type=whole_number(1),
        default=100,
        metavar="N",
        help="times that count (default: %(default)s)",
    )
    add("--output", type=Path, metavar="FILE", help="write the figures there as JSON")


def _torch_cuda_loop(options: argparse.Namespace) -> int:
    from asag_bench.measuring.torch_cuda_loop import LoopPlan, measure_plan

    plan = LoopPlan(
        variant=options.variant,
        checkpoint=options.checkpoint,
        weights=options.weights,
        precision=options.precision,
        shape=read_shape(options.shape),
        repeats=options.repeats,
    )
    _check_output(options, "machine")
    result: dict[str, Any] = {}

    def note(name: str, value: Any) -> None:
        """Print a figure, and write all of them, as it comes."""
        result[name] = value
        print(f"{name}: {json.dumps(value)}", flush=True)
        if options.output is not None:
            atomic_write_text(options.output, json.dumps(result, indent=1) + "\n")

    measure_plan(plan, note)
    return ALL_FINE


def _add_gpu_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--output-dir", metavar="DIR", type=Path, default=Path("gpu-report"), help="default %(default)s")
    add("--carried", metavar="FILE", type=Path, help="the archive that `archive` made")
    add(
        "--seconds",
        metavar="S",
        type=real_number(0, MOST_SECONDS, above=True),
        default=480.0,
        help="for all of it (default: 480)",
    )
    add("--work-dir", metavar="DIR", type=Path, help="for what is made on the way (default: a temporary one)")
    add("--only", metavar="TEXT", action="append", default=[], help="only steps with this in their name")
    add("--rehearse", action="store_true", help="without a GPU: do whatever does not need one")
    parser.set_defaults(run=_gpu_run)


def _gpu_run(options: argparse.Namespace) -> int:
    from asag_bench.gpu_machine.run import run_all

    failed = run_all(
        options.output_dir,
        carried=options.carried,
        seconds=options.seconds,
        work_dir=options.work_dir,
        only=options.only,
        rehearse=options.rehearse,
        command=options.command,
    )
    return SOME_FAILED if failed else ALL_FINE


def _add_gpu_archive(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    output = Path("build/gpu-packages.tar.xz")
    add("--output", metavar="FILE", type=Path, default=output, help="default %(default)s")
    add("--wheel", metavar="FILE", type=Path, **_LIST, help="default: downloaded with pip")
    add("--gpu", metavar="SM", default="sm90", help="whose machine code is kept (default %(default)s)")
    add("--python", metavar="V", default="3.12", help="that machine's Python (default %(default)s)")
    add(
        "--limit-mib",
        metavar="N",
        type=real_number(0, LARGEST, above=True),
        default=64.0,
        help="with the tree (default: 64)",
    )
    parser.set_defaults(run=_gpu_archive)


def _gpu_archive(options: argparse.Namespace) -> int:
    from asag_bench.gpu_machine.archive import make_archive
    from asag_bench.gpu_machine.work import ROOT

    capability = unsigned(options.gpu.removeprefix("sm"))
    if capability is None:
        raise ConfigError(f"--gpu is '{options.gpu}'; expected a compute capability, such as sm90")
    carried = make_archive(
        options.output,
        ROOT,
        wheels=options.wheel,
        gpu=capability,
        limit_mib=options.limit_mib,
        python=options.python,
    )
    print(f"{options.output}: {carried}, of at most {options.limit_mib:g} MiB")
    carry = shlex.join(("python", "benchmarks", "gpu", "run", "--carried", str(options.output)))
    print(f"carry the tree and this file; there: {carry}")
    return ALL_FINE


def _check_output(options: argparse.Namespace, *keys: str) -> None:
    """Raise OutputError, before what takes minutes, if `--output` cannot be written or is what is read, or a
    file that is no JSON object with these keys."""
    check_own_file(options.output, is_json_with(*keys), FIGURES)
    check_writable_file(options.output)
    if options.output is not None:
        check_spares(options.output, getattr(options, "checkpoint", None))


def _whole(values: Sequence[str]) -> tuple[int, ...]:
    return tuple(int(value) for value in listed(values))


if __name__ == "__main__":
    sys.exit(main())
