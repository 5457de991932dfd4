"""`asag-batch`: detect in any number of pictures, here or on a Ray cluster, and go on where that ended."""

from __future__ import annotations

import argparse
import dataclasses
import secrets
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from asag_deploy.atomic import check_spares
from asag_deploy.backends import DEFAULT_BACKEND
from asag_deploy.batch.cluster import AUTO, PROGRAM, Crew, cpus_here, cpus_of, knock, ray_here, reports
from asag_deploy.batch.index import Part
from asag_deploy.batch.places import Place
from asag_deploy.batch.run import RESULTS, Identity, Run, open_run
from asag_deploy.batch.sources import DEFAULT_COLUMN, Source, find_sources
from asag_deploy.batch.worker import Plan, Report
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.command_line import (
    ALL_FINE,
    SOME_FAILED,
    OneSentenceParser,
    add_threshold,
    exit_code,
    printable,
    progress,
    real_number,
    whole_number,
)
from asag_deploy.detector_options import DetectorOptions, add_detector_options, detector_options
from asag_deploy.errors import BackendError, ConfigError, SourceError, plural

_MOST_ACTORS = 100_000
_MOST_GPUS = 64
_MOST_FAILURES_SAID = 10
_LEVELS = ("P5", "P4", "P3")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `asag-batch` with these arguments (None: the command line's) and return its exit code.

    0: every picture of the run has its results; 1: some pictures failed, which their rows say; 2: nothing
    could be done, or not go on, with the reason in one sentence on stderr; 130, 143 or 129: interrupted, and
    the same command goes on.
    """
    return exit_code(PROGRAM, lambda: _batch(parse_arguments(argv)))


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user asked for.  Raises ConfigError when it makes no sense."""

    bundle: Path
    sources: tuple[str, ...]
    output: str
    column: str | None
    address: str | None
    actors: int | None
    gpus: float | None
    retry_failed: bool
    threshold: float
    batch: int
    quiet: bool
    detector: DetectorOptions

    def __post_init__(self) -> None:
        if not self.output:
            raise ConfigError("argument --output: an empty path names nothing")
        if self.detector.requests != 1 and self.detector.threads is None:
            raise ConfigError("--requests divides the threads of an actor: give --threads too")

    @property
    def threads(self) -> int:
        """CPU threads of an actor."""
        return self.detector.threads or 1

    @property
    def gpus_of_an_actor(self) -> float:
        """GPUs of an actor: one where the backend runs on a GPU, if nothing was said."""
        if self.gpus is not None:
            return self.gpus
        return float((self.detector.backend or DEFAULT_BACKEND).startswith("tensorrt"))

    def identity(self, bundle: Bundle, sources: tuple[Source, ...]) -> Identity:
        """Return what a run of this is one of."""
        detector = self.detector
        options = {
            "threshold": self.threshold,
            "batch": self.batch,
            "backend": detector.backend or DEFAULT_BACKEND,
            "mode": detector.mode,
            "max-level": detector.max_level,
            "deadline-ms": detector.deadline_ms,
            "loop": detector.loop,
            "max-detections": detector.max_detections,
            "anchor-cap": detector.anchor_cap,
        }
        return Identity(bundle=bundle.fingerprint, options=options, sources=sources)


def parse_arguments(argv: Sequence[str] | None) -> Options:
    """Read the command line (ConfigError if it makes no sense; SystemExit after --help)."""
    parsed = _parser().parse_intermixed_args(sys.argv[1:] if argv is None else list(argv))
    return Options(
        bundle=parsed.bundle,
        sources=tuple(parsed.sources),
        output=parsed.output,
        column=parsed.column,
        address=parsed.address,
        actors=parsed.actors,
        gpus=parsed.gpus,
        retry_failed=parsed.retry_failed,
        threshold=parsed.threshold,
        batch=parsed.batch,
        quiet=parsed.quiet,
        detector=detector_options(parsed),
    )


def _parser() -> argparse.ArgumentParser:
    parser = OneSentenceParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} BUNDLE INDEX_OR_FOLDER... --output DIR [options]",
        description="Detect in any number of pictures, on this machine or a Ray cluster, into Parquet files.",
        epilog="The same command goes on with a run that was ended, and takes new pictures of its folders.",
    )
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", type=Path, help="the folder that asag-export has written, or its address")
    add(
        "sources",
        nargs="+",
        metavar="INDEX_OR_FOLDER",
        help="lists of paths (.parquet, a folder of them, .csv, .tsv, or .txt with one a line), and folders "
        "of pictures with all in them; also addresses such as s3://bucket/folder",
    )
    add(
        "--output",
        required=True,
        metavar="DIR_OR_ADDRESS",
        help="the folder of the run, on storage that all machines see; also an address",
    )
    text = f"the column of the paths in lists that have columns (default: {DEFAULT_COLUMN})"
    add("--column", metavar="NAME", help=text)
    text = f"a Ray cluster, as host:port, or {AUTO} on one of its machines (default: Ray is started here)"
    add("--address", metavar="A", help=text)
    text = "processes that detect (default: as many as the CPUs have room for)"
    add("--actors", type=whole_number(1, _MOST_ACTORS), metavar="N", help=text)
    text = "GPUs of each, or a share of one (default: 1 with a TensorRT backend, else 0)"
    add("--gpus", type=real_number(0, _MOST_GPUS), metavar="G", help=text)
    text = "detect once more in parts with pictures that failed"
    add("--retry-failed", action="store_true", help=text)
    add_threshold(parser)
    text = "images of one size a batch (default: 1)"
    add("--batch", type=whole_number(1), default=1, metavar="N", help=text)
    add("--quiet", action="store_true", help="print nothing but failures")
    add_detector_options(parser)
    for action in parser._actions:
        if action.dest == "threads":
            action.help = "CPU threads of each process (default: 1, which gives most pictures a second)"
    return parser


