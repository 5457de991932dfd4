"""How many images a second a bundle gets through on this machine, and what each way of calling it is worth.

    python -m asag_bench.measuring.throughput BUNDLE [--backend B] [--batch N,...]
        [--requests N,...] [--output-dir DIR]

Compared are calls one by one, batches of one size, concurrent requests that divide the threads among them,
and the pipeline that reads and decodes files meanwhile.  Every round gives the same pictures to all of them,
beginning with another one each time, until the last three rounds of each agree within 5% or the time is up.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from asag_bench.cli import parse_shape
from asag_bench.measuring.machine import describe_machine
from asag_bench.measuring.plan import check_shape
from asag_bench.measuring.samples import generated_pictures, network_shape, read_pictures, resized_pictures
from asag_bench.measuring.statistics import Latencies, ratio
from asag_bench.reports.report import columns, markdown_table
from asag_deploy import Bundle, Detections, Detector
from asag_deploy.atomic import atomic_write
from asag_deploy.backends import DEFAULT_BACKEND
from asag_deploy.bundle.manifest import Preprocessing
from asag_deploy.command_line import ALL_FINE, OneSentenceParser, exit_code
from asag_deploy.errors import ConfigError
from asag_deploy.images.reading import ImageLike, RgbImage, read_image
from asag_deploy.images.writing import write_picture
from asag_deploy.pipeline import BatchesBySize

PROGRAM = "asag_bench.measuring.throughput"
_CONFIDENT = 0.3
_ONE_BY_ONE = "one by one"
_FROM_FILES = "one by one, from files"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the user asked for.  Raises ConfigError when it makes no sense."""

    command: str
    bundle: Path
    images: Path | None
    limit: int | None
    shape: tuple[int, int] | None
    backend: str
    batches: tuple[int, ...]
    requests: tuple[int, ...]
    threads: int | None
    duration: float
    window: float
    quiet: bool

    def __post_init__(self) -> None:
        for option, value, least in (
            *(("--batch", size, 2) for size in self.batches),
            *(("--requests", number, 2) for number in self.requests),
            *(() if self.limit is None else (("--limit", self.limit, 1),)),
        ):
            if value < least:
                why = "; one by one is measured in any case" if least == 2 else ""
                raise ConfigError(f"{option} is {value}; expected at least {least}{why}")
        for option, seconds in (("--duration", self.duration), ("--window", self.window)):
            if not 0 < seconds < math.inf:
                raise ConfigError(f"{option} is {seconds:g}; expected more than 0 seconds")


