"""What detects in the pictures of a part and writes their results: one in each process of a run.

It knows nothing of Ray, which restarts its process when that dies and gives it the same part again.  So it
leaves word of what it has begun: a part that was begun before is done picture by picture, with word of each,
and a picture at which the process has died twice becomes a row with an error.
"""

from __future__ import annotations

import json
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from asag_deploy.batch.index import IndexReader, Part
from asag_deploy.batch.places import Place, read_picture
from asag_deploy.batch.rows import as_parquet, failed_row, found_row, is_whole
from asag_deploy.batch.sources import Picture
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.detections import Detections
from asag_deploy.detector_options import DetectorOptions
from asag_deploy.errors import (
    AsagError,
    BackendError,
    BundleCorruptError,
    BundleError,
    ImageError,
    OutputError,
    reason_of,
)
from asag_deploy.images.reading import RgbImage
from asag_deploy.pipeline import ImageDetector, detect_all

IDENTITY = "run.json"
ATTEMPTS = "attempts"
_MOST_DEATHS = 2
"""At one picture, before it is given up; those of the first attempt are at none that is known."""
_MOST_STARTS = 6
"""Attempts that die before their first picture, such as where the network itself does not fit in memory."""
_MOST_FAILURES_SAID = 5


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that a process of a run has to know."""

    place: Place
    """The folder of the run."""
    key: str
    """What tells this run from others, as its folder has it."""
    attempt: str
    """What tells this start of the program from earlier ones."""
    bundle: Path
    fingerprint: str
    detector: DetectorOptions
    threshold: float
    batch: int


@dataclass(kw_only=True)
class Report:
    """What came of a part."""

    part: int
    pictures: int = 0
    failed: int = 0
    deaths: int = 0
    """Processes that died at it."""
    classes: Counter[str] = field(default_factory=Counter)
    exits: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    """The sentences of the first pictures that failed."""
    problem: str | None = None
    """Why the run cannot go on; None if it can."""

    def to_json(self) -> str:
        """Return it as text, as which it travels."""
        return json.dumps(vars(self))

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what `to_json` has written."""
        data = json.loads(text)
        return cls(**{**data, "classes": Counter(data["classes"]), "exits": Counter(data["exits"])})

    def add(self, row: dict[str, Any]) -> None:
        """Count a row of the results."""
        self.pictures += 1
        if row["error"] is None:
            self.classes.update(row["names"])
            self.exits[row["exit_level"]] += 1
            return
        self.failed += 1
        if len(self.failures) < _MOST_FAILURES_SAID:
            self.failures.append(row["error"])


