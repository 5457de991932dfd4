"""How many images a second a bundle gets through on this machine, and what each calling method is worth.

Compared are calls one by one, batches of one size, concurrent requests that divide the threads among them,
and the pipeline that reads and decodes files meanwhile.  Every round gives the same pictures to all of them,
beginning with another one each time, until the last three rounds of each agree within 5% or the time is up.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from asag_bench.measuring.image_groups import (
    generated_pictures,
    network_shape,
    network_shapes,
    read_pictures,
    resized_pictures,
)
from asag_bench.measuring.machine import describe_machine
from asag_bench.measuring.plan import check_shape
from asag_bench.measuring.timing import Timings, are_stable, nothing_old_collected, ratio
from asag_bench.result import MethodResult, ThroughputBundle, ThroughputInput, ThroughputResult
from asag_deploy import Bundle, Detections, Detector
from asag_deploy.backends import DEFAULT_BACKEND, check_runs_here
from asag_deploy.bundle.manifest import Preprocessing
from asag_deploy.command_line import progress
from asag_deploy.detector_options import DetectorOptions
from asag_deploy.errors import ConfigError
from asag_deploy.images.reading import ImageLike, RgbImage, read_image
from asag_deploy.images.writing import write_picture
from asag_deploy.pipeline import BatchesBySize
from asag_deploy.scratch import scratch_folder
from asag_deploy.timing import since

CONFIDENT = 0.3
"""Detections that are counted."""
_ONE_BY_ONE = "one by one"
_FROM_FILES = "one by one, from files"


@dataclass(frozen=True, kw_only=True)
class ThroughputPlan:
    """What to measure.  Raises ConfigError when it makes no sense."""

    command: str
    bundle: Path
    images: Path | None = None
    limit: int | None = None
    shape: tuple[int, int] | None = None
    detector: DetectorOptions = field(default_factory=DetectorOptions)
    """How to load it, but for the requests."""
    batches: tuple[int, ...] = (4,)
    requests: tuple[int, ...] = (2,)
    duration: float = 120.0
    window: float = 2.0
    quiet: bool = False

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
class Method:
    """A calling method: it gets all pictures detected in."""

    name: str
    base: str
    """The method that does the same one by one."""
    run: Callable[[], Iterable[Detections]]


def measure(plan: ThroughputPlan) -> ThroughputResult:
    """Measure all calling methods of one bundle.

    Raises what loading the bundle does, and SourceError where there are no pictures.
    """
    options = plan.detector
    check_runs_here(options.backend)
    bundle = Bundle.open(plan.bundle)
    manifest = bundle.manifest
    spec = manifest.preprocessing
    check_shape(plan.shape, spec)
    with ExitStack() as stack:
        folder = stack.enter_context(scratch_folder())
        pictures = _pictures(plan, folder)
        methods = _methods(plan, bundle, pictures, stack)
        found = {each.name: list(each.run()) for each in methods}  # which warms up every shape, too
        repeats = _repeats(methods[0], plan.window)
        timings = _measure_all(plan, methods, repeats * len(pictures.images), repeats)
    return ThroughputResult(
        command=plan.command,
        machine=describe_machine(),
        bundle=ThroughputBundle(
            variant=manifest.variant,
            precision=manifest.precision,
            trained=manifest.trained,
            graphs={graph.name: graph.sha256 for graph in manifest.graphs},
        ),
        backend=options.backend or DEFAULT_BACKEND,
        threads=options.threads,
        mode=options.mode,
        max_level=options.max_level,
        deadline_ms=options.deadline_ms,
        loop=options.loop,
        input=ThroughputInput(
            origin=pictures.origin,
            pictures=len(pictures.images),
            repeated=repeats,
            skipped=tuple(pictures.skipped),
            network_shapes=network_shapes(pictures.images, spec),
            exit_levels=dict(Counter(each.trace.exit_level for each in found[methods[0].name])),
        ),
        stable=are_stable(timings),
        methods={
            each.name: MethodResult(
                images_per_second=round(timings[each.name].images_per_second(), 3),
                stable=timings[each.name].stable,
                compared_with=each.base,
                times_as_fast=ratio(timings[each.base].samples, timings[each.name].samples),
                detections=sum(len(one.filter(CONFIDENT)) for one in found[each.name]),
                rounds_s=tuple(round(sample / 1000, 4) for sample in timings[each.name].samples),
            )
            for each in methods
        },
    )


def _pictures(plan: ThroughputPlan, folder: Path) -> Pictures:
    """Take the user's own files where nothing has to be changed about them, else write JPEG to `folder`."""
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
    # Read again, for JPEG changes pixels, and all methods are to see the same.
    return Pictures(origin=origin, files=files, images=[read_image(f) for f in files], skipped=skipped)


