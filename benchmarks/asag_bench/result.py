"""`result.json` with types: what a run of `asag-bench` found, written and read back.

A runner is whatever is timed: a bundle on a backend, or a reference beside it.  The baseline is the runner
whose speed counts as 1.  An image group holds the pictures on which the network does the same work.

A field's name is its key in the file, unless it says another one.  A field that earlier releases did not
write says so, and keeps its default when their files are read.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from asag_deploy.backends import DEFAULT_BACKEND
from asag_deploy.bundle.manifest import Level, Mode
from asag_deploy.detector_options import DetectorOptions
from asag_deploy.errors import ConfigError, FieldError, SourceError
from asag_deploy.loop.loop import LoopChoice
from asag_deploy.plain_numbers import unsigned
from asag_deploy.typed_json import read_fields

_KEYS = ("strata", "bundles", "machine", "options")
"""The keys by which a result is told from other JSON."""


_NEWER = {"may_be_missing": True}
"""A field that earlier releases did not write."""


def _key(name: str) -> dict[str, Any]:
    return {"key": name}


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The median over rounds, and the middle half."""

    median: float
    p25: float
    p75: float


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine of a measurement, without which a number means nothing."""

    date: str
    processor: str
    cores: int
    memory_gib: float
    system: str
    python: str
    packages: dict[str, str]
    """Version by name."""
    clock_mhz: tuple[float, float] | None = field(default=None, metadata=_NEWER)
    """Least and most of all cores, before and after; None where the kernel does not say."""
    compiled_operators: str | None = field(default=None, metadata=_NEWER)
    """The interface of those that backends on the CPU find, such as `interface 10`, or `none`; None where an
    earlier release did not say."""

    @property
    def operators_in_words(self) -> str | None:
        """What a page says of them; None where nothing is known."""
        return None if self.compiled_operators is None else f"compiled operators: {self.compiled_operators}"


@dataclass(frozen=True, kw_only=True)
class BundleResult:
    """A bundle on a backend, as its manifest describes it."""

    variant: str
    head: str
    precision: str
    computed_in: str
    """The precision of most of the work, such as bf16 for a float32 bundle on `openvino-bf16`."""
    trained: bool
    parity_passed: bool | None
    mode: str
    deepest_level: str
    shorter_side: int
    longer_side: int
    graphs: dict[str, str]
    """SHA-256 by name."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What was asked for, as far as it bears on the figures."""

    backends: tuple[str, ...] = (DEFAULT_BACKEND,)
    precisions: tuple[str, ...] = ()
    """Empty for all that bundles and backends give."""
    batches: tuple[int, ...] = (1,)
    references: tuple[str, ...] = field(default=(), metadata=_key("peers"))
    mode: Mode | None = None
    threads: int | None = None
    shape: tuple[int, int] | None = None
    """Height and width of the pictures as the network sees them; None for what they have."""
    duration_s: float = 60.0
    """At most, for an image group."""
    warmup: int = 3
    percentile: tuple[float, ...] = (50.0, 90.0, 95.0, 99.0)
    max_level: Level | None = field(default=None, metadata=_NEWER)
    deadline_ms: float | None = field(default=None, metadata=_NEWER)
    loop: LoopChoice = field(default="auto", metadata=_NEWER)
    requests: int = field(default=1, metadata=_NEWER)
    memory_images: int = field(default=0, metadata=_NEWER)
    """Pictures of many sizes that show whether memory stays flat; 0 for none."""

    def detector(self, backend: str | None = None) -> DetectorOptions:
        """Return how to load each detector.  Raises ConfigError for options that make no sense."""
        return DetectorOptions(
            backend=backend,
            mode=self.mode,
            max_level=self.max_level,
            deadline_ms=self.deadline_ms,
            loop=self.loop,
            threads=self.threads,
            requests=self.requests,
        )


@dataclass(frozen=True, kw_only=True)
class Input:
    """The pictures."""

    origin: str
    pictures: int
    exit_levels: dict[str, int]
    """Pictures that stop by themselves at each level."""
    skipped: tuple[str, ...]
    """Files that could not be read, each with its reason."""


@dataclass(frozen=True, kw_only=True)
class RunnerResult:
    """The figures of one runner on one image group; `asag_bench.measuring.timing` computes them."""

    calls: int
    stable: bool
    ms: dict[str, float]
    """Percentiles by name (`p50`), mean, min and max of a call."""
    images_per_second: float
    phases_ms: dict[str, float]
    """Median of each phase; empty if calls cannot be split."""
    windows_ms: tuple[tuple[float, ...], ...]
    """Every call."""
    share_of_total: dict[str, float]
    """Of each phase."""
    backbone_and_neck_ms: float | None
    """Median of backbone and neck alone, timed in the same rounds."""
    share_of_backbone_and_neck: dict[str, float]
    """Of each phase."""
    after_the_neck: Spread | None
    """The time beyond backbone and neck alone, from the normalised picture on, as a share of theirs."""
    times_as_long_as_the_first: Spread
    times_as_fast: Spread = field(metadata=_key("times_as_fast_as_the_reference"))
    """Compared with the baseline."""
    exits: dict[str, int]
    """Pictures by the level at which they stopped."""


