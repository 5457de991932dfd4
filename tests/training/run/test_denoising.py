"""Denoising queries: what they copy, how they are noised, and who sees whom."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from asag_deploy.errors import ConfigError
from asag_training.losses.targets import Targets
from asag_training.network.layers import padding_blocked
from asag_training.run.denoising import (
    DenoisingQueries,
    add_box_noise,
    assign_copies,
    denoising_blocked,
    make_denoising,
)
from asag_training.settings import TrainingSettings

SIZE = torch.tensor([[200, 400], [100, 50]])


def targets(*counts: int) -> list[Targets]:
    generator = torch.Generator().manual_seed(7)
    found = []
    for count in counts:
        centres = torch.rand(count, 2, generator=generator) * 0.6 + 0.2
        sizes = torch.rand(count, 2, generator=generator) * 0.2 + 0.05
        labels = torch.zeros(count, dtype=torch.int64)
        found.append(Targets(torch.cat([centres, sizes], dim=1), labels))
    return found


def make(of: list[Targets], seed: int = 0, **settings: float) -> DenoisingQueries:
    anchors, valid = torch.zeros(len(of), 3, 4), torch.tensor([[True, True, False]]).expand(len(of), 3)
    generator = torch.Generator().manual_seed(seed)
    options = TrainingSettings(**{"denoising_queries": 20, **settings})  # type: ignore[arg-type]
    queries = make_denoising(of, anchors, valid, SIZE[: len(of)], options, generator)
    assert queries is not None
    return queries


def whole_image(size: Tensor) -> list[float]:
    height, width = size.tolist()
    return [width / 2, height / 2, width, height]


def test_as_many_whole_groups_as_fit() -> None:
    copies = assign_copies(3, 8, None)
    assert copies.target.tolist() == [0, 1, 2, 0, 1, 2, -1, -1]
    assert copies.group.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]


def test_of_too_many_objects_some_make_one_group() -> None:
    copies = assign_copies(10, 6, torch.Generator().manual_seed(0))
    again = assign_copies(10, 6, torch.Generator().manual_seed(1))
    assert len(set(copies.target.tolist())) == 6
    assert set(copies.target.tolist()) <= set(range(10))
    assert copies.group.tolist() == [0] * 6
    assert copies.target.tolist() != again.target.tolist()


def test_no_objects_only_fill_up() -> None:
    copies = assign_copies(0, 4, None)
    assert copies.target.tolist() == [-1] * 4
    assert len(set(copies.group.tolist())) == 1


def test_noise_moves_centres_by_half_the_size_and_sizes_by_all_of_it() -> None:
    box = torch.tensor([[0.5, 0.5, 0.2, 0.1]])
    furthest = add_box_noise(box, torch.tensor([[1.0, -1.0, 1.0, -1.0]]), 0.4)
    torch.testing.assert_close(furthest, torch.tensor([[0.54, 0.48, 0.28, 0.06]]))
    torch.testing.assert_close(add_box_noise(box, torch.zeros(1, 4), 0.4), box)


def test_noised_boxes_stay_within_0_and_1() -> None:
    box = torch.tensor([[0.02, 0.98, 0.9, 0.9]])
    noised = add_box_noise(box, torch.tensor([[-1.0, 1.0, 1.0, 1.0]]), 0.4)
    assert noised.tolist() == [[0.0, 1.0, 1.0, 1.0]]


def test_copies_are_noised_boxes_in_pixels_of_their_own_image() -> None:
    of = targets(3, 2)
    queries = make(of)
    assert queries.denoising.target.shape == (2, 20)
    for i, (height, width) in enumerate(SIZE.tolist()):
        target = queries.denoising.target[i]
        real = target >= 0
        assert real.sum() == [18, 20][i]
        scale = torch.tensor([width, height, width, height])
        boxes, originals = queries.boxes[i, real] / scale, of[i].boxes[target[real]]
        reach = torch.cat([originals[:, 2:] / 2, originals[:, 2:]], dim=1) * 0.4
        assert ((boxes - originals).abs() <= reach + 1e-6).all()
        assert ((boxes - originals).abs() > 0.5 * reach).any()
        assert all(row == whole_image(SIZE[i]) for row in queries.boxes[i, ~real].tolist())


def test_without_noise_copies_are_exact() -> None:
    of = targets(4)
    queries = make(of, box_noise=0.0)
    scale = torch.tensor([400.0, 200.0, 400.0, 200.0])
    torch.testing.assert_close(queries.boxes[0] / scale, of[0].boxes.repeat(5, 1))


def test_images_without_objects_get_queries_that_are_no_copies() -> None:
    queries = make(targets(0, 2))
    assert (queries.denoising.target[0] == -1).all()
    assert queries.boxes[0].tolist() == [whole_image(SIZE[0])] * 20
    assert not queries.blocked[0].all(dim=1).any()


def test_the_seed_decides_the_noise() -> None:
    of = targets(3)
    assert torch.equal(make(of, seed=1).boxes, make(of, seed=1).boxes)
    assert not torch.equal(make(of, seed=1).boxes, make(of, seed=2).boxes)


def test_targets_are_not_changed() -> None:
    of = targets(3)
    before = of[0].boxes.clone()
    make(of)
    assert torch.equal(of[0].boxes, before)


def test_who_sees_whom() -> None:
    group = torch.tensor([[0, 0, 1, 1, 2]])
    valid = torch.tensor([[True, True, False]])
    sees = ~denoising_blocked(group, valid)[0]
    assert sees.int().tolist() == [
        [1, 1, 0, 0, 0, 1, 1, 0],  # a copy: its group and the real anchors
        [1, 1, 0, 0, 0, 1, 1, 0],
        [0, 0, 1, 1, 0, 1, 1, 0],
        [0, 0, 1, 1, 0, 1, 1, 0],
        [0, 0, 0, 0, 1, 1, 1, 0],  # one that fills up
        [0, 0, 0, 0, 0, 1, 1, 0],  # a real anchor: no copies, no padding
        [0, 0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1, 1, 1],  # a padding anchor: no copies
    ]


def test_anchors_see_each_other_as_they_do_without_copies() -> None:
    queries = make(targets(3, 0))
    valid = torch.tensor([[True, True, False]]).expand(2, 3)
    assert torch.equal(queries.blocked[:, 20:, 20:], padding_blocked(valid))
    assert queries.blocked[:, 20:, :20].all()


def test_denoising_can_be_switched_off() -> None:
    settings = TrainingSettings(denoising_queries=0)
    anchors, valid = torch.zeros(1, 3, 4), torch.ones(1, 3, dtype=torch.bool)
    assert make_denoising(targets(2), anchors, valid, SIZE[:1], settings, None) is None


@pytest.mark.parametrize(
    "wrong", [{"denoising_queries": -1}, {"box_noise": 1.0}, {"box_noise": -0.1}, {"min_patches": 0}]
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=name):
        TrainingSettings(**wrong)  # type: ignore[arg-type]