@dataclass(frozen=True, kw_only=True, eq=False)
class Pictures:
    """The same pictures as files and in memory."""

    origin: str
    files: list[Path]
    images: list[RgbImage]
    skipped: list[str]


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to get all pictures detected in."""

    name: str
    base: str
    """The way that does the same one by one."""
    run: Callable[[], Iterable[Detections]]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write.

    Returns 0 when measured, stable or not, 2 with the reason in one sentence on stderr, 130 if interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = f"python -m {PROGRAM} {shlex.join(arguments)}"
    return exit_code(PROGRAM, lambda: _run(_parser().parse_args(arguments), command))


def _parser() -> argparse.ArgumentParser:
    summary = "Measure how many images a second a bundle gets through, called in several ways."
    parser = OneSentenceParser(prog=PROGRAM, description=summary)
    add = parser.add_argument
    add("bundle", type=Path, metavar="BUNDLE", help="a bundle's folder")
    add("--images", type=Path, metavar="DIR", help="pictures (default: generated scenes)")
    add("--limit", type=int, metavar="N", help="use the first N pictures only")
    add("--shape", metavar="HxW", help="pictures of this height and width: generated or resized before")
    add("--backend", default=DEFAULT_BACKEND, metavar="B", help=f"(default: {DEFAULT_BACKEND})")
    add("--batch", default="4", metavar="N,...", help="sizes of batches (default: 4)")
    add("--requests", metavar="N,...", help="concurrent requests (default: 2, and as many as cores)")
    add("--threads", type=int, metavar="N", help="CPU threads in all (default: the backend's choice)")
    add("--duration", type=float, default=120.0, metavar="S", help="most seconds in all (default: 120)")
    add("--window", type=float, default=2.0, metavar="S", help="least seconds one by one (default: 2)")
    add("--output-dir", type=Path, metavar="DIR", help="write throughput.json and throughput.md to DIR")
    add("--quiet", action="store_true", help="no progress and no table")
    return parser


def _run(options: argparse.Namespace, command: str) -> int:
    cores = describe_machine()["cores"]
    plan = Plan(
        command=command,
        bundle=options.bundle,
        images=options.images,
        limit=options.limit,
        shape=None if options.shape is None else parse_shape(options.shape),
        backend=options.backend,
        batches=_numbers("--batch", options.batch),
        requests=_numbers("--requests", options.requests or f"2,{max(cores, 2)}"),
        threads=options.threads,
        duration=options.duration,
        window=options.window,
        quiet=options.quiet,
    )
    result = measure(plan)
    if options.output_dir is not None:
        with atomic_write(options.output_dir / "throughput.json") as temporary:
            temporary.write_text(json.dumps(result, allow_nan=False, indent=1) + "\n", encoding="utf-8")
        with atomic_write(options.output_dir / "throughput.md") as temporary:
            temporary.write_text(markdown(result), encoding="utf-8")
    if not plan.quiet:
        print("\n".join(columns(rows(result))))
    return ALL_FINE


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise ConfigError(f"{option} is '{text}'; expected whole numbers, such as 2,4") from None


def measure(plan: Plan) -> dict[str, Any]:
    """All ways of one bundle, as plain JSON values.

    Raises what loading the bundle does, and SourceError where there are no pictures.
    """
    bundle = Bundle.open(plan.bundle)
    spec = bundle.manifest.preprocessing
    check_shape(plan.shape, spec)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        pictures = _pictures(plan, folder)
        ways = _ways(plan, bundle, pictures, stack)
        found = {way.name: list(way.run()) for way in ways}  # which warms up every shape, too
        repeats = _repeats(ways[0], plan.window)
        latencies = _measure_all(plan, ways, repeats * len(pictures.images), repeats)
    return {
        "command": plan.command,
        "machine": describe_machine(),
        "bundle": _describe(bundle),
        "backend": plan.backend,
        "threads": plan.threads,
        "input": {
            "origin": pictures.origin,
            "pictures": len(pictures.images),
            "repeated": repeats,
            "skipped": pictures.skipped,
            "network_shapes": _shapes(pictures.images, spec),
            "exit_levels": dict(Counter(each.trace.exit_level for each in found[ways[0].name])),
        },
        "stable": all(each.stable for each in latencies.values()),
        "ways": {
            way.name: {
                "images_per_second": round(latencies[way.name].images_per_second(), 3),
                "stable": latencies[way.name].stable,
                "compared_with": way.base,
                "times_as_fast": ratio(latencies[way.base].samples, latencies[way.name].samples),
                "detections": sum(len(each.filter(_CONFIDENT)) for each in found[way.name]),
                "rounds_s": [round(sample / 1000, 4) for sample in latencies[way.name].samples],
            }
            for way in ways
        },
    }


def _pictures(plan: Plan, folder: Path) -> Pictures:
    """The user's own files where nothing has to be changed about them, else JPEG files in `folder`."""
    skipped: list[str] = []
    if plan.images is None:
        origin, named = "generated scenes", generated_pictures(shape=plan.shape)[: plan.limit]
    else:
        origin = f"pictures of a folder{'' if plan.shape is None else ', resized'}"
        named, skipped = read_pictures(plan.images, plan.limit)
    if plan.images is not None and plan.shape is None:
        files = [plan.images / name for name, _ in named]
        return Pictures(origin=origin, files=files, images=[image for _, image in named], skipped=skipped)
    if plan.images is not None and plan.shape is not None:
        named = resized_pictures(named, plan.shape)
    files = [folder / f"{i}.jpg" for i in range(len(named))]
    for file, (_, image) in zip(files, named, strict=True):
        write_picture(file, image)
    # Read again, for JPEG changes pixels, and all ways are to see the same.
    return Pictures(origin=origin, files=files, images=[read_image(f) for f in files], skipped=skipped)


def _ways(plan: Plan, bundle: Bundle, pictures: Pictures, stack: ExitStack) -> list[Way]:
    def load(requests: int) -> Detector:
        detector = Detector.load(bundle, backend=plan.backend, threads=plan.threads, requests=requests)
        return stack.enter_context(detector)

    alone, images, files = load(1), pictures.images, pictures.files
    ways = [Way(name=_ONE_BY_ONE, base=_ONE_BY_ONE, run=partial(_one_by_one, alone, images))]
    for size in plan.batches:
        batches = _batches(images, size, bundle.manifest.preprocessing)
        run = partial(_in_batches, alone, batches)
        ways.append(Way(name=f"batches of {size}", base=_ONE_BY_ONE, run=run))
    several = {requests: load(requests) for requests in plan.requests}
    for requests, detector in several.items():
        pool = stack.enter_context(ThreadPoolExecutor(requests))
        concurrent = partial(_concurrently, pool, detector, images)
        ways.append(Way(name=f"{requests} requests", base=_ONE_BY_ONE, run=concurrent))
    ways.append(Way(name=_FROM_FILES, base=_FROM_FILES, run=partial(_one_by_one, alone, files)))
    ways.append(Way(name="pipeline, from files", base=_FROM_FILES, run=partial(alone.stream, files)))
    for requests, detector in several.items():
        name = f"pipeline, {requests} requests, from files"
        ways.append(Way(name=name, base=_FROM_FILES, run=partial(detector.stream, files)))
    return ways


