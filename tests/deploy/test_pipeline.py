"""Reading, detecting and writing at once: order, limits, errors and early ends, without a clock."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from asag_deploy import interruption, pipeline
from asag_deploy.bundle.manifest import Preprocessing
from asag_deploy.errors import (
    AsagError,
    BackendError,
    ConfigError,
    EngineUnfitError,
    GpuMemoryError,
    ImageError,
)
from asag_deploy.pipeline import BatchesBySize, detect_all
from support.detection_samples import make_detections

SOON = 20.0
"""Seconds after which a test that waits for an event gives up; none takes as long as it should pass."""


def image(number: int, side: int = 8) -> NDArray[np.uint8]:
    return np.full((side, 10, 3), number, np.uint8)


class FakeDetector:
    """Finds as many pixels of height as the image's number; counts its calls."""

    def __init__(self, before: Callable[[list[int]], object] = lambda numbers: None) -> None:
        self.requests = 1
        self.manifest = SimpleNamespace(preprocessing=Preprocessing(shorter_side=8, longer_side=64))
        self.batches: list[list[int]] = []
        self.most_at_once = 0
        self._before = before
        self._now = 0
        self._lock = threading.Lock()

    def __call__(self, images: list[NDArray[np.uint8]], *, channel_order: str) -> list[Any]:
        assert channel_order == "rgb"
        numbers = [int(each[0, 0, 0]) for each in images]
        with self._lock:
            self.batches.append(numbers)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            self._before(numbers)
            return [make_detections((number + 1, 10)) for number in numbers]
        finally:
            with self._lock:
                self._now -= 1


class Room(threading.Semaphore):
    """Says when somebody has to wait for it."""

    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.size = value
        self.full = threading.Event()

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        if super().acquire(blocking=False):
            return True
        self.full.set()
        return super().acquire(blocking, timeout)


@pytest.fixture
def rooms(monkeypatch: pytest.MonkeyPatch) -> list[Room]:
    made: list[Room] = []

    def make(value: int) -> Room:
        made.append(Room(value))
        return made[-1]

    monkeypatch.setattr(pipeline, "Semaphore", make)
    return made


def run(detector: FakeDetector, items: Any, **options: Any) -> Any:
    """`detect_all` of (number, image) pairs, or of numbers that are all of one size."""
    return detect_all(
        detector,  # type: ignore[arg-type]
        items,
        image_of=lambda item: image(item) if isinstance(item, int) else item[1],
        **options,
    )


def numbers_of(results: Any) -> list[int]:
    return [found.original_shape[0] - 1 for _, found in results]


def threads_of_pipelines() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("asag-")]


