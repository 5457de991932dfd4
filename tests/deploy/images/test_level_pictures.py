"""Pictures of how probing decided: what is drawn of each level, in which colour, and what the legend says."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from numpy.typing import NDArray

from asag_deploy.images.drawing import ANCHOR_COLOUR, PATCH_COLOUR, Colour
from asag_deploy.images.level_pictures import (
    ASKED_COLOUR,
    DROPPED_COLOUR,
    LEVEL_COLOURS,
    candidates_of,
    decoder_picture,
    level_picture,
    scaled,
)
from asag_deploy.loop.trace import ProbingTrace
from support.detection_samples import explained_trace

SIDE = 640


@pytest.fixture
def ground() -> NDArray[np.uint8]:
    return np.full((SIDE, SIDE, 3), 90, dtype=np.uint8)


def shows(picture: NDArray[np.uint8], colour: Colour) -> NDArray[np.bool_]:
    same: NDArray[np.bool_] = (picture[:SIDE] == colour).all(axis=2)
    return same


def test_the_first_level(ground: NDArray[np.uint8]) -> None:
    picture = level_picture(ground, (1.0, 1.0), explained_trace(), 0)
    assert shows(picture, ANCHOR_COLOUR)[20, 60:90].all()  # the one that went on
    assert shows(picture, ASKED_COLOUR)[300:340, 300].all()
    patches = shows(picture, PATCH_COLOUR)
    assert patches[200, 210:390].any()  # what it asked for, dashed
    assert not patches[200, 210:390].all()
    assert not patches[:190].any()  # its own patches are everything
    blue = picture[500, 450:480]
    assert (blue[:, 2] > blue[:, 0]).all()  # dropped


def test_a_lower_score_is_fainter(ground: NDArray[np.uint8]) -> None:
    def brightness(score: float) -> int:
        trace = explained_trace()
        found = candidates_of(trace, 0)
        changed = dataclasses.replace(found, scores=np.where(found.scores < 0.1, score, found.scores))
        levels = (dataclasses.replace(trace.levels[0], candidates=changed), *trace.levels[1:])
        picture = level_picture(ground, (1.0, 1.0), dataclasses.replace(trace, levels=levels), 0)
        return int(picture[500, 460].sum())

    assert brightness(0.0) < brightness(0.09) < sum(DROPPED_COLOUR)


def test_a_deeper_level_shows_what_it_replaced(ground: NDArray[np.uint8]) -> None:
    picture = level_picture(ground, (1.0, 1.0), explained_trace(), 1)
    assert shows(picture, PATCH_COLOUR)[200, 210:390].all()  # its own patch
    replaced = shows(picture, ASKED_COLOUR)[300:340, 300]
    assert replaced.any()
    assert not replaced.all()
    assert shows(picture, ANCHOR_COLOUR)[310, 312:328].all()


def test_the_decoder_has_a_colour_for_each_level(ground: NDArray[np.uint8]) -> None:
    picture = decoder_picture(ground, (1.0, 1.0), explained_trace())
    assert shows(picture, LEVEL_COLOURS["P5"])[20, 60:90].all()
    assert shows(picture, LEVEL_COLOURS["P4"])[310, 312:328].all()
    assert not shows(picture, ASKED_COLOUR).any()


def test_pictures_of_another_size_than_the_image(ground: NDArray[np.uint8]) -> None:
    picture = level_picture(ground, (0.5, 0.25), explained_trace(), 0)
    assert shows(picture, ANCHOR_COLOUR)[5, 30:45].all()
    assert scaled(np.array([[2, 4, 6, 8]], dtype=np.float32), (0.5, 0.25)).tolist() == [[1, 1, 3, 2]]


def test_the_picture_given_stays_as_it_is(ground: NDArray[np.uint8]) -> None:
    trace = explained_trace()
    pictures = [level_picture(ground, (1, 1), trace, number) for number in range(2)]
    for picture in (*pictures, decoder_picture(ground, (1, 1), trace)):
        assert picture.shape[0] > SIDE  # the legend
        assert picture.shape[1:] == (SIDE, 3)
    assert (ground == 90).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 640), (640, 1), (30, 700)])
def test_any_size_can_be_drawn_on(shape: tuple[int, int]) -> None:
    trace = explained_trace()
    tiny = np.zeros((*shape, 3), dtype=np.uint8)
    for number in range(2):
        level_picture(tiny, (1, 1), trace, number)
    decoder_picture(tiny, (1, 1), trace)


def test_a_level_without_anchors(ground: NDArray[np.uint8]) -> None:
    trace = explained_trace()
    nothing = candidates_of(trace, 1)
    empty = dataclasses.replace(
        nothing,
        boxes=nothing.boxes[:0],
        scores=nothing.scores[:0],
        asked=nothing.asked[:0],
        passed=nothing.passed[:0],
        patch=nothing.patch[:0],
    )
    levels = (trace.levels[0], dataclasses.replace(trace.levels[1], candidates=empty))
    changed: ProbingTrace = dataclasses.replace(trace, levels=levels)
    assert not shows(level_picture(ground, (1, 1), changed, 1), ANCHOR_COLOUR).any()