@dataclass(frozen=True, kw_only=True)
class GroupResult:
    """One image group at one batch size."""

    images: str
    """The group: an exit level, or `worst` for the picture with the most patches."""
    manual_stop: str | None
    """The level at which its pictures were stopped, since none stops there by itself."""
    batch: int
    network_shapes: tuple[str, ...]
    pictures: tuple[str, ...]
    patches: tuple[int, ...]
    """Of each picture, beyond the first level's."""
    anchors: tuple[int, ...]
    """Of each picture, that reach the decoder."""
    stable: bool
    compared: dict[str, str]
    """Runners that go deeper than another one, by which: the cost of probing."""
    probing_costs: dict[str, Spread]
    """Of those runners: their time over the other's."""
    runners: dict[str, RunnerResult] = field(metadata=_key("subjects"))

    @property
    def title(self) -> str:
        """The group's name in tables."""
        return f"{self.images}{' (manual stop)' if self.manual_stop else ''}"


@dataclass(frozen=True, kw_only=True)
class RunnerMemory:
    """What one runner takes before it can be used."""

    added_mib: float
    """Resident memory that loading it and its first call added to the process."""
    load_s: float | None = field(default=None, metadata=_NEWER)
    """Seconds to open, verify and load it."""
    growth_mib: float | None = field(default=None, metadata=_NEWER)
    """Resident memory added by `memory_images` pictures of many sizes, after the first twenty."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Resident memory of the process, in MiB."""

    peak_mib: float
    """With everything loaded."""
    runners: dict[str, RunnerMemory] = field(metadata=_key("subjects"))

    @property
    def has_load_times(self) -> bool:
        """Whether loading was timed."""
        return any(found.load_s is not None for found in self.runners.values())


@dataclass(frozen=True, kw_only=True)
class RunnerAgreement:
    """How far one runner finds what ONNX Runtime finds on the CPU."""

    pictures: int
    same_stops: int
    """Pictures that stop at the same level."""
    detections: float
    """Mean share of a picture's detections there that the runner has too: see `asag_export.gate.parity`."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What the backends find, compared."""

    compared_with: str = field(metadata=_key("with"))
    least_in_float32: float
    runners: dict[str, RunnerAgreement] = field(metadata=_key("subjects"))


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Average precision of one runner, each from 0 to 1, or None where there is nothing to measure."""

    images: int
    ap: float | None
    ap50: float | None
    ap75: float | None


@dataclass(frozen=True, kw_only=True)
class RunnerHeadline:
    """The few figures that one runner is looked at for; by image group where there are several."""

    times_as_fast: dict[str, Spread]
    after_the_neck: dict[str, Spread]
    loop_ms: float | None
    """The loop's own overhead, the most of any group."""
    probing_costs: Spread | None
    """By how much longer the deepest pictures take than when stopped at P5."""
    ap: float | None


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The few figures that a run is looked at for: those of its smallest batch."""

    batch: int
    baseline: str = field(metadata=_key("reference"))
    runners: dict[str, RunnerHeadline] = field(metadata=_key("subjects"))
    compared: dict[str, dict[str, Spread]] = field(metadata=_key("six_layers"))
    """By reference and image group, how many times as long as the first runner the paper's other detectors
    took."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """A run of `asag-bench`."""

    command: str
    machine: Machine
    bundle: BundleResult
    """The first of `bundles`."""
    bundles: dict[str, BundleResult]
    """By runner."""
    baseline: str = field(metadata=_key("reference"))
    options: Options
    input: Input
    groups: tuple[GroupResult, ...] = field(metadata=_key("strata"))
    memory: Memory
    agreement: Agreement | None = field(default=None, metadata=_NEWER)
    accuracy: dict[str, Accuracy]
    """By runner; empty if it was not measured."""
    notes: tuple[str, ...]
    headline: Headline

    @property
    def title(self) -> str:
        """Network, precisions, and the shapes at which pictures reach the network."""
        precisions = dict.fromkeys(bundle.computed_in for bundle in self.bundles.values())
        shapes = dict.fromkeys(shape for group in self.groups for shape in group.network_shapes)
        seen = next(iter(shapes)) if len(shapes) == 1 else f"{len(shapes)} shapes"
        return f"{self.bundle.variant}, {', '.join(precisions)}, {seen}"

    @property
    def smallest_batch(self) -> list[GroupResult]:
        """The image groups at the smallest batch."""
        least = min(group.batch for group in self.groups)
        return [group for group in self.groups if group.batch == least]

    @property
    def has_accuracy(self) -> bool:
        """Whether any runner has an AP."""
        return any(found.ap is not None for found in self.accuracy.values())

    def ap(self, runner: str) -> float | None:
        """Return the AP of a runner; None if it was not measured."""
        return self.accuracy[runner].ap if runner in self.accuracy else None


@dataclass(frozen=True, kw_only=True)
class MethodResult:
    """The figures of one calling method."""

    images_per_second: float
    stable: bool
    compared_with: str
    """The method that does the same one by one."""
    times_as_fast: Spread
    detections: int
    """Those that are confident, in all pictures."""
    rounds_s: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class ThroughputBundle:
    """A bundle, as its manifest describes it."""

    variant: str
    precision: str
    trained: bool
    graphs: dict[str, str]
    """SHA-256 by name."""


@dataclass(frozen=True, kw_only=True)
class ThroughputInput:
    """The pictures that every method is given in every round."""

    origin: str
    pictures: int
    repeated: int
    """How often all pictures are gone through in a round."""
    skipped: tuple[str, ...]
    network_shapes: tuple[str, ...]
    exit_levels: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class ThroughputResult:
    """A run of `asag-bench throughput`."""

    command: str
    machine: Machine
    bundle: ThroughputBundle
    backend: str
    threads: int | None
    mode: str | None = field(default=None, metadata=_NEWER)
    max_level: str | None = field(default=None, metadata=_NEWER)
    deadline_ms: float | None = field(default=None, metadata=_NEWER)
    loop: str = field(default="auto", metadata=_NEWER)
    input: ThroughputInput
    stable: bool
    methods: dict[str, MethodResult] = field(metadata=_key("ways"))


def to_json(value: Any) -> Any:
    """Return a result, or a part of one, as plain JSON values under the keys of the file."""
    if dataclasses.is_dataclass(value):
        return {
            each.metadata.get("key", each.name): to_json(getattr(value, each.name))
            for each in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    return [to_json(item) for item in value] if isinstance(value, list | tuple) else value


def json_text(value: Any) -> str:
    """Return the text of a result's file."""
    return json.dumps(to_json(value), allow_nan=False, indent=1) + "\n"


