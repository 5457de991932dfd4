"""The training pass: one probing loop, more patches, denoising queries, and gradients for everything."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from asag_deploy.errors import ConfigError
from asag_deploy.loop.probing import Probed, detect
from asag_deploy.loop.stopping import StopRule
from asag_training.losses.network_output import LevelOutput, NetworkOutput
from asag_training.losses.targets import Targets
from asag_training.network.config import MAIN_HEAD
from asag_training.network.model import Asag, build
from asag_training.network.stage_plan import build_stages, probing_plan
from asag_training.network.stages import TorchNetwork
from asag_training.run.patch_selection import P6_FLIPS
from asag_training.run.training_pass import training_pass
from asag_training.settings import TrainingSettings
from support.small_network import small_checkpoint

SIZE = torch.tensor([[320, 384], [256, 300]])
PLAIN = TrainingSettings(denoising_queries=0)


def small_model(variant: str = "asag-a-r50-100", score: float = 0.0, **changes: float) -> Asag:
    """Few anchors; `score` is added to the logits of them all."""
    few = {"first_level_anchors": 10, "patch_anchors": 5, "anchor_cap": 60, "heads": 2, "num_classes": 3}
    checkpoint = small_checkpoint(variant, **{**few, **changes})
    model = build(checkpoint.config, checkpoint.state)
    generator = model.anchor_generator
    for mlp in (generator.proj_all, generator.proj_patch):
        bias = mlp.layers[-1].bias
        assert isinstance(bias, Tensor)
        with torch.no_grad():
            bias.view(-1, 5)[:, 4] += score
    return model


@pytest.fixture(scope="module")
def model() -> Asag:
    return small_model()


@pytest.fixture(scope="module")
def image() -> Tensor:
    batch = torch.randn(2, 3, 320, 384, generator=torch.Generator().manual_seed(0))
    batch[1, :, 256:] = 0
    batch[1, :, :, 300:] = 0
    return batch


@pytest.fixture(scope="module")
def targets() -> list[Targets]:
    boxes = torch.tensor([[0.3, 0.3, 0.05, 0.05], [0.7, 0.6, 0.1, 0.1], [0.5, 0.5, 0.8, 0.9]])
    return [
        Targets(boxes, torch.tensor([0, 1, 2])),
        Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)),
    ]


def train(
    model: Asag,
    image: Tensor,
    targets: list[Targets],
    settings: TrainingSettings = PLAIN,
    epoch: int = 1,
    seed: int = 0,
    levels: str = "p3-p6",
) -> NetworkOutput:
    with torch.no_grad():
        return training_pass(
            model,
            image,
            SIZE,
            targets=targets,
            settings=settings,
            epoch=epoch,
            generator=torch.Generator().manual_seed(seed),
            levels=levels,
        )


def evaluate(model: Asag, image: Tensor, levels: str = "p3-p6") -> NetworkOutput:
    with torch.no_grad():
        return training_pass(model, image, SIZE, settings=None, epoch=0, generator=None, levels=levels)


def infer(model: Asag, image: Tensor, head: str = MAIN_HEAD, levels: str = "p3-p6") -> Probed:
    probing = probing_plan(model.config, levels)
    return detect(
        TorchNetwork(build_stages(model, probing, head)),
        probing,
        StopRule(),
        image,
        SIZE.numpy().astype(np.int64),
    )


def by_level(output: NetworkOutput) -> dict[str, LevelOutput]:
    return {level.level: level for level in output.levels}


def origins(level: LevelOutput) -> Tensor:
    assert level.origins is not None
    return level.origins


@pytest.mark.parametrize("variant", ["asag-a-r50-100", "asag-s-r50-300", "asag-d-r50-300", "asag-a-lite-s"])
@pytest.mark.parametrize("levels", ["p3-p6", "p4-p6", "p5-p6"])
def test_evaluation_computes_what_inference_computes(variant: str, levels: str, image: Tensor) -> None:
    network = small_model(variant, anchor_floor=5)
    output = evaluate(network, image, levels)
    assert output.denoising is None
    for head in network.config.head_names:
        probed = infer(network, image, head, levels)
        assert torch.equal(output.anchors, probed.outputs["anchors"])
        assert output.valid.sum(dim=1).tolist() == probed.outputs["anchor_count"].tolist()
        assert torch.equal(output.heads[head].logits, probed.outputs["logits"])
        assert torch.equal(output.heads[head].boxes, probed.outputs["boxes"])
    assert [level.level for level in output.levels] == ["P6", *(run.level for run in probed.levels)]
    for recorded, run in zip(output.levels[2:], probed.levels[1:], strict=True):
        assert recorded.real.sum(dim=1).tolist() == run.patches.tolist()
        scores = run.anchors[..., 4].unflatten(1, recorded.raw.shape[1:3])
        useful = scores > 0
        assert useful.any()
        torch.testing.assert_close(recorded.raw[..., 4].sigmoid()[useful], scores[useful])


def test_evaluation_stops_where_inference_stops(image: Tensor) -> None:
    network = small_model(score=-30.0)
    output = evaluate(network, image)
    assert [level.level for level in output.levels] == ["P6", "P5"]
    assert output.valid.sum(dim=1).tolist() == [network.config.anchor_floor] * 2


def test_training_probes_every_level_of_every_image(image: Tensor, targets: list[Targets]) -> None:
    nothing_selected = small_model(score=-30.0)
    levels = by_level(train(nothing_selected, image, targets))
    assert list(levels) == ["P6", "P5", "P4", "P3"]
    for name in ("P4", "P3"):
        assert levels[name].real.sum(dim=1).tolist() == [4, 4]
        assert levels[name].raw.shape[:2] == levels[name].real.shape == (2, 4)


@pytest.mark.parametrize("levels", ["p3-p6", "p4-p6", "p5-p6"])
@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("variant", ["asag-a-r50-100", "asag-s-r50-300", "asag-d-r50-300", "asag-a-lite-s"])
def test_training_sends_on_what_inference_does(
    variant: str, replace: bool, levels: str, image: Tensor, targets: list[Targets]
) -> None:
    network = small_model(variant, anchor_floor=5, replace_anchors=replace)
    inferred = infer(network, image, levels=levels)
    # Anchors that the spare patches predict would pass and probe deeper, were they let.
    more = TrainingSettings(denoising_queries=0, min_patches=9)
    trained = train(network, image, targets, more, levels=levels)
    assert trained.valid.sum(dim=1).tolist() == inferred.outputs["anchor_count"].tolist()
    torch.testing.assert_close(trained.anchors, inferred.outputs["anchors"], atol=1e-3, rtol=1e-5)
    assert [level.level for level in trained.levels] == ["P6", *(run.level for run in inferred.levels)]
    for filled, run in zip(trained.levels[2:], inferred.levels[1:], strict=True):
        assert run.patches.any()
        for i, count in enumerate(run.patches.tolist()):
            assert filled.real[i].sum() == max(count, 9)
            assert run.origins is not None
            assert torch.equal(run.origins[i, :count], origins(filled)[i, :count])
    if levels == "p3-p6":
        assert min(run.patches.min() for run in inferred.levels[1:]) < 9


def test_ground_truth_patches_hold_the_small_objects(image: Tensor, targets: list[Targets]) -> None:
    chosen = origins(by_level(train(small_model(score=-30.0), image, targets))["P3"])
    small = targets[0].boxes[:2] * torch.tensor([384, 320, 384, 320])
    begin, end = chosen[0, :2, None] * 8, (chosen[0, :2, None] + 15) * 8
    inside = ((small[:, :2] - small[:, 2:] / 2 >= begin) & (small[:, :2] + small[:, 2:] / 2 <= end)).all(
        dim=-1
    )
    assert inside.any(dim=1).all()


def test_in_the_first_epoch_only_first_level_anchors_are_sent_on(
    model: Asag, image: Tensor, targets: list[Targets]
) -> None:
    first_level_only = evaluate(model, image, "p5-p6")
    first, second = train(model, image, targets, epoch=0), train(model, image, targets, epoch=1)
    torch.testing.assert_close(first.anchors, first_level_only.anchors, atol=1e-3, rtol=1e-5)
    assert torch.equal(first.valid, first_level_only.valid)
    assert not torch.equal(first.valid.sum(dim=1), second.valid.sum(dim=1))


def test_in_the_first_epoch_no_patch_is_generated(model: Asag, image: Tensor, targets: list[Targets]) -> None:
    spare = by_level(train(small_model(score=-30.0), image, targets, epoch=1))
    first, second = (by_level(train(model, image, targets, epoch=epoch)) for epoch in (0, 1))
    for name in ("P4", "P3"):
        assert torch.equal(origins(first[name]), origins(spare[name]))
        assert not torch.equal(origins(second[name]), origins(spare[name]))


def test_how_long_patches_come_from_targets_is_a_setting(
    model: Asag, image: Tensor, targets: list[Targets]
) -> None:
    longer = TrainingSettings(denoising_queries=0, target_patch_epochs=3)
    first, third, fourth = (
        by_level(train(model, image, targets, longer, epoch))["P4"] for epoch in (0, 2, 3)
    )
    assert torch.equal(origins(first), origins(third))
    assert not torch.equal(origins(first), origins(fourth))


def test_fewest_patches_are_a_setting(image: Tensor, targets: list[Targets]) -> None:
    settings = TrainingSettings(denoising_queries=0, min_patches=2)
    levels = by_level(train(small_model(score=-30.0), image, targets, settings))
    assert {name: level.raw.shape[1] for name, level in levels.items()} == {
        "P6": 2,
        "P5": 4,
        "P4": 2,
        "P3": 2,
    }
    assert levels["P6"].flips == P6_FLIPS[:2]


def test_p6_is_predicted_flipped_every_way(model: Asag, image: Tensor, targets: list[Targets]) -> None:
    plain = by_level(evaluate(model, image))["P6"]
    p6 = by_level(train(model, image, targets))["P6"]
    assert plain.flips is None
    assert plain.raw.shape[1] == 1
    assert p6.flips == P6_FLIPS
    torch.testing.assert_close(p6.raw[:, :1], plain.raw)
    for i, (horizontally, vertically) in enumerate(P6_FLIPS[1:], start=1):
        axes = [axis for axis, flip in ((3, horizontally), (2, vertically)) if flip]

        def flip(_: nn.Module, __: object, patch: Tensor, axes: list[int] = axes) -> Tensor:
            return patch.flip(axes)

        handle = model.anchor_generator.P6.register_forward_hook(flip)
        flipped = by_level(evaluate(model, image))["P6"].raw
        handle.remove()
        torch.testing.assert_close(p6.raw[:, i : i + 1], flipped)
        assert not torch.allclose(p6.raw[:, i : i + 1], plain.raw, atol=1e-3)


@pytest.mark.parametrize("variant", ["asag-a-r50-100", "asag-s-r50-100", "asag-d-r50-100"])
def test_denoising_queries_come_first_and_anchors_do_not_see_them(
    variant: str, image: Tensor, targets: list[Targets]
) -> None:
    network = small_model(variant)
    without = train(network, image, targets)
    with_copies = train(network, image, targets, TrainingSettings(denoising_queries=20))
    assert with_copies.denoising is not None
    assert with_copies.denoising.count == 20
    assert torch.equal(with_copies.anchors, without.anchors)
    queries = without.anchors.shape[1]
    pairs = [(with_copies.relation, without.relation)]
    pairs += [(with_copies.heads[head], without.heads[head]) for head in network.config.head_names]
    for noised, plain in pairs:
        assert noised.logits.shape[1] == noised.boxes.shape[1] == queries + 20
        real = plain.boxes[without.valid]
        torch.testing.assert_close(noised.boxes[:, 20:][without.valid], real, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            noised.logits[:, 20:][without.valid], plain.logits[without.valid], atol=1e-4, rtol=1e-4
        )


def test_a_copy_sees_no_other_group(model: Asag, image: Tensor, targets: list[Targets]) -> None:
    # 6 queries are two groups of the three objects, 3 are the first of them alone.
    settings = [TrainingSettings(denoising_queries=n, box_noise=0.0) for n in (3, 6)]
    alone, beside = (train(model, image, targets, each).heads[MAIN_HEAD].boxes[0, :3] for each in settings)
    torch.testing.assert_close(alone, beside, atol=1e-5, rtol=1e-4)


def test_the_seed_repeats_a_pass(model: Asag, image: Tensor, targets: list[Targets]) -> None:
    settings = TrainingSettings(denoising_queries=20, min_patches=9)
    first, again, other = (train(model, image, targets, settings, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.heads[MAIN_HEAD].boxes, again.heads[MAIN_HEAD].boxes)
    patches = [origins(by_level(output)["P4"]) for output in (first, again, other)]
    assert torch.equal(patches[0], patches[1])
    assert not torch.equal(patches[0], patches[2])


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("variant", ["asag-a-r50-100", "asag-s-r50-100", "asag-d-r50-100", "asag-a-lite-s"])
def test_gradients_reach_every_parameter(
    variant: str, epoch: int, image: Tensor, targets: list[Targets]
) -> None:
    network = small_model(variant)
    output = training_pass(
        network,
        image,
        SIZE,
        targets=targets,
        settings=TrainingSettings(denoising_queries=20),
        epoch=epoch,
        generator=torch.Generator().manual_seed(0),
    )
    predicted = [level.raw for level in output.levels]
    for head in (output.relation, *output.heads.values()):
        predicted += [head.logits, head.boxes]
    torch.stack([tensor.square().mean() for tensor in predicted]).sum().backward()  # type: ignore[no-untyped-call]
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert not output.anchors.requires_grad


def test_images_without_any_object_can_be_trained_on(
    model: Asag, image: Tensor, targets: list[Targets]
) -> None:
    output = train(model, image, [targets[1], targets[1]], TrainingSettings(denoising_queries=20), epoch=0)
    assert output.denoising is not None
    assert (output.denoising.target == -1).all()
    assert all(torch.isfinite(head.boxes).all() for head in output.heads.values())


def test_backbone_and_neck_can_compute_in_half_precision(
    model: Asag, image: Tensor, targets: list[Targets]
) -> None:
    with torch.no_grad():
        output = training_pass(
            model,
            image,
            SIZE,
            settings=None,
            epoch=0,
            generator=None,
            levels="p5-p6",
            autocast=torch.bfloat16,
        )
    exact, rounded = (by_level(found)["P5"].raw for found in (evaluate(model, image, "p5-p6"), output))
    assert rounded.dtype == output.relation.boxes.dtype == torch.float32
    distance = (exact - rounded)[..., :4].abs().mean().item()
    assert 0 < distance < 0.05
    assert math.isfinite(output.heads[MAIN_HEAD].logits.sum().item())


def test_training_without_targets_is_refused(model: Asag, image: Tensor, targets: list[Targets]) -> None:
    for given in ([], targets[:1]):
        with pytest.raises(ConfigError, match="targets of all 2 images"):
            training_pass(model, image, SIZE, targets=given, settings=PLAIN, epoch=0, generator=None)