@pytest.mark.parametrize("requests", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_results_come_in_the_order_of_the_items(requests: int, batch_size: int) -> None:
    results = list(run(FakeDetector(), range(23), requests=requests, batch_size=batch_size))
    assert [item for item, _ in results] == list(range(23))
    assert numbers_of(results) == list(range(23))
    assert threads_of_pipelines() == []


def test_nothing_gives_nothing() -> None:
    detector = FakeDetector()
    assert list(run(detector, [])) == []
    assert detector.batches == []


def test_a_later_image_that_is_done_first_waits_for_its_turn() -> None:
    second_done = threading.Event()

    def before(numbers: list[int]) -> None:
        if numbers == [0]:
            assert second_done.wait(SOON)
        elif numbers == [1]:
            second_done.set()

    assert numbers_of(run(FakeDetector(before), range(6), requests=2)) == list(range(6))


def test_so_many_requests_run_at_once_and_no_more() -> None:
    meeting = threading.Barrier(3)
    detector = FakeDetector(lambda numbers: meeting.wait(SOON))
    assert numbers_of(run(detector, range(9), requests=3)) == list(range(9))
    assert detector.most_at_once == 3


def test_requests_are_those_of_the_detector_unless_given() -> None:
    meeting = threading.Barrier(2)
    detector = FakeDetector(lambda numbers: meeting.wait(SOON))
    detector.requests = 2
    assert numbers_of(run(detector, range(4))) == list(range(4))
    assert detector.most_at_once == 2


@pytest.mark.parametrize(("batch_size", "requests"), [(1, 1), (1, 4), (3, 2)])
def test_a_slow_caller_holds_up_the_reading(rooms: list[Room], batch_size: int, requests: int) -> None:
    read = []

    def items() -> Iterator[int]:
        for number in range(100):
            read.append(number)
            yield number

    taken = 0
    with closing(run(FakeDetector(), items(), batch_size=batch_size, requests=requests)) as results:
        for _ in results:
            if taken < 10:
                room = rooms[0]
                assert room.full.wait(SOON)
                assert len(read) - taken == room.size == batch_size * (requests + 3)
                room.full.clear()
            assert len(read) - taken <= room.size
            taken += 1
    assert taken == 100


def test_an_exception_of_the_iterable_comes_after_what_was_read_before() -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise OSError("the disk is gone")

    seen: list[int] = []
    with pytest.raises(OSError, match="the disk is gone"):
        seen.extend(item for item, _ in run(FakeDetector(), items(), batch_size=2, requests=2))
    assert seen == [0, 1, 2]
    assert threads_of_pipelines() == []


def test_what_is_not_iterable_is_raised_to_the_caller() -> None:
    with pytest.raises(TypeError, match="not iterable"):
        next(run(FakeDetector(), 3))


@pytest.mark.parametrize("error", [BackendError("out of memory"), KeyboardInterrupt(), ValueError("odd")])
def test_an_exception_of_the_detector_comes_at_its_image(error: BaseException) -> None:
    def before(numbers: list[int]) -> None:
        if 4 in numbers:
            raise error

    seen: list[int] = []
    with pytest.raises(type(error)) as raised:
        seen.extend(item for item, _ in run(FakeDetector(before), range(20), requests=3))
    assert raised.value is error
    assert seen == [0, 1, 2, 3]
    assert threads_of_pipelines() == []


def test_too_few_results_do_not_leave_the_caller_waiting() -> None:
    detector = FakeDetector()
    detector.__class__ = type("Lazy", (FakeDetector,), {"__call__": lambda *_args, **_options: []})
    with pytest.raises(ValueError, match="zip"):
        list(run(detector, range(3)))


@pytest.mark.parametrize("kind", [ImageError, EngineUnfitError, GpuMemoryError])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_image_that_is_refused_costs_no_other(batch_size: int, kind: type[AsagError]) -> None:
    def before(numbers: list[int]) -> None:
        if 4 in numbers:
            raise kind("not this one")

    results = list(run(FakeDetector(before), range(7), batch_size=batch_size))
    assert [isinstance(found, kind) for _, found in results] == [number == 4 for number in range(7)]
    del results[4]
    assert numbers_of(results) == [0, 1, 2, 3, 5, 6]


@pytest.mark.parametrize("kind", [EngineUnfitError, GpuMemoryError])
def test_a_batch_that_is_too_large_is_halved(kind: type[AsagError]) -> None:
    def before(numbers: list[int]) -> None:
        if len(numbers) > 2:
            raise kind("too many")

    detector = FakeDetector(before)
    assert numbers_of(run(detector, range(6), batch_size=6)) == list(range(6))
    assert detector.batches == [[0, 1, 2, 3, 4, 5], [0, 1, 2], [0], [1, 2], [3, 4, 5], [3], [4, 5]]


def test_an_exception_of_the_caller_ends_everything() -> None:
    ended = threading.Event()

    def items() -> Iterator[int]:
        try:
            yield from range(100)
        finally:
            ended.set()

    with pytest.raises(ZeroDivisionError), closing(run(FakeDetector(), items(), requests=2)) as results:
        sum(1 // (3 - item) for item, _ in results)
    assert ended.is_set()
    assert threads_of_pipelines() == []


def test_closing_early_drops_what_waits(rooms: list[Room]) -> None:
    detector = FakeDetector()
    ended = threading.Event()

    def items() -> Iterator[int]:
        try:
            yield from range(100)
        finally:
            ended.set()

    results = run(detector, items())
    next(results)
    assert rooms[0].full.wait(SOON)
    results.close()
    assert ended.is_set()
    assert sum(len(batch) for batch in detector.batches) <= rooms[0].size
    assert threads_of_pipelines() == []
    assert list(results) == []


def test_closing_before_the_beginning_reads_nothing() -> None:
    read: list[int] = []
    results = run(FakeDetector(), map(read.append, range(3)))
    results.close()
    assert read == []


def test_closing_does_not_wait_for_an_iterable_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_PATIENCE_S", 0.0)
    waiting, given_up, ended = threading.Event(), threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        yield 0
        try:
            waiting.set()
            given_up.wait(SOON)
            yield 1
        finally:
            ended.set()

    detector = FakeDetector()
    results = run(detector, items())
    next(results)
    assert waiting.wait(SOON)
    results.close()
    assert not ended.is_set()
    assert any(thread.is_alive() for thread in interruption._left_behind)  # for the end of the program
    given_up.set()
    assert ended.wait(SOON)
    assert detector.batches == [[0]]


@pytest.mark.parametrize("requests", [1, 2])
def test_images_of_other_sizes_do_not_hold_one_up_for_ever(requests: int) -> None:
    """One of its own size, then more of another, or of none at all, than may be in flight."""
    items = [(0, image(0, 9)), *((number, image(number)) for number in range(1, 30))]
    detector = FakeDetector()
    results = list(run(detector, items, batch_size=4, requests=requests))
    assert numbers_of(results) == list(range(30))
    assert [0] in detector.batches
    without = [(0, image(0)), *((number, None) for number in range(1, 30))]
    results = list(run(detector, without, batch_size=4, requests=requests))
    assert [found is None for _, found in results] == [False] + [True] * 29


def test_batches_depend_on_sizes_and_order_alone() -> None:
    items = [(number, image(number, 8 if number % 3 else 9)) for number in range(20)]
    seen = []
    for _ in range(3):
        detector = FakeDetector()
        list(run(detector, items, batch_size=3, requests=2))
        seen.append(sorted(detector.batches))
    assert seen[0] == seen[1] == seen[2]
    assert all(len({number % 3 == 0 for number in batch}) == 1 for batch in seen[0])
    assert max(len(batch) for batch in seen[0]) == 3


def test_batches_by_size() -> None:
    batches = BatchesBySize[str](2, reach=3)
    batches.add(0, "small", "a")
    assert batches.ready(0) == []
    batches.add(1, "large", "B")
    batches.add(2, "small", "c")
    assert batches.ready(2) == [["a", "c"]]
    batches.add(3, "small", "d")
    assert batches.ready(3) == []
    assert batches.ready(4) == [["B"]]  # three later than it came
    batches.add(5, "large", "F")
    assert batches.rest() == [["d"], ["F"]]
    assert batches.rest() == []


@pytest.mark.parametrize("name", ["batch_size", "requests"])
def test_impossible_numbers(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} is 0; expected at least 1$"):
        run(FakeDetector(), [], **{name: 0})
