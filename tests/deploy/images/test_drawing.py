"""Pictures of every size: what is drawn, where, and that it stays inside."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from asag_deploy.detections import Detections
from asag_deploy.images.drawing import (
    ANCHOR_COLOUR,
    PATCH_COLOUR,
    SHOWN_AT,
    LegendEntry,
    class_colour,
    draw_boxes,
    draw_caption,
    draw_detections,
    draw_labels,
    draw_trace,
    muted,
    shown_at,
    trace_caption,
    with_legend,
)
from support.detection_samples import make_detections, make_trace

GREY = 90


def canvas(height: int, width: int) -> NDArray[np.uint8]:
    return np.full((height, width, 3), GREY, dtype=np.uint8)


def drawn(picture: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """(H, W) where the canvas was drawn on."""
    touched: NDArray[np.bool_] = (picture != GREY).any(axis=2)
    return touched


def draw(picture: NDArray[np.uint8], found: Detections) -> None:
    draw_detections(
        picture, xyxy=found.xyxy, class_id=found.class_id, names=found.names, confidence=found.confidence
    )


def shows(picture: NDArray[np.uint8], colour: tuple[int, int, int]) -> NDArray[np.bool_]:
    """(H, W) where the picture has exactly this colour."""
    same: NDArray[np.bool_] = (picture == colour).all(axis=2)
    return same


def test_colours_are_distinct_and_always_the_same() -> None:
    colours = [class_colour(i) for i in range(365)]
    assert len(set(colours)) == 365
    assert colours[:80] == [class_colour(i) for i in range(80)]
    assert all(0 <= value <= 255 for colour in colours for value in colour)


def test_the_first_colours_are_far_apart() -> None:
    colours = [np.array(class_colour(i)) for i in range(6)]
    colours += [np.array(PATCH_COLOUR), np.array(ANCHOR_COLOUR)]
    for one, other in itertools.combinations(colours, 2):
        assert np.abs(one - other).sum() > 80


def test_what_was_annotated_has_a_name_alone() -> None:
    found = make_detections((480, 640), xyxy=((100, 200, 300, 400),), confidence=(1.0,), class_id=(2,))
    named, expected, sure = canvas(480, 640), canvas(480, 640), canvas(480, 640)
    draw_detections(named, xyxy=found.xyxy, class_id=found.class_id, names=found.names, confidence=None)
    colours = [class_colour(2)]
    draw_boxes(expected, found.xyxy, colours[0])
    draw_labels(expected, found.xyxy, [(found.names[0],)], colours)
    draw(sure, found)
    assert np.array_equal(named, expected)
    assert drawn(named).sum() < drawn(sure).sum()


def test_box_lies_where_it_should() -> None:
    picture = canvas(480, 640)
    found = make_detections((480, 640), xyxy=((100, 200, 300, 400),), confidence=(0.9,), class_id=(2,))
    draw(picture, found)
    colour = shows(picture, class_colour(2))
    assert colour[200, 150:250].all()
    assert colour[400, 150:250].all()
    assert colour[250:350, 100].all()
    assert colour[250:350, 300].all()
    assert not drawn(picture)[210:390, 110:290].any()


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 500), (500, 1), (7, 9), (80, 100), (480, 640), (40, 20_000), (3000, 4000)]
)
def test_any_size_can_be_drawn_on(shape: tuple[int, int]) -> None:
    height, width = shape
    everywhere = [(0, 0, width, height), (width - 1, height - 1, width, height), (0, 0, 0, 0)]
    found = make_detections(
        shape, xyxy=everywhere, anchors=[(-50, -50, width + 50, height + 50)], trace=make_trace(p4=everywhere)
    )
    picture = canvas(height, width)
    draw_trace(picture, found.anchors, found.trace)
    draw(picture, found)
    draw_caption(picture, trace_caption(found.trace))
    assert drawn(picture).any()
    assert picture.shape == (height, width, 3)


def test_lines_and_text_grow_with_the_picture() -> None:
    part = {}
    for scale in (1, 5):
        picture = canvas(480 * scale, 640 * scale)
        box = tuple(value * scale for value in (100, 200, 300, 400))
        found = make_detections((480 * scale, 640 * scale), xyxy=(box,), confidence=(0.9,), class_id=(0,))
        draw(picture, found)
        part[scale] = drawn(picture).mean()
    assert part[5] == pytest.approx(part[1], rel=0.2)


@pytest.mark.parametrize(
    "corner", [(0, 0, 20, 12), (620, 0, 640, 12), (0, 470, 20, 480), (620, 470, 640, 480)]
)
def test_labels_stay_inside(corner: tuple[int, int, int, int]) -> None:
    picture = canvas(480, 640)
    found = make_detections((480, 640), xyxy=(corner,), confidence=(0.98,), class_id=(1,))
    draw(picture, found)
    label = shows(picture, class_colour(1))
    x1, y1, x2, y2 = corner
    rows, columns = np.nonzero(label)
    assert columns.max() - columns.min() > x2 - x1 + 20
    assert rows.max() - rows.min() >= y2 - y1 + 10


def test_labels_do_not_cover_each_other() -> None:
    """Two equal boxes: the second label finds another place."""
    one, two = canvas(480, 640), canvas(480, 640)
    box = (100, 100, 300, 300)
    draw(one, make_detections((480, 640), xyxy=[box], confidence=[0.9], class_id=[0]))
    draw(two, make_detections((480, 640), xyxy=[box] * 2, confidence=[0.9, 0.9], class_id=[0, 0]))
    assert shows(two, class_colour(0)).sum() > shows(one, class_colour(0)).sum() + 300


def test_many_labels_leave_most_of_the_picture_visible() -> None:
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 70, (60, 2))
    rows = np.concatenate([corners, corners + 1], axis=1)
    picture = canvas(80, 100)
    found = make_detections(xyxy=rows, confidence=np.linspace(0.9, 0.4, 60), class_id=[0] * 60)
    draw(picture, found)
    assert 0.1 < drawn(picture).mean() < 0.25 + 60 * 4 / 8000


def test_long_names_are_shortened_to_fit() -> None:
    """`traffic light 0.98` is too wide for this picture; the confidence alone is not."""
    picture = canvas(60, 40)
    found = make_detections((60, 40), xyxy=((5, 30, 25, 50),), confidence=(0.98,), class_id=(1,))
    draw(picture, found)
    outline = 4 * 21
    assert shows(picture, class_colour(1)).sum() > outline + 30


def test_trace_draws_patches_and_anchors_but_not_the_first_level() -> None:
    picture = canvas(480, 640)
    found = make_detections(
        (480, 640),
        anchors=((50, 50, 90, 90),),
        trace=make_trace(p4=((200, 200, 320, 320),), p3=((400, 100, 460, 160),)),
    )
    draw_trace(picture, found.anchors, found.trace)
    assert shows(picture, PATCH_COLOUR)[200, 200:320].all()
    assert shows(picture, PATCH_COLOUR)[100:160, 400].all()
    assert shows(picture, ANCHOR_COLOUR)[50, 50:90].all()
    touched = drawn(picture)
    touched[195:326, 195:326] = touched[95:166, 395:466] = touched[45:96, 45:96] = False
    assert not touched.any()


def test_caption_tells_exit_patches_and_anchors() -> None:
    assert trace_caption(make_trace()) == ["exit P4: nothing selected", "patches P4 1", "12 anchors"]
    deep = make_trace(p3=((1, 1, 2, 2), (3, 3, 4, 4)), dropped=2)
    assert trace_caption(deep) == [
        "exit P3: last level",
        "patches P4 1, P3 2",
        "12 anchors",
        "4 patches dropped",
    ]
    stopped = trace_caption(make_trace(p4=None))
    assert stopped[1] == "no patches"


def test_caption_is_a_strip_at_the_bottom() -> None:
    picture = canvas(480, 640)
    draw_caption(picture, trace_caption(make_trace()))
    rows = np.nonzero(drawn(picture).any(axis=1))[0]
    assert rows[-1] == 479
    assert 10 < len(rows) < 40
    assert picture[rows[0] :].max() > 240


def test_caption_takes_a_third_of_a_small_picture_at_most() -> None:
    picture = canvas(80, 100)
    draw_caption(picture, trace_caption(make_trace()))
    rows = np.nonzero(drawn(picture).any(axis=1))[0]
    assert 0 < len(rows) <= 80 / 3
    tiny = canvas(20, 20)
    draw_caption(tiny, trace_caption(make_trace()))
    assert not drawn(tiny).any()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((64, 32), (640, 320)),
        ((3000, 4000), (960, 1280)),
        ((700, 900), (700, 900)),
        ((1, 1), (640, 640)),
        ((1, 20_000), (1, 1280)),
    ],
)
def test_pictures_are_shown_at_a_size_for_a_screen(shape: tuple[int, int], expected: tuple[int, int]) -> None:
    picture = canvas(*shape)
    shown, scale = shown_at(picture)
    assert shown.shape == (*expected, 3)
    assert shown.dtype == np.uint8
    assert SHOWN_AT[0] <= max(shown.shape) <= SHOWN_AT[1]
    assert scale == (expected[1] / shape[1], expected[0] / shape[0])
    shown[:] = 0
    assert (picture == GREY).all()  # a copy, also at the same size


def test_dashes_have_gaps() -> None:
    solid, dashed = canvas(480, 480), canvas(480, 480)
    box = np.array([[100, 100, 300, 300]], dtype=np.float32)
    draw_boxes(solid, box, PATCH_COLOUR)
    draw_boxes(dashed, box, PATCH_COLOUR, dashed=True)
    line = shows(dashed, PATCH_COLOUR)[100, 100:300]
    assert shows(solid, PATCH_COLOUR)[100, 100:300].all()
    assert 0.3 < line.mean() < 0.9
    assert not (drawn(dashed) & ~drawn(solid)).any()


def test_thin_lines_are_thinner() -> None:
    thick, thin = canvas(960, 960), canvas(960, 960)
    box = np.array([[100, 100, 300, 300]], dtype=np.float32)
    draw_boxes(thick, box, PATCH_COLOUR)
    draw_boxes(thin, box, PATCH_COLOUR, thin=True)
    assert drawn(thin).sum() < drawn(thick).sum()


def test_a_muted_picture_is_darker_and_nearly_grey() -> None:
    picture = np.full((4, 4, 3), (250, 30, 30), dtype=np.uint8)
    result = muted(picture)
    assert result.max() < 128
    assert int(result.max()) - int(result.min()) < 60
    assert (picture == (250, 30, 30)).all()


def test_a_legend_stands_below_and_leaves_out_what_does_not_fit() -> None:
    picture = canvas(200, 400)
    entries = [
        LegendEntry("one", PATCH_COLOUR),
        LegendEntry("x" * 200, ANCHOR_COLOUR),
        LegendEntry("two", (0, 9, 9)),
    ]
    result = with_legend(picture, entries)
    assert not drawn(result[:200]).any()
    strip = result[200:]
    assert shows(strip, PATCH_COLOUR).any()
    assert shows(strip, (0, 9, 9)).any()
    assert len(with_legend(picture, entries[:1])) == len(result)  # in one row
    assert len(with_legend(picture, [LegendEntry("a label of some length", PATCH_COLOUR)] * 3)) > len(result)
    np.testing.assert_array_equal(with_legend(picture, []), picture)
    np.testing.assert_array_equal(with_legend(canvas(3, 3), entries), canvas(3, 3))
