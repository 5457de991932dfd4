"""What a single call may ask for, over the tiny bundle; `tests/export/test_limits.py` has real networks."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asag_deploy import Bundle, CallOptions, ConfigError, Detections, Detector, StopReason
from asag_deploy.call_options import OPTION_NAMES
from asag_deploy.loop.loop import HostLoop
from support.detection_samples import assert_same
from support.tiny_bundle import ANCHOR_CAP, MAX_DETECTIONS, make_bundle, picture
from support.tiny_graphs import FIRST_ANCHORS, PATCH_ANCHORS

TO_P3 = picture(5, 2)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("exact") / "bundle")


@pytest.fixture(scope="module")
def detector(bundle: Bundle) -> Iterator[Detector]:
    with Detector.load(bundle, threads=1) as detector:
        yield detector


def detect(detector: Detector, image: Any = TO_P3, **options: Any) -> Detections:
    found = detector(image, channel_order="rgb", **options)
    assert isinstance(found, Detections)
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"max_level": "P5"},
        {"max_level": "P4"},
        {"mode": "fast"},
        {"mode": "fast", "max_level": "P4"},
        {"deadline_ms": 1e-9},
        {"max_detections": 3},
        {"anchor_cap": 7},
        {"anchor_cap": 7, "max_detections": 2, "max_level": "P4"},
    ],
)
def test_a_call_is_what_a_detector_loaded_so_gives(
    detector: Detector, bundle: Bundle, options: dict[str, Any]
) -> None:
    for image in (TO_P3, picture(2, 1), picture(20, 9), picture(0)):
        with Detector.load(bundle, threads=1, **options) as loaded:
            expected = detect(loaded, image)
        assert_same(detect(detector, image, **options), expected)
    plain = detect(detector)  # and it was of that call alone
    assert (plain.trace.exit_level, len(plain)) == ("P3", MAX_DETECTIONS)


def test_a_call_takes_precedence_over_loading(bundle: Bundle, detector: Detector) -> None:
    strict: dict[str, Any] = {"mode": "fast", "max_level": "P5", "max_detections": 1, "anchor_cap": 5}
    with Detector.load(bundle, threads=1, deadline_ms=1e-9, **strict) as loaded:
        assert len(detect(loaded)) == 1
        found = detect(
            loaded,
            mode="exact",
            max_level="P3",
            deadline_ms=math.inf,
            max_detections=MAX_DETECTIONS,
            anchor_cap=ANCHOR_CAP,
        )
    assert_same(found, detect(detector))


def test_one_of_mode_and_level_leaves_the_other_as_loaded(bundle: Bundle) -> None:
    with Detector.load(bundle, threads=1, mode="fast", max_level="P4") as loaded:
        few = picture(2, 2)  # of which fast mode stops at once
        assert detect(loaded, few).trace.stop == StopReason.FEW_SELECTED
        assert detect(loaded, few, max_level="P3").trace.stop == StopReason.FEW_SELECTED
        slow = detect(loaded, few, mode="exact").trace
        assert (slow.exit_level, slow.stop) == ("P4", StopReason.MAX_LEVEL)


def test_threshold(detector: Detector) -> None:
    every = detect(detector)
    threshold = float(every.confidence[4])
    assert_same(detect(detector, threshold=threshold), every.filter(threshold))
    assert len(detect(detector, threshold=threshold)) >= 5
    assert len(detect(detector, threshold=1)) == 0


def test_the_best_detections_are_kept(detector: Detector) -> None:
    every, three = detect(detector), detect(detector, max_detections=3)
    np.testing.assert_array_equal(three.confidence, every.confidence[:3])
    np.testing.assert_array_equal(three.xyxy, every.xyxy[:3])


def test_a_cap_takes_the_best_scored(detector: Detector) -> None:
    found = detect(detector, explain=True, anchor_cap=6)
    assert found.trace.anchor_count == len(found.anchors) == 6
    levels = [level.candidates for level in found.trace.levels]
    scores = [np.sort(each.scores[each.passed]) for each in levels if each is not None]
    assert sum(map(len, scores)) == 6
    every = [level.candidates for level in detect(detector, explain=True).trace.levels]
    passing = np.sort(np.concatenate([each.scores[each.passed] for each in every if each is not None]))
    np.testing.assert_array_equal(np.sort(np.concatenate(scores)), passing[-6:])


def test_batches_and_streams(detector: Detector) -> None:
    options: CallOptions = {"max_level": "P4", "max_detections": 4, "threshold": 0.1}
    images = [TO_P3, picture(0), picture(3, 3)]
    expected = [detect(detector, image, **options) for image in images]
    for found in (
        detector(images, channel_order="rgb", **options),
        list(detector.stream(images, channel_order="rgb", batch_size=2, **options)),
    ):
        for one, wanted in zip(found, expected, strict=True):
            assert_same(one, wanted)


def test_every_levels_anchors(detector: Detector) -> None:
    found = detect(detector, explain=True)
    p5, p4, p3 = found.trace.levels
    assert [level.candidates for level in detect(detector).trace.levels] == [None] * 3
    assert p5.candidates is not None
    assert p4.candidates is not None
    assert p3.candidates is not None
    assert len(p5.candidates.scores) == FIRST_ANCHORS
    assert [int(c.asked.sum()) for c in (p5.candidates, p4.candidates)] == [p5.selected, p4.selected]
    assert not p3.candidates.asked.any()
    # What asked was replaced by what the next level found there.
    assert not (p5.candidates.asked & p5.candidates.passed).any()
    assert len(p4.candidates.scores) == p4.patches * PATCH_ANCHORS
    assert p4.candidates.patch.tolist() == [
        patch for patch in range(p4.patches) for _ in range(PATCH_ANCHORS)
    ]
    for level in (p4, p3):
        assert level.candidates is not None
        x1, y1, x2, y2 = level.patch_boxes[level.candidates.patch].T
        cx, cy = level.candidates.boxes[:, :2].T / 2 + level.candidates.boxes[:, 2:].T / 2
        assert ((x1 <= cx) & (cx <= x2) & (y1 <= cy) & (cy <= y2)).all()
    reached = sum(int(level.candidates.passed.sum()) for level in found.trace.levels if level.candidates)
    assert reached == found.trace.anchor_count
    plain = json.loads(json.dumps(found.to_json()))["trace"]["levels"]
    assert plain[1]["candidates"]["patch"] == p4.candidates.patch.tolist()
    assert "candidates" not in detect(detector).to_json()["trace"]["levels"][1]


def test_anchors_are_in_pixels_of_the_original(detector: Detector) -> None:
    small = detect(detector, explain=True).trace.levels[0].candidates
    large = detect(detector, picture(5, 2, size=(128, 128)), explain=True).trace.levels[0].candidates
    assert small is not None
    assert large is not None
    np.testing.assert_allclose(large.boxes, 2 * small.boxes, rtol=1e-5)


def test_in_a_batch_everyone_has_their_own(detector: Detector) -> None:
    images = [picture(3, 3), TO_P3, picture(0)]
    for together, image in zip(detector(images, channel_order="rgb", explain=True), images, strict=True):
        alone = detect(detector, image, explain=True)
        assert len(together.trace.levels) == len(alone.trace.levels)
        for one, other in zip(together.trace.levels, alone.trace.levels, strict=True):
            assert one.candidates is not None
            assert other.candidates is not None
            for field in dataclasses.fields(one.candidates):
                np.testing.assert_array_equal(
                    getattr(one.candidates, field.name), getattr(other.candidates, field.name)
                )


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"threshold": 1.5}, "threshold is 1.5; expected 0 to 1"),
    ({"threshold": math.nan}, "threshold is nan"),
    ({"threshold": "0.5"}, "threshold is '0.5'; expected a number"),
    ({"threshold": True}, "threshold is True"),
    ({"threshold": np.array([0.5, 0.6])}, "threshold is array.*; expected a number"),
    ({"deadline_ms": np.array([5.0])}, "deadline_ms is array.*; expected a number"),
    ({"deadline_ms": 10**400}, "deadline_ms is too large a number"),
    ({"max_detections": np.array([1, 2])}, "max_detections is array.*; expected a whole number"),
    ({"mode": "slow"}, "unknown mode 'slow'"),
    ({"max_level": "P2"}, "unknown max_level 'P2'"),
    ({"deadline_ms": 0}, "deadline_ms is 0; expected more than 0 milliseconds"),
    ({"deadline_ms": -1}, "deadline_ms is -1"),
    ({"deadline_ms": "5"}, "deadline_ms is '5'; expected a number"),
    ({"max_detections": 0}, "max_detections is 0; expected at least 1"),
    ({"max_detections": 2.0}, "max_detections is 2.0; expected a whole number"),
    ({"max_detections": 11}, "exported for 10 at most.*`asag-export --max-detections 11`"),
    ({"anchor_cap": 25}, "exported for 24 at most.*`asag-export --anchor-cap 25`"),
    (
        {"anchor_cap": 2049},
        "anchor_cap is 2049; no bundle can be exported for more than 2048",
    ),
    ({"anchor_cap": 0}, "anchor_cap is 0; the bundle's network passes at least"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_makes_no_sense_is_refused(detector: Detector, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        detect(detector, **options)
    with pytest.raises(ConfigError, match=message):
        detector.stream([TO_P3], **options)  # at once, before anything is asked of it


@pytest.mark.parametrize(("options", "message"), [r for r in REFUSED if "threshold" not in r[0]])
def test_so_it_is_when_loading(bundle: Bundle, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Detector.load(bundle, **options)


def test_explain_is_yes_or_no(detector: Detector) -> None:
    with pytest.raises(ConfigError, match="explain is 'no'; expected True or False"):
        detect(detector, explain="no")


def test_unknown_options_are_a_mistake_in_the_program(detector: Detector) -> None:
    with pytest.raises(TypeError, match="there is no option 'treshold'; the options are threshold, mode"):
        detect(detector, treshold=0.5)
    assert set(OPTION_NAMES) == set(CallOptions.__annotations__)


def test_levels_that_the_bundle_lacks(tmp_path: Path) -> None:
    with Detector.load(make_bundle(tmp_path / "bundle", levels=("P4",))) as detector:
        with pytest.raises(ConfigError, match="max_level 'P3' is beyond the bundle"):
            detect(detector, max_level="P3")
        assert detect(detector, max_level="P4", explain=True).trace.exit_level == "P4"


def test_bundles_of_earlier_releases_have_one_cap(bundle: Bundle) -> None:
    probing = dataclasses.replace(bundle.manifest.probing, cap_can_be_lowered=False)
    old = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, probing=probing))
    with Detector.load(old, threads=1) as detector:
        with pytest.raises(ConfigError, match="whose cap of 24 is fixed; export it again"):
            detect(detector, anchor_cap=7)
        assert detect(detector, anchor_cap=ANCHOR_CAP).trace.anchor_count == ANCHOR_CAP


def test_an_int8_bundle_can_do_more_once_its_float32_bundle_can(bundle: Bundle) -> None:
    """`asag-export` makes none in INT8."""
    int8 = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, precision="int8"))
    asked: list[dict[str, Any]] = [{"anchor_cap": 400}, {"max_detections": 400}]
    for options in asked:
        (option,) = options
        again = f"export its float32 bundle again with `asag-export --{option.replace('_', '-')} 400`, and"
        with pytest.raises(ConfigError, match=again):
            Detector.load(int8, **options)


def test_a_deadline_is_of_one_call(detector: Detector) -> None:
    assert detect(detector, deadline_ms=1e-9).trace.stop == StopReason.DEADLINE
    assert detect(detector, deadline_ms=60_000).trace.stop == StopReason.LAST_LEVEL


def test_deadline_of_the_detector_is_lifted_by_a_call(bundle: Bundle) -> None:
    with Detector.load(bundle, threads=1, deadline_ms=1e-9) as detector:
        assert isinstance(detector._loop, HostLoop)
        assert detect(detector).trace.stop == StopReason.DEADLINE
        assert detect(detector, deadline_ms=math.inf).trace.stop == StopReason.LAST_LEVEL
