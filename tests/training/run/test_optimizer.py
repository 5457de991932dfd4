"""The optimiser and the learning rate of the published recipe."""

from __future__ import annotations

import pytest
import torch

from asag_deploy.errors import ConfigError
from asag_training.network.model import Asag
from asag_training.recipes import SCHEDULES
from asag_training.run.optimizer import build_optimizer, clip_gradients, parameter_groups, set_learning_rate
from asag_training.settings import Optimisation, Schedule
from support.small_network import small_config


@pytest.fixture(scope="module")
def names() -> dict[int, str]:
    """Parameter names by id, for the model below."""
    return {}


@pytest.fixture
def model(names: dict[int, str]) -> Asag:
    network = Asag(small_config(heads=1))
    names.clear()
    names.update({id(p): name for name, p in network.named_parameters()})
    return network


def test_the_backbone_learns_ten_times_slower(model: Asag, names: dict[int, str]) -> None:
    optimizer = build_optimizer(model, Optimisation())
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates["backbone.0.body.layer4.0.conv1.weight"] == pytest.approx(2e-5)
    assert rates["neck.inner_blocks.0.0.weight"] == pytest.approx(2e-4)
    assert rates["anchor_generator.P6.weight"] == pytest.approx(2e-4)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {1e-4}


def test_sampling_offsets_learn_ten_times_slower() -> None:
    """Of the encoder and of the decoder of ASAG-D; no other network has any."""
    network = Asag(small_config("asag-d-r50-100", heads=2, encoder_layers=2))
    named = {id(p): name for name, p in network.named_parameters()}
    for settings, rate in ((Optimisation(), 2e-5), (Optimisation(offsets_factor=0.5), 1e-4)):
        groups = build_optimizer(network, settings).param_groups
        assert [group["name"] for group in groups] == ["network", "backbone", "offsets"]
        slow = {named[id(p)] for p in groups[2]["params"]}
        layers = [f"encoder.layers.{i}.self_attn" for i in (0, 1)]
        layers += [f"decoder.layers.{i}.cross_attn" for i in (0, 1)]
        assert slow == {f"{of}.sampling_offsets.{part}" for of in layers for part in ("weight", "bias")}
        assert groups[2]["lr"] == groups[2]["base_lr"] == pytest.approx(rate)
    with pytest.raises(ConfigError, match=r"offsets_factor 0\.0 is not possible: expected above 0"):
        Optimisation(offsets_factor=0.0)


def test_the_stem_and_the_first_stage_do_not_train(model: Asag, names: dict[int, str]) -> None:
    optimizer = build_optimizer(model, Optimisation())
    trained = {names[id(p)] for group in optimizer.param_groups for p in group["params"]}
    frozen = set(names.values()) - trained
    assert frozen == {
        name
        for name in names.values()
        if name.startswith(tuple(f"backbone.0.body.{part}" for part in ("conv1", "bn1", "layer1")))
    }
    assert frozen
    assert "backbone.0.body.layer2.0.bn1.weight" in trained


def test_from_random_weights_all_of_the_backbone_can_train(model: Asag, names: dict[int, str]) -> None:
    optimizer = build_optimizer(model, Optimisation(freeze_stem=False))
    trained = {names[id(p)] for group in optimizer.param_groups for p in group["params"]}
    assert trained == set(names.values())


def test_a_group_without_parameters_is_left_out(model: Asag) -> None:
    for parameter in model.backbone.parameters():
        parameter.requires_grad_(False)
    (group,) = parameter_groups(model, lr=1.0, backbone_factor=0.1)
    assert group["name"] == "network"


def test_the_rate_keeps_the_proportion_of_the_groups(model: Asag) -> None:
    optimizer = build_optimizer(model, Optimisation(lr=1e-3, backbone_factor=0.5))
    assert set_learning_rate(optimizer, 0.1) == pytest.approx({"network": 1e-4, "backbone": 5e-5})
    assert set_learning_rate(optimizer, 1.0) == pytest.approx({"network": 1e-3, "backbone": 5e-4})
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-3, 5e-4])


def test_base_rates_survive_saving(model: Asag) -> None:
    optimizer = build_optimizer(model, Optimisation())
    set_learning_rate(optimizer, 0.01)
    resumed = build_optimizer(model, Optimisation(lr=1.0))
    resumed.load_state_dict(optimizer.state_dict())
    assert set_learning_rate(resumed, 1.0) == pytest.approx({"network": 2e-4, "backbone": 2e-5})


def test_gradients_are_clipped_together() -> None:
    a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0])
    assert clip_gradients([a, b], 0.1).item() == pytest.approx(5.0)
    assert a.grad.item() == pytest.approx(0.06, rel=1e-4)
    assert b.grad.item() == pytest.approx(0.08, rel=1e-4)


def test_small_gradients_are_left_alone() -> None:
    a = torch.nn.Parameter(torch.zeros(1))
    a.grad = torch.tensor([0.05])
    clip_gradients([a], 0.1)
    assert a.grad.item() == pytest.approx(0.05)


def test_warm_up_is_a_straight_line_from_a_third() -> None:
    schedule = Schedule(epochs=12)
    assert schedule.factor(0, 0) == pytest.approx(1 / 3)
    assert schedule.factor(0, 250) == pytest.approx(2 / 3)
    assert schedule.factor(0, 499) < 1
    assert schedule.factor(0, 500) == schedule.factor(0, 10_000) == 1
    assert Schedule(epochs=12, warmup_steps=0).factor(0, 0) == 1


def test_every_drop_that_is_reached_counts() -> None:
    schedule = Schedule(epochs=12, drops=(8, 11))
    assert [schedule.factor(epoch, 10_000) for epoch in (0, 7, 8, 10, 11)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01]
    )


@pytest.mark.parametrize(
    ("name", "epochs", "drops"), [("1x", 12, (8, 11)), ("3x", 36, (24, 33)), ("crowdhuman", 50, (40, 46))]
)
def test_the_published_schedules(name: str, epochs: int, drops: tuple[int, int]) -> None:
    schedule = SCHEDULES[name]
    assert schedule.epochs == epochs
    rates = [schedule.factor(epoch, 10_000) for epoch in range(epochs)]
    fell = tuple(epoch for epoch in range(1, epochs) if rates[epoch] < rates[epoch - 1])
    assert fell == drops
    assert rates[-1] == pytest.approx(0.01)


def test_warm_up_goes_on_into_the_next_epoch_of_a_small_data_set() -> None:
    schedule = Schedule(epochs=10, drops=(2,), warmup_steps=100, warmup_start=0.5)
    assert schedule.factor(1, 50) == pytest.approx(0.75)
    assert schedule.factor(2, 50) == pytest.approx(0.075)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"drops": (11, 8)},
        {"drops": (12,)},
        {"drops": (0,)},
        {"drop_factor": 0.0},
        {"warmup_steps": -1},
        {"warmup_start": 0.0},
    ],
)
def test_schedules_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=name):
        Schedule(**{"epochs": 12, **wrong})  # type: ignore[arg-type]