def _batch(options: Options) -> int:
    import ray  # noqa: F401  (that it is missing is said before anything is written)

    bundle = Bundle.open(options.bundle)
    detector = dataclasses.replace(options.detector, threads=options.threads)
    _check_detector(detector, bundle, of_cluster=options.address is not None)
    sources = find_sources(options.sources, options.column)
    place = Place(options.output)
    if place.is_local:
        check_spares(place.name, bundle.path)
        _check_apart(place, sources)
    cpus = None
    if options.address is not None:  # before anything is listed or written
        knock(options.address)
        cpus = cpus_of(options.address)
    tell = _Teller(options)
    if not bundle.manifest.trained and not options.quiet:
        tell.warn("the bundle's weights are untrained, so its detections mean nothing")
    with tell.listing() as listed:
        run = listed.enter_context(open_run(place, options.identity(bundle, sources), tell.listed))
        tell.end_of_listing()
        plan = Plan(
            place=place,
            key=run.key,
            attempt=secrets.token_hex(4),
            bundle=bundle.path,
            fingerprint=bundle.fingerprint,
            detector=detector,
            threshold=options.threshold,
            batch=options.batch,
        )
        return _work(options, run, plan, tell, cpus)


def _work(options: Options, run: Run, plan: Plan, tell: _Teller, cpus: int | None) -> int:
    done, pending = run.parts()
    if options.retry_failed:
        counted = list(zip(done, run.count_failed(done), strict=True))
        done = [part for part, failed in counted if not failed]
        pending += [dataclasses.replace(part, anew=True) for part, failed in counted if failed]
    total = Total(before=_pictures(done))
    try:
        if pending:
            total.crew = _crew(options, cpus, len(pending))
            _detect(options, run, plan, tell, pending, total)
        total.failed_before = sum(run.count_failed(done))  # last, for it reads a little of every file
        run.tidy()
    except KeyboardInterrupt:
        missing = {part.number for part in run.parts()[1]}
        left = [p for p in pending if p.number in missing or (p.anew and p.number not in total.parts)]
        tell.report(total, run, left=_pictures(left))
        raise
    tell.report(total, run)
    return SOME_FAILED if total.failed or total.failed_before else ALL_FINE


def _detect(options: Options, run: Run, plan: Plan, tell: _Teller, pending: list[Part], total: Total) -> None:
    with (
        ray_here(options.address, total.crew),
        progress(total=run.pictures, done=total.before, unit="image", quiet=options.quiet) as bar,
    ):
        start = time.perf_counter()
        for report in reports(plan, pending, total.crew):
            if report.problem is not None:
                raise BackendError(report.problem)
            total.add(report)
            total.seconds = time.perf_counter() - start
            tell.part(report, total)
            bar.update(report.pictures)
    left = run.parts()[1]
    if left:
        raise BackendError(
            f"{plural(len(left), 'part')} of the run in '{run.place.name}' have no results: give the same "
            "command again"
        )


