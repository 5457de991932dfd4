"""`asag-detect`: detect in files, folders, videos and cameras from the command line."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TextIO

from tqdm import tqdm

from asag_deploy.atomic import is_stdout
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import Category
from asag_deploy.command_line import (
    ALL_FINE,
    SOME_FAILED,
    OneSentenceParser,
    add_threshold,
    exit_code,
    printable,
    progress,
    whole_number,
)
from asag_deploy.detect.coco_ids import CocoIds, annotated_ids, made_ids
from asag_deploy.detect.doctor import describe, describe_bundle, diagnose, machine
from asag_deploy.detect.result_files import ResultWriter
from asag_deploy.detect.summary import Summary, counted
from asag_deploy.detections import Detections
from asag_deploy.detector_options import DetectorOptions, add_detector_options, detector_options
from asag_deploy.errors import ConfigError, OutputError, SourceError
from asag_deploy.images.drawing import trace_caption
from asag_deploy.images.reading import RgbImage
from asag_deploy.images.sources import Failure, Frame, Source, count_frames, iter_frames, list_sources
from asag_deploy.pipeline import Frames, Refusal, detect_all

PROGRAM = "asag-detect"

_UNTRAINED = "the bundle's weights are untrained, so its detections mean nothing"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `asag-detect` with these arguments (None: the command line's) and return its exit code.

    0: all fine; 1: some sources failed; 2: nothing could be done, with the reason in one sentence on stderr;
    130, 143 or 129: interrupted by Ctrl-C, SIGTERM or SIGHUP, after writing what had been found.
    """
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # a bad video is reported by us, once

    def command() -> int:
        options = parse_arguments(argv)
        return _doctor(options) if options.doctor else _detect(options)

    return exit_code(PROGRAM, command)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user asked for.  Raises ConfigError when it makes no sense."""

    bundle: Path | None
    sources: tuple[str, ...]
    doctor: bool
    output_dir: Path | None
    json_file: Path | None
    coco_file: Path | None
    coco_annotations: Path | None
    frames: Frames
    threshold: float
    trace: bool
    batch: int
    quiet: bool
    detector: DetectorOptions

    def __post_init__(self) -> None:
        if not self.doctor and self.bundle is None:
            raise ConfigError(f"no bundle given: try '{PROGRAM} BUNDLE IMAGE', or '{PROGRAM} --help'")
        if not self.doctor and not self.sources:
            raise ConfigError("no sources given: name images, folders, videos or cameras after the bundle")
        if self.doctor and self.sources:
            raise ConfigError("--doctor takes a bundle at most, and no sources")
        if self.coco_annotations is not None and self.coco_file is None and self.json_file is None:
            raise ConfigError("--coco-annotations is for what --coco and --json write: give one of these too")
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"--threshold is {self.threshold:g}, which is not between 0 and 1")
        if self.batch < 1:
            raise ConfigError(f"--batch is {self.batch}; it must be at least 1")


def parse_arguments(argv: Sequence[str] | None) -> Options:
    """Read the command line (ConfigError if it makes no sense; SystemExit after --help)."""
    words = sys.argv[1:] if argv is None else list(argv)
    end = words.index("--") if "--" in words else len(words)  # which argparse loses amid intermixed ones
    parsed = _parser().parse_intermixed_args(words[:end])
    first, *sources = [*parsed.paths, *words[end + 1 :]] or [None]
    if first == "":
        raise ConfigError(f"argument BUNDLE: an empty path names nothing (see {PROGRAM} --help)")
    return Options(
        bundle=None if first is None else Path(first),
        sources=tuple(sources),
        doctor=parsed.doctor,
        output_dir=parsed.output_dir,
        json_file=parsed.json_file,
        coco_file=parsed.coco_file,
        coco_annotations=parsed.coco_annotations,
        frames=parsed.frames,
        threshold=parsed.threshold,
        trace=parsed.trace,
        batch=parsed.batch,
        quiet=parsed.quiet,
        detector=detector_options(parsed),
    )


def _parser() -> argparse.ArgumentParser:
    parser = OneSentenceParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} BUNDLE SOURCE... [options]\n       {PROGRAM} --doctor [BUNDLE]",
        description="Detect objects with an exported bundle.",
        epilog="Without --output-dir, --json and --coco, what is found is printed image by image.",
    )
    add = parser.add_argument
    add(
        "paths",
        nargs="*",
        metavar="BUNDLE SOURCE",
        help="the bundle's folder or address, then images, folders, globs, videos, "
        "addresses (rtsp://..., https://...) or cameras (camera:0)",
    )
    add("--output-dir", type=Path, metavar="DIR", help="write annotated pictures and videos to DIR")
    add(
        "--json", dest="json_file", type=Path, metavar="FILE", help="write all results, with traces and times"
    )
    add(
        "--coco",
        dest="coco_file",
        type=Path,
        metavar="FILE",
        help="write COCO results (to evaluate them, use --threshold 0)",
    )
    add(
        "--coco-annotations",
        type=Path,
        metavar="FILE",
        help="take image ids by file name, and category ids by class name, from this COCO annotation file "
        "(default: ids are the numbers that all file names are, else images are counted as they are read)",
    )
    add(
        "--frames",
        choices=("first", "all"),
        default="first",
        help="what animated and multi-page images give (default: first)",
    )
    add_threshold(parser)
    add("--trace", action="store_true", help="draw probed patches in red and anchors in white")
    add(
        "--batch",
        type=whole_number(1),
        default=1,
        metavar="N",
        help="images of one size a batch (default: 1)",
    )
    add("--quiet", action="store_true", help="print nothing but failures")
    add("--doctor", action="store_true", help="say which backends this machine has, and what others lack")
    add_detector_options(parser)
    return parser


def _doctor(options: Options) -> int:
    print(describe(diagnose(), machine()))
    if options.bundle is not None:
        bundle = Bundle.open(options.bundle)
        options.detector.load(bundle).close()
        print(f"\n{describe_bundle(bundle, options.bundle)}")
    return ALL_FINE


def _detect(options: Options) -> int:
    assert options.bundle is not None, "checked by Options"
    listing = list_sources(options.sources, all_frames=options.frames == "all")
    run = _Run(options, alone=len(listing.sources) + len(listing.failures) == 1)
    try:
        with options.detector.load(options.bundle) as detector:
            if not detector.manifest.trained and not options.quiet:
                run.warn(_UNTRAINED)
            for failure in listing.failures:
                run.failed(failure)
            ids = _coco_ids(options, listing.sources, detector.manifest.categories)
            writer = ResultWriter(
                listing.sources,
                output_dir=options.output_dir,
                json_file=options.json_file,
                coco_file=options.coco_file,
                coco_ids=ids,
                inputs=_inputs(options),
                trace=options.trace,
            )
            run.note_ids(ids)
            results = detect_all(
                detector, iter_frames(listing.sources), image_of=_image, batch_size=options.batch
            )
            with writer, run.progress(count_frames(listing.sources)), closing(results):
                for frame, detections in run.successes(results):
                    writer.add(frame, detections)
                    run.done(frame, detections)
            run.note(writer.notes)
    except KeyboardInterrupt:
        run.report()
        raise
    run.report()
    return run.exit_code()


def _coco_ids(options: Options, sources: Sequence[Source], categories: Sequence[Category]) -> CocoIds:
    if options.coco_annotations is not None:
        return annotated_ids(options.coco_annotations, sources, categories)
    ids = made_ids(sources)
    return ids if options.coco_file is not None else dataclasses.replace(ids, said=())


def _inputs(options: Options) -> list[Path]:
    return [path for path in (options.bundle, options.coco_annotations) if path is not None]


def _image(item: Frame | Failure) -> RgbImage | None:
    return item.image if isinstance(item, Frame) else None


class _Run:
    """What has been done so far, and how the user hears of it."""

    def __init__(self, options: Options, *, alone: bool) -> None:
        self.options = options
        self.alone = alone
        self.summary = Summary()
        self.failures: list[Failure] = []
        self._is_partial = False
        self._first_frames = 0
        self._first_of: tuple[str, int] | None = None
        """The first image that only the first frame was taken of, and how many it has."""
        to_stdout = is_stdout(options.json_file) or is_stdout(options.coco_file)
        self._out = sys.stderr if to_stdout else sys.stdout
        """Where what was found is told: not amid the results."""
        self._bar: tqdm[NoReturn] | None = None
        self._prints_images = not (
            options.quiet or options.output_dir or options.json_file or options.coco_file
        )

    @contextmanager
    def progress(self, total: int | None) -> Iterator[None]:
        """Show a progress bar on stderr, if that is a terminal, and take the time."""
        start = time.perf_counter()
        with progress(total=total, unit="image", quiet=self.options.quiet) as bar:
            self._bar = bar
            try:
                yield
            finally:
                self._bar = None
                self.summary.seconds = time.perf_counter() - start

    def successes(
        self, results: Iterable[tuple[Frame | Failure, Detections | Refusal | None]]
    ) -> Iterator[tuple[Frame, Detections]]:
        """Yield the frames that were detected in, with what is confident enough; report failures."""
        for item, found in results:
            if isinstance(item, Failure):
                self.failed(item)
            elif isinstance(found, Detections):
                yield item, found.filter(self.options.threshold)
            else:
                self.failed(Failure(source=item.name, message=f"'{item.name}': {found}"))

    def done(self, frame: Frame, detections: Detections) -> None:
        """Take note of a frame's results."""
        self.summary.add(detections)
        if frame.frames > 1:
            self._first_frames += 1
            self._first_of = self._first_of or (frame.name, frame.frames)
        if self._prints_images:
            found = counted(Counter(detections.names)) or "nothing"
            at = "" if frame.time is None else f" at {frame.time:.3f} s"
            self.say(f"{frame.name}{at}: {found} ({trace_caption(detections.trace)[0]})", self._out)
        if self._bar is not None:
            self._bar.update()

    def failed(self, failure: Failure) -> None:
        """Take note of a source that gave nothing; one that is alone is the error the program ends with."""
        self.failures.append(failure)
        if not self.alone or self.summary.images:
            what = "incomplete" if failure.frames else "skipped"
            self.say(f"{PROGRAM}: {what}: {failure.message}", sys.stderr)
        if self._bar is not None:
            self._bar.update()

    def warn(self, sentence: str) -> None:
        """Print a sentence that no results need, but their reader does."""
        self.say(f"{PROGRAM}: warning: {sentence}", sys.stderr)

    def note_ids(self, ids: CocoIds) -> None:
        """Say how COCO ids are made; sources that get no results for want of one make the run incomplete."""
        self._is_partial = ids.incomplete
        if ids.incomplete or not self.options.quiet:
            for sentence in ids.said:
                self.say(f"{PROGRAM}: {sentence}", sys.stderr)

    def note(self, sentences: Sequence[str]) -> None:
        """Say what the user should know about what was read and written."""
        if self.options.quiet:
            return
        if self._first_of is not None:
            name, frames = self._first_of
            self.warn(
                f"of animated and multi-page images ({self._first_frames}) only the first frame was taken, "
                f"beginning with '{name}', which has {frames}; --frames all takes every one"
            )
        for sentence in sentences:
            self.warn(sentence)

    def say(self, text: str, file: TextIO) -> None:
        """Print a line without breaking the progress bar; raises OutputError where none can be printed."""
        try:
            tqdm.write(printable(text), file=file)
        except BrokenPipeError:
            raise
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise OutputError(f"could not write the output: {reason}") from error

    def report(self) -> None:
        """Print the summary, if there is something to sum up."""
        if self.options.quiet or not self.summary.images:
            return
        print(self.summary.text(threshold=self.options.threshold, batch=self.options.batch), file=self._out)
        for what, failures in (
            ("failed", [failure for failure in self.failures if not failure.frames]),
            ("incomplete", [failure for failure in self.failures if failure.frames]),
        ):
            if failures:
                names = [*(failure.source for failure in failures[:3]), *(["..."] if failures[3:] else [])]
                print(printable(f"{what}: {len(failures)} ({', '.join(names)})"), file=self._out)

    def exit_code(self) -> int:
        """Return how it went; raise SourceError if no image could be used."""
        if not self.summary.images:
            first = self.failures[0].message
            raise SourceError(
                first if self.alone else f"none of the sources could be used, beginning with: {first}"
            )
        return SOME_FAILED if self.failures or self._is_partial else ALL_FINE


if __name__ == "__main__":
    sys.exit(main())
