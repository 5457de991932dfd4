"""float16: the loss is scaled, updates that overflow are skipped, and a run resumes with its scale."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from asag_deploy.errors import ConfigError, TrainingError
from asag_training.run.gradient_scaling import GradientScaling, compute_on
from asag_training.run.state import STATE, default_settings, differences
from asag_training.run.trainer import Trainer
from asag_training.settings import Compute
from support.training_runs import make_loader, make_trainer, tiny_recipe, write_pictures

CPU = torch.device("cpu")
SMALL = ("augmentation.shorter_sides=[64]", "augmentation.longer_side=64")
"""CPUs take their time over float16."""
HALF = (*SMALL, "optimisation.compute=fp16")
TOO_MUCH = 2.0**127
"""A scale that float32 gradients overflow with."""

Row = Mapping[str, float]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data"))


def train(trainer: Trainer, data: Path, epochs: int = 1) -> list[Row]:
    rows: list[Row] = []
    while trainer.position.epoch < epochs:
        trainer.train_epoch(make_loader(data, trainer.recipe), rows.append)
    return rows


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def set_scale(scaling: GradientScaling, scale: float) -> None:
    state = scaling.state_dict()
    scaling.load_state_dict({**state, "scaler": {**state["scaler"], "scale": scale}})


def one_step(
    compute: Compute, gradient: float = 1.0, scale: float | None = None
) -> tuple[Tensor, GradientScaling]:
    """A weight of 1 after a step of size 1 against `gradient`."""
    layer = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([layer], lr=1.0)
    scaling = GradientScaling(CPU, compute)
    if scale is not None:
        set_scale(scaling, scale)
    scaling.backward((layer * gradient).sum())
    scaling.unscale(optimizer)
    assert layer.grad is not None
    if not torch.isfinite(layer.grad).all():
        assert scaling.excuses_overflow()
    scaling.step(optimizer)
    return layer.detach(), scaling


@pytest.mark.parametrize("compute", ["fp32", "bf16", "fp16"])
def test_scaling_changes_no_step(compute: Compute) -> None:
    weight, scaling = one_step(compute, gradient=0.25)
    assert weight.item() == 0.75
    assert scaling.skipped == 0
    assert scaling.enabled == (compute == "fp16")
    expected = {"loss_scale": 65536.0, "skipped_updates": 0.0} if compute == "fp16" else {}
    assert scaling.values() == expected


def test_a_step_that_overflows_is_left_out_and_the_scale_halved() -> None:
    weight, scaling = one_step("fp16", gradient=4.0, scale=TOO_MUCH)
    assert weight.item() == 1
    assert scaling.values() == {"loss_scale": TOO_MUCH / 2, "skipped_updates": 1.0}


def test_without_scaling_nothing_is_excused() -> None:
    assert not GradientScaling(CPU, "fp32").excuses_overflow()
    scaling = GradientScaling(CPU, "fp16")
    assert scaling.excuses_overflow()
    set_scale(scaling, 1.0)
    assert not scaling.excuses_overflow()


def test_a_run_in_half_precision(data: Path, tmp_path: Path) -> None:
    exact = make_trainer(data, tmp_path / "exact", tiny_recipe(*SMALL))
    half = make_trainer(data, tmp_path / "half", tiny_recipe(*HALF))
    set_scale(half.scaling, 16.0)  # so little that nothing overflows
    expected, rows = train(exact, data), train(half, data)
    assert [row["loss"] for row in rows] != [row["loss"] for row in expected]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=0.1)
    # Gradients are logged and clipped as they are without the scale.
    assert rows[0]["gradient_norm"] == pytest.approx(expected[0]["gradient_norm"], rel=0.1)
    assert [row["skipped_updates"] for row in rows] == [0, 0]
    assert "loss_scale" not in expected[0]
    assert all(tensor.dtype != torch.float16 for tensor in weights(half).values())


def test_an_update_that_overflows_changes_nothing_and_the_run_goes_on(data: Path, tmp_path: Path) -> None:
    trainer = make_trainer(data, tmp_path / "run", tiny_recipe(*HALF))
    set_scale(trainer.scaling, TOO_MUCH)
    seen: list[tuple[Row, dict[str, Tensor]]] = []
    before = weights(trainer)
    trainer.train_epoch(make_loader(data, trainer.recipe), lambda row: seen.append((row, weights(trainer))))
    row, after = seen[0]
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert all(torch.equal(after[name], before[name]) for name in trained)
    assert row["skipped_updates"] == 1
    assert row["loss_scale"] == TOO_MUCH / 2
    assert "gradient_norm" not in row
    assert row["loss"] > 0
    assert trainer.position.step == 2
    assert not (tmp_path / "run" / "bad-batch.pt").exists()


def test_gradients_that_are_not_finite_by_themselves_end_the_run(data: Path, tmp_path: Path) -> None:
    trainer = make_trainer(data, tmp_path / "run", tiny_recipe(*HALF))
    set_scale(trainer.scaling, 2.0)
    weight = next(p for name, p in trainer.model.named_parameters() if name.startswith("neck"))
    weight.register_hook(  # type: ignore[no-untyped-call]
        lambda gradient: gradient * torch.inf
    )
    with pytest.raises(TrainingError, match=r"gradient is not finite in update 2 \(neck\."):
        train(trainer, data)
    assert trainer.scaling.skipped == 1


def test_a_resumed_run_ends_like_one_that_was_never_stopped(tmp_path: Path) -> None:
    data, recipe = write_pictures(tmp_path / "data", count=4), tiny_recipe(*HALF)
    whole = make_trainer(data, tmp_path / "whole", recipe)
    set_scale(whole.scaling, TOO_MUCH)
    rows = train(whole, data, epochs=2)
    stopped = make_trainer(data, tmp_path / "run", recipe)
    set_scale(stopped.scaling, TOO_MUCH)
    first = train(stopped, data, epochs=1)
    stopped.save()
    resumed = make_trainer(data, tmp_path / "run", recipe)
    assert resumed.resume()
    assert resumed.scaling.state_dict() == stopped.scaling.state_dict()
    second = train(resumed, data, epochs=2)
    for name in ("loss", "loss_scale", "skipped_updates"):
        assert [row[name] for row in (*first, *second)] == [row[name] for row in rows]
    one, other = weights(whole), weights(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_saved_before_a_setting_existed_can_be_resumed(data: Path, tmp_path: Path) -> None:
    trainer = make_trainer(data, tmp_path / "run")
    trainer.save()
    path = tmp_path / "run" / STATE
    state = torch.load(path, weights_only=True)
    del state["scaling"], state["run"]["network.decoder_layers"], state["run"]["network.replace_anchors"]
    torch.save(state, path)
    assert make_trainer(data, tmp_path / "run").resume()
    other = tiny_recipe("network.replace_anchors=false")
    with pytest.raises(TrainingError, match=r"its network\.replace_anchors is True, not False"):
        make_trainer(data, tmp_path / "run", other).resume()


def test_settings_that_a_saved_run_has_not() -> None:
    defaults = default_settings(tiny_recipe())
    assert defaults["network.decoder_layers"] == 1
    assert defaults["optimisation.compute"] == "fp32"
    assert "network.variant" not in defaults
    assert differences({"a": 1}, {"a": 1, "b": 2}, {"b": 2}) == []
    assert differences({"a": 1}, {"a": 1, "b": 2}, {"b": 3}) == ["its b is 3, not 2"]
    assert differences({"a": 1, "c": 4}, {"a": 1}, {}) == ["its c is 4, not None"]


def test_a_choice_of_its_own_is_half_precision_on_gpus_alone() -> None:
    assert compute_on(torch.device("cuda", 1), "auto") == "fp16"
    assert compute_on(CPU, "auto") == "fp32"
    assert compute_on(CPU, "bf16") == "bf16"
    assert not GradientScaling(CPU, "auto").enabled


def test_a_run_in_half_precision_goes_on_where_there_is_none(data: Path, tmp_path: Path) -> None:
    """As a run with `auto` does that was begun on a GPU; and the other way round."""
    begun = make_trainer(data, tmp_path / "run", tiny_recipe("optimisation.compute=auto"))
    begun.save()
    path = tmp_path / "run" / STATE
    scaled = GradientScaling(CPU, "fp16")
    scaled.skipped = 3
    state = torch.load(path, weights_only=True)
    state["made"]["type of backbone and neck"] = "fp16"
    torch.save(state | {"scaling": scaled.state_dict()}, path)
    trainer = make_trainer(data, tmp_path / "run", tiny_recipe("optimisation.compute=auto"))
    assert trainer.resume()
    [sentence] = trainer.changed
    assert "(its type of backbone and neck is fp16, not fp32): numbers will differ a little" in sentence
    unscaled = GradientScaling(CPU, "fp32").state_dict()
    scaled.load_state_dict(unscaled)
    assert scaled.skipped == 3


def test_a_run_saved_before_its_type_was_written_down_is_no_other(data: Path, tmp_path: Path) -> None:
    make_trainer(data, tmp_path / "run").save()
    path = tmp_path / "run" / STATE
    state = torch.load(path, weights_only=True)
    del state["made"]["type of backbone and neck"]
    torch.save(state, path)
    trainer = make_trainer(data, tmp_path / "run")
    assert trainer.resume()
    assert trainer.changed == ()


def test_a_type_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match="compute"):
        tiny_recipe("optimisation.compute=fp8")