def is_result(data: object) -> bool:
    """Return whether JSON data looks like a result of `asag-bench run`."""
    return isinstance(data, dict) and data.keys() >= set(_KEYS)


def parse_result(data: object, source: Path) -> Result:
    """Read JSON data as a result; `source` is the file that messages name.  Raises SourceError."""
    if not is_result(data):
        raise SourceError(f"'{source}' is no result of asag-bench; name a result.json that `run` wrote")
    try:
        result = cast(Result, read_fields(Result, data))
        contradiction = next(_contradictions(result), None)
        if contradiction is not None:
            raise FieldError(contradiction)
    except FieldError as error:
        raise SourceError(f"'{source}' is no result of asag-bench that can be read: {error}") from None
    return result


def _contradictions(result: Result) -> Iterator[str]:
    """Yield what cannot be in a result, as half sentences: what its tables and plots take for granted."""
    if not result.groups or not all(group.runners for group in result.groups):
        yield "there are no times in it"
    if not result.headline.runners:
        yield "`headline.subjects` names nothing"
    unknown = () if result.agreement is None else result.agreement.runners.keys() - result.bundles.keys()
    for name in unknown:
        yield f"`agreement.subjects` has '{name}', which `bundles` does not know"
    wanted = {"mean", "min", "max", *(f"p{share:g}" for share in result.options.percentile)}
    for group in result.groups:
        for name, found in group.runners.items():
            where = f"of '{name}' on the pictures '{group.title}'"
            if not found.ms.keys() >= wanted:
                yield f"`ms` {where} lacks some of {', '.join(sorted(wanted))}"
            if min(found.ms.values(), default=0) <= 0 or found.times_as_fast.median < 0:
                yield f"a time {where} is not above 0, or a speed below it"
            shares = found.share_of_total, found.share_of_backbone_and_neck
            if any(share and not share.keys() >= found.phases_ms.keys() for share in shares):
                yield f"the shares {where} are of other phases than its times"


def read_result(path: Path) -> Result:
    """Read a `result.json`.  Raises SourceError if it cannot be read, or is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"cannot read the result '{path}' ({(error.strerror or '').lower()})") from None
    except (ValueError, RecursionError):
        data = None
    return parse_result(data, path)


def parse_machine(data: Mapping[str, Any]) -> Machine:
    """Read the machine of any recorded file, whatever else stands there.  Raises FieldError."""
    known = {each.name for each in dataclasses.fields(Machine)}
    return cast(Machine, read_fields(Machine, {key: data[key] for key in data.keys() & known}))


def read_shape(text: str) -> tuple[int, int]:
    """Read height and width of `800x1088`.  Raises ConfigError for what is none."""
    first, _, second = text.lower().partition("x")
    height, width = unsigned(first), unsigned(second)
    if not height or not width:
        raise ConfigError(f"--shape is '{text}'; expected height x width in pixels, such as 800x1088")
    return height, width