@dataclass(kw_only=True)
class Total:
    """What has come of this start of a run."""

    crew: Crew = field(default_factory=lambda: Crew(actors=0, threads=0, gpus=0))
    before: int
    """Pictures that were done before."""
    failed_before: int = 0
    """Of those."""
    pictures: int = 0
    """Pictures that were done now, also those that failed."""
    failed: int = 0
    """Of those."""
    deaths: int = 0
    parts: set[int] = field(default_factory=set)
    """Numbers of the parts that were done now."""
    seconds: float = 0.0
    """From the start of the processes to the last part."""
    classes: Counter[str] = field(default_factory=Counter)
    exits: Counter[str] = field(default_factory=Counter)

    def add(self, report: Report) -> None:
        """Count a part."""
        self.parts.add(report.part)
        self.pictures += report.pictures
        self.failed += report.failed
        self.deaths += report.deaths
        self.classes.update(report.classes)
        self.exits.update(report.exits)

    def text(self, run: Run, *, threshold: float, left: int | None) -> str:
        """Write it in a few lines; left: pictures that are still to be done, None if all are.

        What is counted first, and its rate, are pictures that were detected in: exit levels add up to them.
        """
        names = ", ".join(f"{count} {name}" for name, count in self.classes.most_common())
        detected = self.pictures - self.failed
        count = f"{plural(detected, 'image')}, {plural(self.classes.total(), 'detection')}"
        lines = [f"{count} of confidence {threshold:g} or more{f': {names}' if names else ''}"]
        if not self.pictures and left is None:
            lines = ["nothing is left to do"]
        if detected:
            lines.append(f"exit levels: {', '.join(f'{level} {self.exits[level]}' for level in _LEVELS)}")
        if self.seconds > 0:
            crew = f"{plural(self.crew.actors, 'actor')} of {plural(self.crew.threads, 'thread')}"
            rate = f"{detected / self.seconds:.3g} images/s"
            lines.append(f"{rate}, from reading to writing, in {self.seconds:.1f} s, by {crew}")
        if self.before:
            of_them = f", of which {self.failed_before} failed" if self.failed_before else ""
            lines.append(f"done before: {plural(self.before, 'image')}{of_them}")
        failed = ((self.failed, ""), (self.failed_before, " before"))
        counts = [f"{count}{when}" for count, when in failed if count]
        if counts:
            lines.append(f"failed: {', and '.join(counts)} (the column 'error' says why)")
        if left is not None:
            lines.append(f"left: {plural(left, 'image')}; the same command goes on")
        lines.append(f"results: {run.place.name}/{RESULTS}")
        return "\n".join(lines)


class _Teller:
    """How the user hears of what is done."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._said = 0
        self._deaths_said = False
        self._bar: tqdm[NoReturn] | None = None

    def listing(self) -> Any:
        """Return a context that shows on a terminal how many pictures have been listed."""
        from contextlib import ExitStack

        stack = ExitStack()
        self._bar = stack.enter_context(
            progress(unit="image", description="listing", quiet=self._options.quiet)
        )
        return stack

    def listed(self, pictures: int) -> None:
        """Take note of pictures that were listed."""
        if self._bar is not None:
            self._bar.update(pictures)

    def end_of_listing(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def part(self, report: Report, total: Total) -> None:
        """Say what went wrong in a part."""
        if report.deaths and not self._deaths_said:
            self._deaths_said = True
            self.warn("a process that detects has died and was replaced; its pictures are done again")
        for sentence in report.failures:
            self._said += 1
            if self._said <= _MOST_FAILURES_SAID:
                self._say(f"{PROGRAM}: skipped: {sentence}")
            elif self._said == _MOST_FAILURES_SAID + 1:
                self._say(f"{PROGRAM}: skipped: more, of which the column 'error' says why")

    def warn(self, sentence: str) -> None:
        """Print a sentence that no results need, but their reader does."""
        self._say(f"{PROGRAM}: warning: {sentence}")

    def report(self, total: Total, run: Run, *, left: int | None = None) -> None:
        """Print the summary."""
        if run.repeated and not self._options.quiet:
            self.warn(f"{plural(run.repeated, 'picture')} that the lists name again: each is taken once")
        if not self._options.quiet:
            print(printable_lines(total.text(run, threshold=self._options.threshold, left=left)))

    def _say(self, text: str) -> None:
        tqdm.write(printable(text), file=sys.stderr)


def printable_lines(text: str) -> str:
    """Return lines in which nothing moves the cursor."""
    return "\n".join(printable(line) for line in text.splitlines())


def _pictures(parts: Sequence[Part]) -> int:
    return sum(part.pictures for part in parts)


def _crew(options: Options, of_cluster: int | None, parts: int) -> Crew:
    """Return how many actors there are, no more than parts.

    of_cluster: its CPUs, one of which is left for what Ray does beside the actors; None for this machine.
    """
    cpus = cpus_here() if of_cluster is None else of_cluster - 1
    actors = options.actors or max(cpus // options.threads, 1)
    return Crew(actors=min(actors, parts), threads=options.threads, gpus=options.gpus_of_an_actor)


def _check_detector(detector: DetectorOptions, bundle: Bundle, *, of_cluster: bool) -> None:
    """Raise, before anything is written, ConfigError for what the bundle cannot do, BackendError for a
    backend that this machine cannot run; that of a cluster's machines is for them to say."""
    from asag_deploy.backends import check_backend, check_runs_here

    if not of_cluster:
        check_runs_here(detector.backend)
    elif detector.backend is not None:
        check_backend(detector.backend)
    detector.stop_rule(bundle.manifest)


def _check_apart(place: Place, sources: Sequence[Source]) -> None:
    """Raise SourceError where the results would lie among the pictures, or the lists among the results."""
    for source in sources:
        inside = f"{place.name}/".startswith(f"{source.name}/") and source.kind in ("folder", "parquet")
        if inside or f"{source.name}/".startswith(f"{place.name}/"):
            raise SourceError(
                f"--output '{place.name}' and '{source.name}' lie one within the other: choose another "
                "--output"
            )


if __name__ == "__main__":
    sys.exit(main())
