"""Each rule by which the patches of a training step are chosen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from asag_training.losses.targets import Targets
from asag_training.network.config import AsagConfig, variant_config
from asag_training.run.patch_selection import (
    P6_FLIPS,
    centrality,
    fill_up,
    group_boxes,
    is_small,
    last_origin,
    random_origins,
    shifted_origins,
    spare_origins,
    training_patches,
)

STRIDE, SIDE = 16, 15
"""A patch of 240 pixels."""
IMAGE = (480, 640)
"""30 x 40 cells: origins up to x 25, y 15."""


def boxes(*rows: tuple[float, float, float, float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def config() -> AsagConfig:
    return variant_config("asag-a-r50-100")


def test_small_is_under_half_a_patch_both_ways() -> None:
    found = is_small(boxes((0, 0, 119, 119), (0, 0, 120, 10), (0, 0, 10, 120), (0, 0, 1, 1)), STRIDE, SIDE)
    assert found.tolist() == [True, False, False, True]


def test_the_middle_box_is_the_most_central() -> None:
    found = centrality(boxes((0, 0, 1, 1), (50, 0, 1, 1), (60, 0, 1, 1), (100, 0, 1, 1)))
    assert found.argsort(descending=True).tolist() == [1, 2, 3, 0]


def test_overlapping_boxes_join_the_most_central_of_them() -> None:
    row = boxes((10, 10, 10, 10), (14, 10, 10, 10), (18, 10, 10, 10), (300, 10, 10, 10))
    # The distant box pulls the centre of all to the right, so of the three on the left the rightmost leads.
    assert group_boxes(row, 0.25).tolist() == [2, 0, 3]
    assert group_boxes(row[:3], 0.25).tolist() == [1]


def test_boxes_that_hardly_overlap_do_not_group() -> None:
    pair = boxes((10, 10, 10, 10), (16, 10, 10, 10))  # IoU 0.25
    assert sorted(group_boxes(pair, 0.25).tolist()) == [0, 1]
    assert len(group_boxes(pair, 0.24)) == 1


def test_no_boxes_make_no_groups() -> None:
    assert group_boxes(boxes(), 0.25).tolist() == []


@pytest.mark.parametrize(
    ("size", "expected"), [((480, 640), [25, 15]), ((481, 639), [25, 16]), ((240, 100), [0, 0])]
)
def test_last_origin_is_the_last_inside_the_image(size: tuple[int, int], expected: list[int]) -> None:
    assert last_origin(size, STRIDE, SIDE).tolist() == expected


@pytest.mark.parametrize(
    "box",
    [(320, 240, 50, 70), (10, 10, 20, 20), (630, 470, 20, 20), (60, 240, 119, 119), (600, 50, 17, 100)],
)
def test_a_shifted_patch_holds_its_box_and_stays_in_the_image(box: tuple[float, float, float, float]) -> None:
    many = boxes(box).expand(2000, 4)
    origins = shifted_origins(many, IMAGE, STRIDE, SIDE, seeded())
    x, y, w, h = box
    begin, end = torch.tensor([x - w / 2, y - h / 2]), torch.tensor([x + w / 2, y + h / 2])
    assert (origins * STRIDE <= begin).all()
    assert ((origins + SIDE) * STRIDE >= end).all()
    assert (origins >= 0).all()
    assert (origins <= torch.tensor([25, 15])).all()


def test_a_shifted_patch_comes_to_lie_everywhere_it_may() -> None:
    origins = shifted_origins(boxes((320, 240, 160, 16)).expand(4000, 4), IMAGE, STRIDE, SIDE, seeded())
    # The box covers columns 15..24, so a patch of 15 can begin at 10..15; rows 14.5..15.5, so at 1..14.
    columns, rows = origins.unbind(1)
    assert sorted(set(columns.tolist())) == list(range(10, 16))
    assert sorted(set(rows.tolist())) == list(range(1, 15))
    assert columns.bincount(minlength=16)[10:].min() > 4000 / 6 * 0.8


def test_a_patch_larger_than_the_image_begins_at_its_corner() -> None:
    small = (100, 120)
    assert shifted_origins(boxes((60, 50, 20, 20)), small, STRIDE, SIDE, seeded()).tolist() == [[0, 0]]
    assert random_origins(3, small, STRIDE, SIDE, seeded()).tolist() == [[0, 0]] * 3


def test_random_patches_reach_every_place_in_the_image() -> None:
    origins = random_origins(4000, IMAGE, STRIDE, SIDE, seeded())
    assert origins.dtype == torch.int64
    assert sorted(set(origins[:, 0].tolist())) == list(range(26))
    assert sorted(set(origins[:, 1].tolist())) == list(range(16))


def test_ground_truth_comes_before_random(config: AsagConfig) -> None:
    objects = boxes((100, 100, 40, 40), (500, 400, 40, 40), (320, 240, 300, 300))
    holding = [0, 0, 0, 0]
    for seed in range(50):
        origins = spare_origins(objects, IMAGE, STRIDE, config, 4, seeded(seed))
        for i, origin in enumerate(origins):
            begin, end = origin * STRIDE, (origin + SIDE) * STRIDE
            corner, opposite = objects[:2, :2] - 20, objects[:2, :2] + 20
            holding[i] += int(((corner >= begin) & (opposite <= end)).all(dim=1).any())
    assert holding[:2] == [50, 50]
    assert max(holding[2:]) < 50


def test_ground_truth_patches_are_drawn_from_all_objects(config: AsagConfig) -> None:
    # Objects at the left edge of rows far apart, which tells from a patch whose it is.
    objects = boxes(*((20, 400 * i + 20, 10, 10) for i in range(6)))
    seen: set[int] = set()
    for seed in range(40):
        origins = spare_origins(objects, (2400, 2400), STRIDE, config, 2, seeded(seed))
        assert (origins[:, 0] <= 1).all()
        rows = {int(y) * STRIDE // 400 if y % 25 <= 1 else int(y) * STRIDE // 400 + 1 for y in origins[:, 1]}
        assert len(rows) == 2
        seen |= rows
    assert seen == set(range(6))


def test_without_small_objects_all_spares_are_random(config: AsagConfig) -> None:
    nothing = spare_origins(boxes(), IMAGE, STRIDE, config, 4, seeded())
    large = spare_origins(boxes((320, 240, 300, 300)), IMAGE, STRIDE, config, 4, seeded())
    assert nothing.tolist() == large.tolist()
    assert len(set(map(tuple, nothing.tolist()))) > 1


def test_spares_of_a_batch_repeat_with_the_seed(config: AsagConfig) -> None:
    targets = [
        Targets(boxes((0.5, 0.5, 0.05, 0.05)), torch.zeros(1, dtype=torch.int64)),
        Targets(boxes(), torch.zeros(0, dtype=torch.int64)),
    ]
    sizes = [(480, 640), (400, 300)]

    def draw(seed: int) -> dict[str, Tensor]:
        found = training_patches(targets, sizes, {"P4": 16, "P3": 8}, config, 4, seeded(seed))
        assert all(patches.given is None for patches in found.values())
        return {level: patches.spare for level, patches in found.items()}

    first, again, other = draw(0), draw(0), draw(1)
    assert {level: tuple(spare.shape) for level, spare in first.items()} == {"P4": (2, 4, 2), "P3": (2, 4, 2)}
    assert all(torch.equal(first[level], again[level]) for level in first)
    assert any(not torch.equal(first[level], other[level]) for level in first)
    held = first["P3"][0, 0]  # the object covers pixels 304..336, 228..252
    assert ((held * 8 <= torch.tensor([304, 228])) & ((held + 15) * 8 >= torch.tensor([336, 252]))).all()


def test_all_groups_of_objects_are_given(config: AsagConfig) -> None:
    alone = [(0.1 + 0.15 * i, 0.3, 0.05, 0.06) for i in range(6)]
    beside = (0.105, 0.3, 0.05, 0.06)  # of the group of the first
    targets = [
        Targets(boxes(*alone, beside, (0.5, 0.5, 0.9, 0.9)), torch.zeros(8, dtype=torch.int64)),
        Targets(boxes((0.5, 0.5, 0.05, 0.05)), torch.zeros(1, dtype=torch.int64)),
        Targets(boxes(), torch.zeros(0, dtype=torch.int64)),
    ]
    sizes = [(480, 640)] * 3
    found = training_patches(targets, sizes, {"P4": 16, "P3": 8}, config, 4, seeded(), all_targets=True)
    for stride, patches in ((16, found["P4"]), (8, found["P3"])):
        assert patches.given is not None
        assert patches.given_count is not None
        assert patches.given_count.tolist() == [6, 1, 0]
        assert patches.given.shape == (3, 6, 2)
        assert patches.spare.shape == (3, 4, 2)
        held = [
            [x, y]
            for x, y, *_ in alone
            for left, top in (patches.given[0] * stride).tolist()
            if left <= x * 640 <= left + 15 * stride and top <= y * 480 <= top + 15 * stride
        ]
        assert {x for x, _ in held} == {x for x, *_ in alone}
        assert not patches.given[2].any()


def test_filling_up_takes_generated_patches_first_and_never_drops_one() -> None:
    origins = torch.arange(2 * 3 * 6).reshape(3, 6, 2) + 100
    spare = torch.arange(2 * 3 * 4).reshape(3, 4, 2)
    filled, total = fill_up(origins, torch.tensor([0, 3, 6]), spare)
    assert total.tolist() == [4, 4, 6]
    assert filled[0].tolist() == [*spare[0].tolist(), [0, 0], [0, 0]]
    assert filled[1].tolist() == [*origins[1, :3].tolist(), spare[1, 0].tolist(), [0, 0], [0, 0]]
    assert filled[2].tolist() == origins[2].tolist()


def test_more_generated_patches_than_capacity_are_counted() -> None:
    filled, total = fill_up(torch.ones(1, 5, 2), torch.tensor([9]), torch.zeros(1, 4, 2))
    assert total.tolist() == [9]
    assert (filled == 1).all()


def test_a_capacity_below_the_minimum_is_filled_whole() -> None:
    filled, total = fill_up(torch.zeros(1, 2, 2), torch.tensor([0]), torch.ones(1, 4, 2))
    assert total.tolist() == [2]
    assert (filled == 1).all()


def test_the_p6_patch_is_flipped_every_way_once() -> None:
    assert P6_FLIPS[0] == (False, False)
    assert sorted(P6_FLIPS) == [(False, False), (False, True), (True, False), (True, True)]