class Worker:
    """Detects in part after part.

    load: what gives its detector, which is asked for with the first part, so that what goes wrong is said.
    """

    def __init__(self, plan: Plan, load: Callable[[Plan], ImageDetector] | None = None) -> None:
        self._plan = plan
        self._load = load or load_detector
        self._detector: ImageDetector | None = None
        self._index = IndexReader(plan.place)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """Do the parts of a batch as Ray Data gives them: arrays under `part`, each a part as JSON."""
        parts = [Part(**json.loads(text)) for text in batch["part"]]
        return {"report": [self.do(part).to_json() for part in parts]}

    def do(self, part: Part) -> Report:
        """Detect in the pictures of a part and write their results; nothing is raised, the report says it.

        A part whose results are there is left alone, unless it is to be done anew.
        """
        report = Report(part=part.number)
        try:
            attempt = _Attempt(self._plan, part)
            report.deaths = attempt.begun
            self._check_place()
            if not part.anew and is_whole(self._plan.place.size(part.results)):
                return self._already(part, report, attempt)
            attempt.begin()
            rows = []
            for row in self._rows(self._index.pictures(part), attempt):
                report.add(row)
                rows.append(row)
            self._plan.place.write(part.results, as_parquet(rows))
            attempt.end()
        except AsagError as error:
            report.problem = str(error)
        except MemoryError:
            report.problem = f"'{socket.gethostname()}' has not enough memory for it"
        except OSError as error:
            named = "" if error.filename is None else f"'{error.filename}': "
            report.problem = f"on '{socket.gethostname()}': {named}{reason_of(error)}"
        return report

    def _already(self, part: Part, report: Report, attempt: _Attempt) -> Report:
        """Report what a process has written that died before it could."""
        from pyarrow.parquet import ParquetFile

        with self._plan.place.open(part.results) as file:
            for row in ParquetFile(file).read().to_pylist():
                report.add(row)
        attempt.end()
        return report

    def _check_place(self) -> None:
        """Raise OutputError where another folder of that name is seen, as on a disk that is not shared."""
        plan = self._plan
        if self._detector is not None:
            return
        content = plan.place.read(IDENTITY)
        if content is None or json.dumps(plan.key).encode() not in content:
            raise OutputError(
                f"the machine '{socket.gethostname()}' does not see the run in '{plan.place.name}': --output "
                "must be on storage that all machines of the cluster share"
            )

    def _rows(self, pictures: list[Picture], attempt: _Attempt) -> Iterator[dict[str, Any]]:
        if self._detector is None:
            self._detector = self._load(self._plan)
        detector = self._detector
        if not attempt.careful:
            yield from self._detect(detector, pictures)
            return
        for i, picture in enumerate(pictures):
            if attempt.deaths.get(i, 0) >= _MOST_DEATHS:
                said = (
                    f"'{picture.path}': the process that detected in it died {_MOST_DEATHS} times "
                    "(its memory may not be enough for it)"
                )
                yield failed_row(picture.path, said, self._plan.fingerprint)
                continue
            attempt.reach(i)
            yield from self._detect(detector, [picture])

    def _detect(self, detector: ImageDetector, pictures: list[Picture]) -> Iterator[dict[str, Any]]:
        results = detect_all(
            detector,
            map(_Read.of, pictures),
            image_of=lambda read: read.image,
            batch_size=self._plan.batch,
            options={"threshold": self._plan.threshold},
        )
        key = self._plan.fingerprint
        with closing(results):
            for read, found in results:
                if isinstance(found, Detections):
                    yield found_row(read.path, found, key)
                else:
                    said = read.error if found is None else f"'{read.path}': {found}"
                    yield failed_row(read.path, said, key)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Read:
    """A picture that was read, or why it could not be."""

    path: str
    image: RgbImage | None
    error: str = ""

    @classmethod
    def of(cls, picture: Picture) -> _Read:
        try:
            return cls(path=picture.path, image=read_picture(picture.location, picture.path))
        except ImageError as error:
            return cls(path=picture.path, image=None, error=str(error))
        except MemoryError:
            said = f"image '{picture.path}' does not fit in the memory of '{socket.gethostname()}'"
            return cls(path=picture.path, image=None, error=said)


class _Attempt:
    """An attempt at a part, and word of the earlier ones of the same start of the program."""

    def __init__(self, plan: Plan, part: Part) -> None:
        self._place, self._name = plan.place, f"{ATTEMPTS}/{plan.attempt}/part-{part.number:07d}.json"
        said = self._place.read(self._name)
        word = {"begun": 0, "starts": 0, "at": None, "deaths": {}} if said is None else json.loads(said)
        self.begun: int = word["begun"]
        """Attempts that have ended without an end."""
        self._starts: int = word["starts"]
        self.deaths: Counter[int] = Counter({int(at): count for at, count in word["deaths"].items()})
        """By position, how often the process has died at a picture."""
        if word["at"] is not None:
            self.deaths[word["at"]] += 1
            self._starts = 0

    @property
    def careful(self) -> bool:
        """Whether word is left of every picture."""
        return self.begun > 0

    def begin(self) -> None:
        """Leave word that the part is begun.  Raises BackendError where that leads nowhere."""
        if self._starts >= _MOST_STARTS:
            raise BackendError(
                f"the process that detects died {self._starts} times before its first picture, on "
                f"'{socket.gethostname()}' in the end: its memory may not be enough for the network"
            )
        self._starts += 1
        self._leave_word(None)

    def reach(self, position: int) -> None:
        """Leave word of the picture that comes next."""
        self._leave_word(position)

    def end(self) -> None:
        """Take the word back: the results are there."""
        self._place.remove(self._name)

    def _leave_word(self, at: int | None) -> None:
        word = {
            "begun": self.begun + 1,
            "starts": self._starts,
            "at": at,
            "deaths": dict(self.deaths),
            "machine": socket.gethostname(),
            "process": os.getpid(),
        }
        self._place.write(self._name, json.dumps(word).encode())


def load_detector(plan: Plan) -> ImageDetector:
    """Load the detector of a run.  Raises BundleError where another bundle lies there than at its start."""
    try:
        bundle = Bundle.open(plan.bundle)
    except BundleError as error:
        raise type(error)(f"on '{socket.gethostname()}', {error}") from None
    if bundle.fingerprint != plan.fingerprint:
        raise BundleCorruptError(
            f"on '{socket.gethostname()}', '{plan.bundle}' is another bundle than where the run was started: "
            "it must be the same on all machines of the cluster"
        )
    return plan.detector.load(bundle)
