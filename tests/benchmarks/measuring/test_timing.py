"""Figures, windows, the split of a call, and the choice of pictures."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from asag_bench.measuring.image_groups import (
    ImageGroup,
    batches,
    generated_pictures,
    read_pictures,
    sort_pictures,
)
from asag_bench.measuring.timing import Timings, agree, are_stable, measure, ratio, shares
from asag_bench.result import Spread
from asag_bench.runners.runner import PHASES, DetectorRunner, Run, Runner, StoppedRunner
from asag_deploy.backends import open_network
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import FIRST_LEVEL, Level, Preprocessing
from asag_deploy.detections import Detections
from asag_deploy.detector import Detector
from asag_deploy.errors import SourceError
from asag_deploy.images.reading import RgbImage
from asag_deploy.loop.stopping import stop_rule
from support.tiny_bundle import make_bundle, picture

SPEC = Preprocessing(shorter_side=64, longer_side=128)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bench") / "bundle")


@pytest.fixture(scope="module")
def runner(bundle: Bundle) -> DetectorRunner:
    network = open_network(None, bundle, threads=1)
    return DetectorRunner(
        "tiny", bundle.manifest, network, lambda level: stop_rule(bundle.manifest, None, level)
    )


@pytest.mark.parametrize(
    ("medians", "expected"),
    [
        ([], False),
        ([10, 10], False),
        ([10, 10.4, 10.2], True),
        ([10, 10.6, 10.2], False),
        ([99, 10, 10.5, 10.1], True),
        ([10, 10, 10, 20], False),
    ],
)
def test_windows_that_agree(medians: list[float], expected: bool) -> None:
    assert agree(medians) is expected


def test_timings_keep_every_sample() -> None:
    windows = [[10.0, 10.0, 10.0], [10.0, 1000.0, 10.0], [10.0, 10.0, 10.0], [500.0]]
    found = Timings(batch=2, windows=windows)
    assert found.stable  # the last window was cut short
    assert max(found.samples) == 1000
    result = found.figures((0, 50, 100), first=found, baseline=found)
    assert result.ms == {"p0": 10, "p50": 10, "p100": 1000, "mean": 158, "min": 10, "max": 1000}
    assert result.images_per_second == pytest.approx(2000 / 158, abs=1e-3)
    assert result.calls == 10
    assert [list(window) for window in result.windows_ms] == found.windows


def test_phases_that_a_call_did_not_have_are_nothing() -> None:
    calls = [{"backbone": 1.0}, {"backbone": 3.0, "probe_p4": 9.0}, {"backbone": 2.0}]
    found = Timings(batch=1, phases=calls)
    assert found.median_phases() == {"backbone": 2.0, "probe_p4": 0.0}


def test_ratio_is_taken_round_by_round() -> None:
    drifting = [1.0, 2.0, 4.0, 8.0, 16.0]
    assert ratio([3 * value for value in drifting], drifting) == Spread(median=3, p25=3, p75=3)


def test_shares() -> None:
    assert shares({"a": 1.0, "b": 3.0}) == {"a": 0.25, "b": 0.75}
    assert shares({"a": 1.0, "b": 3.0}, 2.0) == {"a": 0.5, "b": 1.5}
    assert shares({"a": 1.0}, None) == {}
    assert shares({}) == {}


def test_a_call_is_split_without_remainder(runner: DetectorRunner) -> None:
    run = runner([picture(5, 2)], None)
    assert list(run.phases_ms) == list(PHASES)
    assert all(value >= 0 for value in run.phases_ms.values())
    assert sum(run.phases_ms.values()) == pytest.approx(run.total_ms, rel=0.2, abs=1)
    assert run.exits == ("P3",)
    stopped = runner([picture(0), picture(0)], None)
    assert "probe_p4" not in stopped.phases_ms
    assert stopped.exits == ("P5", "P5")
    assert runner([picture(5, 2)], "P4").exits == ("P4",)


def detector_of(bundle: Bundle) -> Callable[[RgbImage], Detections]:
    detector = Detector.load(bundle, threads=1)
    return lambda image: detector(image, channel_order="rgb")


def test_pictures_by_exit_level(bundle: Bundle) -> None:
    images = {"early": picture(0), "deep": picture(5, 2), "deeper": picture(9, 4), "middle": picture(3)}
    found = sort_pictures(list(images.items()), detector_of(bundle), ["P5", "P4", "P3"], origin="test")
    assert found.histogram == {"P5": 1, "P4": 1, "P3": 2}
    names = {group.name: [p.name for p in group.pictures] for group in found.groups}
    assert names == {"P5": ["early"], "P4": ["middle"], "P3": ["deep", "deeper"], "worst": ["deeper"]}
    assert not any(group.forced for group in found.groups)
    assert found.missing == ()


def test_levels_where_nothing_stops(bundle: Bundle) -> None:
    found = sort_pictures([("one", picture(3))], detector_of(bundle), ["P5", "P4", "P3"], origin="test")
    assert [(group.name, group.max_level) for group in found.groups] == [
        ("P5", "P5"),
        ("P4", None),
        ("worst", None),
    ]
    assert found.missing == ("P3",)


def test_at_most_so_many_pictures_a_level(bundle: Bundle) -> None:
    many = [(str(i), picture(0)) for i in range(40)]
    found = sort_pictures(many, detector_of(bundle), ["P5"], origin="test")
    chosen = [int(p.name) for p in found.groups[0].pictures]
    assert len(chosen) == 16
    assert chosen == sorted(set(chosen))
    assert chosen[0] == 0
    assert chosen[-1] >= 36


def group_of(*images: RgbImage, level: Level | None = None) -> ImageGroup:
    pictures = tuple(SimpleNamespace(name=str(i), image=image) for i, image in enumerate(images))
    return ImageGroup(name="P5", max_level=level, pictures=pictures)  # type: ignore[arg-type]


def test_batches_are_full_and_of_one_shape_where_they_can_be() -> None:
    wide, high = (64, 128), (128, 64)
    images = [picture(i, size=size) for i, size in enumerate((wide, high, wide, high, wide))]
    made = batches(group_of(*images), 2, SPEC)
    shapes = [[image.shape[:2] for image in batch] for batch in made]
    assert shapes == [[wide, wide], [wide, high], [high, wide]]
    assert {int(image[0, 0, 0]) for batch in made for image in batch} == {0, 1, 2, 3, 4}


class Clockwork:
    """A runner that takes as long as it is told."""

    def __init__(self, name: str, times: Sequence[float]) -> None:
        self.name, self.times = name, list(times)
        self.calls: list[tuple[int, Level | None]] = []

    def __call__(self, images: Sequence[RgbImage], max_level: Level | None) -> Run:
        self.calls.append((len(images), max_level))
        exits = tuple(FIRST_LEVEL for _ in images)
        return Run(total_ms=self.times[len(self.calls) % len(self.times)], exits=exits)


def test_measuring_ends_when_the_windows_agree() -> None:
    steady, other = Clockwork("steady", [10.0]), Clockwork("other", [20.0])
    result = measure(
        group_of(picture(0), level="P5"),
        [steady, other],
        batch=2,
        spec=SPEC,
        warmup=3,
        duration=60,
        pyramids={"steady": lambda images: 5.0},
    )
    assert are_stable(result)
    assert len(result["steady"].windows) == 3
    assert len(steady.calls) == 3 + 12  # warm-up calls do not count
    assert set(steady.calls) == {(2, "P5")}
    assert ratio(result["other"].samples, result["steady"].samples).median == 2
    assert result["other"].exits == {"P5": 24}
    assert (result["steady"].pyramid_ms, result["other"].pyramid_ms) == ([5.0] * 12, None)
    assert result["other"].after_the_neck() is None


def test_what_comes_after_the_neck_is_beyond_the_pyramid_of_the_same_round() -> None:
    """A machine that slows down to a tenth changes nothing."""
    slowness = [1.0, 2.0, 10.0]
    before = {"preprocess": 1.0, "upload": 2.0, "normalize": 3.0}
    phases = [{name: factor * ms for name, ms in before.items()} for factor in slowness]
    calls = Timings(
        batch=1,
        windows=[[66.0 * factor for factor in slowness]],
        phases=phases,
        pyramid_ms=[50.0 * factor for factor in slowness],
    )
    assert calls.after_the_neck() == Spread(median=0.2, p25=0.2, p75=0.2)


def test_the_pyramid_is_timed_beside_its_runner_on_either_side() -> None:
    order: list[str] = []

    class Noting(Clockwork):
        def __call__(self, images: Sequence[RgbImage], max_level: Level | None) -> Run:
            order.append(self.name if max_level is None else f"{self.name} to {max_level}")
            return super().__call__(images, max_level)

    def pyramid(images: Sequence[RgbImage]) -> float:
        order.append("pyramid")
        return 1.0

    one = Noting("one", [1.0])
    runners: list[Runner] = [one, StoppedRunner(one, "P5")]
    measure(
        group_of(picture(0)),
        runners,
        batch=1,
        spec=SPEC,
        warmup=0,
        duration=60,
        pyramids={"one": pyramid},
    )
    assert order[:6] == ["one", "pyramid", "one to P5", "one to P5", "pyramid", "one"]


def test_each_pyramid_is_warmed_up_too() -> None:
    """Some backends compile for a size at its first call, which would be the first that counts."""
    runner = Clockwork("any", [1.0])
    images = [picture(0, size=size) for size in ((64, 64), (64, 128), (64, 64))]
    seen: list[tuple[int, ...]] = []

    def pyramid(images: Sequence[RgbImage]) -> float:
        seen.append(images[0].shape[:2])
        return 1.0

    given: dict[str, Any] = {"batch": 1, "spec": SPEC, "duration": 1e-9, "pyramids": {"any": pyramid}}
    measure(group_of(*images), [runner], **given, warmup=2)
    assert sorted(seen) == [(64, 64)] * 2 + [(64, 128)] * 2
    measure(group_of(*images), [runner], **given, warmup=0)
    assert len(seen) == 4


def test_nothing_old_is_collected_while_the_clock_runs() -> None:
    """What was there before is frozen in every timed call, and only then."""
    frozen: list[bool] = []

    class Noting(Clockwork):
        def __call__(self, images: Sequence[RgbImage], max_level: Level | None) -> Run:
            frozen.append(gc.get_freeze_count() > 0)
            return super().__call__(images, max_level)

    before = gc.get_freeze_count()
    measure(group_of(picture(0)), [Noting("any", [1.0])], batch=1, spec=SPEC, warmup=2, duration=60)
    assert frozen == [before > 0] * 2 + [True] * 12
    assert gc.get_freeze_count() == 0


def test_what_does_not_settle_is_said_to_be_unstable() -> None:
    growing = Clockwork("growing", [1.3**i for i in range(2000)])
    start = time.perf_counter()
    result = measure(group_of(picture(0)), [growing], batch=1, spec=SPEC, warmup=0, duration=0.05)
    assert time.perf_counter() - start < 30
    assert not are_stable(result)


def test_each_shape_is_warmed_up() -> None:
    runner = Clockwork("any", [1.0])
    images = [picture(0, size=size) for size in ((64, 64), (64, 128), (64, 64))]
    measure(group_of(*images), [runner], batch=1, spec=SPEC, warmup=2, duration=1e-9)
    assert len(runner.calls) == 2 * 2
    seen: list[int] = []

    def note(images: Sequence[RgbImage], max_level: Level | None) -> Run:
        seen.append(int(images[0][0, 0, 0]))
        return Run(total_ms=1.0)

    note.name = "notes"  # type: ignore[attr-defined]
    shades = group_of(*(picture(shade) for shade in range(5)))
    measure(shades, [note], batch=1, spec=SPEC, warmup=2, duration=1e-9)  # type: ignore[list-item]
    assert seen == [0, 1, 2, 3, 4], "what compiles as it goes may do so for any picture"
    measure(shades, [note], batch=1, spec=SPEC, warmup=0, duration=1e-9)  # type: ignore[list-item]
    assert len(seen) == 5


def test_pictures_from_a_folder(tmp_path: Path) -> None:
    for i in range(3):
        cv2.imwrite(str(tmp_path / f"{i}.png"), np.full((8, 8, 3), i, np.uint8))
    (tmp_path / "3.png").write_bytes(b"no picture")
    pictures, failed = read_pictures(tmp_path, None)
    assert [name for name, _ in pictures] == ["0.png", "1.png", "2.png"]
    assert len(failed) == 1
    assert len(read_pictures(tmp_path, 2)[0]) == 2


def test_folders_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"there is no folder '.*absent' with pictures"):
        read_pictures(tmp_path / "absent", None)
    with pytest.raises(SourceError, match="holds no images"):
        read_pictures(tmp_path, None)
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(SourceError, match="holds videos but no pictures"):
        read_pictures(tmp_path, None)
    (tmp_path / "b.png").write_bytes(b"")
    with pytest.raises(SourceError, match=r"none of the pictures .* can be read, beginning with"):
        read_pictures(tmp_path, None)


def test_generated_pictures_are_the_same_everywhere() -> None:
    first, second = generated_pictures(3), generated_pictures(3)
    assert [name for name, _ in first] == ["scene-0", "scene-1", "scene-2"]
    assert all((a == b).all() for (_, a), (_, b) in zip(first, second, strict=True))
    assert len({image.shape for _, image in first}) == 3