def _one_by_one(detector: Detector, images: Sequence[ImageLike]) -> Iterator[Detections]:
    for image in images:
        yield detector(image, channel_order="rgb")


def _in_batches(detector: Detector, batches: Sequence[list[RgbImage]]) -> Iterator[Detections]:
    for batch in batches:
        yield from detector(batch, channel_order="rgb")


def _concurrently(
    pool: ThreadPoolExecutor, detector: Detector, images: Sequence[RgbImage]
) -> Iterator[Detections]:
    return pool.map(lambda image: detector(image, channel_order="rgb"), images)


def _batches(images: Sequence[RgbImage], size: int, spec: Preprocessing) -> list[list[RgbImage]]:
    """As the pipeline makes them, but for waiting until all are full."""
    sorter = BatchesBySize[RgbImage](size, reach=len(images))
    batches: list[list[RgbImage]] = []
    for number, image in enumerate(images):
        sorter.add(number, network_shape(image, spec), image)
        batches += sorter.ready(number)
    return batches + sorter.rest()


def _repeats(way: Way, window: float) -> int:
    """How often the pictures have to be gone through to last for so many seconds."""
    return max(math.ceil(window * 1000 / _time(way, 1)), 1)


def _time(way: Way, repeats: int) -> float:
    """Milliseconds that all pictures take, so many times over."""
    start = time.perf_counter()
    for _ in range(repeats):
        for _found in way.run():
            pass
    return (time.perf_counter() - start) * 1000


def _measure_all(plan: Plan, ways: Sequence[Way], images: int, repeats: int) -> dict[str, Latencies]:
    """One window a round and way; a round that has begun is finished."""
    latencies = {way.name: Latencies(batch=images) for way in ways}
    end = time.perf_counter() + plan.duration
    number = 0
    with tqdm(desc="throughput", unit="round", file=sys.stderr, disable=plan.quiet or None) as bar:
        while number == 0 or (
            time.perf_counter() < end and not all(each.stable for each in latencies.values())
        ):
            for i in range(len(ways)):
                way = ways[(number + i) % len(ways)]
                latencies[way.name].windows.append([_time(way, repeats)])
            number += 1
            bar.update()
    return latencies


def _describe(bundle: Bundle) -> dict[str, Any]:
    manifest = bundle.manifest
    return {
        "variant": manifest.variant,
        "precision": manifest.precision,
        "trained": manifest.trained,
        "graphs": {graph.name: graph.sha256 for graph in manifest.graphs},
    }


def _shapes(images: Sequence[RgbImage], spec: Preprocessing) -> list[str]:
    return [f"{height}x{width}" for height, width in sorted({network_shape(i, spec) for i in images})]


def rows(result: Mapping[str, Any]) -> list[list[str]]:
    """The table, under its title."""
    table = [["subject", "images/s", "times as fast", "middle half", "as", "detections", "stable"]]
    for name, way in result["ways"].items():
        speed = way["times_as_fast"]
        table.append(
            [
                name,
                f"{way['images_per_second']:.3g}",
                f"{speed['median']:.2f}",
                f"{speed['p25']:.2f} to {speed['p75']:.2f}",
                way["compared_with"],
                str(way["detections"]),
                "yes" if way["stable"] else "NO",
            ]
        )
    return table


def markdown(result: Mapping[str, Any]) -> str:
    """The whole result as a page."""
    bundle, machine, given = result["bundle"], result["machine"], result["input"]
    shapes = given["network_shapes"]
    seen = shapes[0] if len(shapes) == 1 else f"{len(shapes)} shapes"
    levels = ", ".join(f"{level} {count}" for level, count in sorted(given["exit_levels"].items()))
    lines = [
        f"# Throughput: {bundle['variant']}, {bundle['precision']}, {result['backend']}, {seen}",
        "",
        f"`{result['command']}`",
        "",
        f"- {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['date']}",
        f"- {', '.join(f'{name} {version}' for name, version in machine['packages'].items())}",
        f"- {'trained' if bundle['trained'] else 'UNTRAINED'} weights; exit levels: {levels}",
        f"- {given['pictures']} pictures ({given['origin']}), {given['repeated']} times a round",
        "",
        *markdown_table(rows(result)),
        "",
        "- times as fast: the time of the way it is compared with over its own in the same round",
        f"- detections: those of confidence {_CONFIDENT} or more in all pictures, in a run before",
        "- stable: the last three rounds agree within 5%",
        *(f"- skipped: {reason}" for reason in given["skipped"]),
    ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