def _methods(plan: ThroughputPlan, bundle: Bundle, pictures: Pictures, stack: ExitStack) -> list[Method]:
    def load(requests: int) -> Detector:
        options = dataclasses.replace(plan.detector, requests=requests)
        return stack.enter_context(options.load(bundle))

    alone, images, files = load(1), pictures.images, pictures.files
    methods = [Method(name=_ONE_BY_ONE, base=_ONE_BY_ONE, run=partial(_one_by_one, alone, images))]
    for size in plan.batches:
        batches = batches_of_one_size(images, size, bundle.manifest.preprocessing)
        run = partial(_in_batches, alone, batches)
        methods.append(Method(name=f"batches of {size}", base=_ONE_BY_ONE, run=run))
    several = {requests: load(requests) for requests in plan.requests}
    for requests, detector in several.items():
        pool = stack.enter_context(ThreadPoolExecutor(requests))
        concurrent = partial(_concurrently, pool, detector, images)
        methods.append(Method(name=f"{requests} requests", base=_ONE_BY_ONE, run=concurrent))
    methods.append(Method(name=_FROM_FILES, base=_FROM_FILES, run=partial(_one_by_one, alone, files)))
    methods.append(Method(name="pipeline, from files", base=_FROM_FILES, run=partial(alone.stream, files)))
    for requests, detector in several.items():
        name = f"pipeline, {requests} requests, from files"
        methods.append(Method(name=name, base=_FROM_FILES, run=partial(detector.stream, files)))
    return methods


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


def batches_of_one_size(images: Sequence[RgbImage], size: int, spec: Preprocessing) -> list[list[RgbImage]]:
    """Make batches as the pipeline does, but wait until all are full."""
    sorter = BatchesBySize[RgbImage](size, reach=len(images))
    batches: list[list[RgbImage]] = []
    for number, image in enumerate(images):
        sorter.add(number, network_shape(image, spec), image)
        batches += sorter.ready(number)
    return batches + sorter.rest()


def _repeats(method: Method, window: float) -> int:
    """Return how often the pictures have to be gone through to last for so many seconds."""
    return max(math.ceil(window * 1000 / _time(method, 1)), 1)


def _time(method: Method, repeats: int) -> float:
    """Return the milliseconds that all pictures take, so many times over."""
    start = time.perf_counter()
    for _ in range(repeats):
        for _found in method.run():
            pass
    return since(start)


def _measure_all(
    plan: ThroughputPlan, methods: Sequence[Method], images: int, repeats: int
) -> dict[str, Timings]:
    """Time one window a round and method; a round that has begun is finished."""
    timings = {each.name: Timings(batch=images) for each in methods}
    end = time.perf_counter() + plan.duration
    number = 0
    bar = progress(unit="round", description="throughput", quiet=plan.quiet)
    with bar, nothing_old_collected():
        while number == 0 or (time.perf_counter() < end and not are_stable(timings)):
            for i in range(len(methods)):
                method = methods[(number + i) % len(methods)]
                timings[method.name].windows.append([_time(method, repeats)])
            number += 1
            bar.update()
    return timings
