"""The training loop: it repeats itself, goes on where it stopped, and says what is wrong."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from asag_deploy.bundle.manifest import Category
from asag_deploy.errors import OutputError, TrainingError
from asag_deploy.interruption import Interruption
from asag_training.checkpoints import load_checkpoint
from asag_training.network.model import Asag
from asag_training.recipes import Recipe
from asag_training.run.state import BEST, LAST, STATE, Position
from asag_training.run.trainer import BAD_BATCH, Trainer
from support.training_runs import TINY_D, make_loader, make_trainer, tiny_recipe, write_pictures

Row = Mapping[str, float]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data"))


class Stop(Exception):
    """Ends an epoch in the middle."""


def train(trainer: Trainer, data: Path, epochs: int = 1, stop_after: int | None = None) -> list[Row]:
    """Train on; `stop_after` so many updates, in the middle of an epoch, the run is given up."""
    rows: list[Row] = []

    def on_step(row: Row) -> None:
        rows.append(row)
        if len(rows) == stop_after:
            raise Stop

    loader = make_loader(data, trainer.recipe, seed=trainer.seed)
    try:
        while trainer.position.epoch < epochs:
            trainer.train_epoch(loader, on_step)
    except Stop:
        pass
    return rows


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def losses(rows: list[Row]) -> list[float]:
    return [row["loss"] for row in rows]


def gradients(trainer: Trainer, data: Path) -> dict[str, Tensor]:
    """Of the first update, before they are clipped."""
    found: dict[str, Tensor] = {}

    def before_step(*_: Any) -> None:
        found.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})

    handle = trainer.optimizer.register_step_pre_hook(before_step)
    train(trainer, data, stop_after=1)
    handle.remove()
    return found


def relative_difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    flat = [torch.cat([each[name].flatten() for name in sorted(each)]) for each in (one, other)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


@pytest.fixture(scope="module")
def whole_run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Row], dict[str, Tensor]]:
    """Two epochs of two updates."""
    trainer = make_trainer(data, tmp_path_factory.mktemp("run"))
    return train(trainer, data, epochs=2), weights(trainer)


def test_the_seed_repeats_a_run(
    data: Path, tmp_path: Path, whole_run: tuple[list[Row], dict[str, Tensor]]
) -> None:
    again = make_trainer(data, tmp_path / "again")
    rows = train(again, data, epochs=2)
    assert losses(rows) == losses(whole_run[0])
    assert equal(weights(again), whole_run[1])
    other = make_trainer(data, tmp_path / "other", seed=1)
    train(other, data, epochs=2)
    assert not equal(weights(other), whole_run[1])


def test_what_is_trained(data: Path, tmp_path: Path, whole_run: tuple[list[Row], dict[str, Tensor]]) -> None:
    before = weights(make_trainer(data, tmp_path / "new"))
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], whole_run[1][name])}
    assert moved == {"backbone", "neck", "anchor_generator", "rpn", "decoder"}


def test_asag_d_is_trained_and_resumed_as_others_are(data: Path, tmp_path: Path) -> None:
    whole = make_trainer(data, tmp_path / "whole", tiny_recipe(*TINY_D))
    before = weights(whole)
    rows = train(whole, data, epochs=2)
    after = weights(whole)
    assert rows[0]["lr_offsets"] == pytest.approx(0.1 * rows[0]["lr_network"])
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == {name for name in before if "running_" in name}

    stopped = make_trainer(data, tmp_path / "run", tiny_recipe(*TINY_D))
    train(stopped, data, epochs=2, stop_after=1)
    stopped.save()
    resumed = make_trainer(data, tmp_path / "run", tiny_recipe(*TINY_D))
    assert resumed.resume()
    train(resumed, data, epochs=2)
    assert equal(weights(resumed), after)


def test_a_frozen_stem_stays(data: Path, tmp_path: Path) -> None:
    trainer = make_trainer(data, tmp_path / "run", tiny_recipe("optimisation.freeze_stem=true"))
    before = weights(trainer)
    train(trainer, data, stop_after=1)
    moved = {name for name, tensor in weights(trainer).items() if not torch.equal(tensor, before[name])}
    assert not any(name.startswith(("backbone.0.body.conv1", "backbone.0.body.layer1")) for name in moved)
    assert any(name.startswith("backbone.0.body.layer4") for name in moved)


@pytest.mark.parametrize("learned", [False, True])
def test_statistics_are_learned_if_wanted(data: Path, tmp_path: Path, learned: bool) -> None:
    settings = f"optimisation.batch_statistics={str(learned).lower()}"
    trainer = make_trainer(data, tmp_path / "run", tiny_recipe(settings))
    train(trainer, data, stop_after=1)
    means = [tensor for name, tensor in weights(trainer).items() if name.endswith("running_mean")]
    assert all(bool(mean.any()) == learned for mean in means)


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_resumed_run_ends_like_one_that_was_never_stopped(
    data: Path, tmp_path: Path, whole_run: tuple[list[Row], dict[str, Tensor]], stop_after: int
) -> None:
    stopped = make_trainer(data, tmp_path / "run")
    rows = train(stopped, data, epochs=2, stop_after=stop_after)
    stopped.save()
    resumed = make_trainer(data, tmp_path / "run")
    assert resumed.resume()
    assert resumed.position == stopped.position
    assert resumed.position.step == stop_after
    rows += train(resumed, data, epochs=2)
    assert losses(rows) == losses(whole_run[0])
    assert equal(weights(resumed), whole_run[1])


def test_nothing_to_resume(data: Path, tmp_path: Path) -> None:
    trainer = make_trainer(data, tmp_path / "run")
    assert not trainer.resume()
    assert trainer.position == Position()


def test_what_is_logged(whole_run: tuple[list[Row], dict[str, Tensor]]) -> None:
    rows = whole_run[0]
    assert [row["epoch"] for row in rows] == [0, 0, 1, 1]
    # The warm-up of two updates begins at a third.
    rates = [row["lr_network"] for row in rows]
    assert rates == pytest.approx([2e-4 / 3, 2e-4 * 2 / 3, 2e-4, 2e-4])
    for name in ("loss_ce", "loss_giou_rpn", "loss_bbox_anchor", "loss_ce_0", "dn_loss_bbox", "avg_anchor"):
        assert all(name in row for row in rows)
    assert all(row[f"ms_{name}"] > 0 for row in rows for name in ("data", "forward", "losses", "backward"))
    assert all(row["gradient_norm"] > 0 for row in rows)


SAME_EVERY_PASS = ("loss.patch_images=2", "patches.box_noise=0")
"""Pictures of 96 pixels have one patch only, so nothing else is left to chance."""


def test_accumulated_gradients_are_those_of_the_batch(data: Path, tmp_path: Path) -> None:
    whole = make_trainer(data, tmp_path / "whole", tiny_recipe(*SAME_EVERY_PASS))
    parts = make_trainer(data, tmp_path / "parts", tiny_recipe(*SAME_EVERY_PASS, "optimisation.accumulate=2"))
    of_whole, of_parts = gradients(whole, data), gradients(parts, data)
    assert relative_difference(of_parts, of_whole) < 1e-4
    smaller = make_trainer(
        data, tmp_path / "half", tiny_recipe(*SAME_EVERY_PASS, "optimisation.batch_size=2")
    )
    assert relative_difference(gradients(smaller, data), of_whole) > 1e-2


def test_what_is_logged_of_accumulated_passes_is_their_mean(data: Path, tmp_path: Path) -> None:
    whole = train(make_trainer(data, tmp_path / "a", tiny_recipe(*SAME_EVERY_PASS)), data, stop_after=1)
    recipe = tiny_recipe(*SAME_EVERY_PASS, "optimisation.accumulate=2")
    parts = train(make_trainer(data, tmp_path / "b", recipe), data, stop_after=1)
    for name in ("loss", "loss_ce", "loss_bbox_anchor", "dn_loss_giou", "avg_patch"):
        assert parts[0][name] == pytest.approx(whole[0][name], rel=1e-4)


def test_every_pass_draws_random_numbers_of_its_own(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seeds_of_two_updates(folder: str) -> list[int]:
        trainer = make_trainer(data, tmp_path / folder, tiny_recipe("optimisation.accumulate=2"))
        step, seeds = trainer._step, []

        def watched(batch: Any, epoch: int, generator: torch.Generator, clock: Any) -> Any:
            seeds.append(generator.initial_seed())
            return step(batch, epoch, generator, clock)

        monkeypatch.setattr(trainer, "_step", watched)
        train(trainer, data, stop_after=2)
        return seeds

    seeds = seeds_of_two_updates("a")
    assert len(seeds) == len(set(seeds)) == 4
    assert seeds_of_two_updates("b") == seeds


def test_bfloat16(data: Path, tmp_path: Path, whole_run: tuple[list[Row], dict[str, Tensor]]) -> None:
    trainer = make_trainer(data, tmp_path / "run", tiny_recipe("optimisation.compute=bf16"))
    rows = train(trainer, data, stop_after=2)
    assert losses(rows) != losses(whole_run[0][:2])
    assert losses(rows) == pytest.approx(losses(whole_run[0][:2]), rel=0.1)
    assert all(tensor.dtype == torch.float32 for tensor in weights(trainer).values())


@pytest.mark.parametrize(
    ("weight", "named"),
    [("rpn.", "loss_ce_rpn"), ("decoder.", "loss_ce"), ("anchor_generator.proj_all", "anchors")],
)
def test_a_loss_that_is_not_finite(data: Path, tmp_path: Path, weight: str, named: str) -> None:
    trainer = make_trainer(data, tmp_path / "run")
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if name.startswith(weight):
                parameter.fill_(torch.nan)
    with pytest.raises(TrainingError, match=rf"is not finite in update 1 \(.*{named}") as caught:
        train(trainer, data)
    assert "\n" not in str(caught.value)
    bad = torch.load(tmp_path / "run" / BAD_BATCH, weights_only=True)
    assert bad["image"].shape == (4, 3, 96, 96)
    assert len(bad["targets"]) == len(bad["image_ids"]) == 4
    assert bad["targets"][0][0].shape == (2, 4)
    assert str(bad["image_ids"][0]) in str(caught.value)
    assert not (tmp_path / "run" / LAST).exists()


def test_a_gradient_that_is_not_finite_changes_no_weight(data: Path, tmp_path: Path) -> None:
    trainer = make_trainer(data, tmp_path / "run")
    before = weights(trainer)
    weight = next(p for name, p in trainer.model.named_parameters() if name.startswith("neck"))
    weight.register_hook(  # type: ignore[no-untyped-call]
        lambda gradient: gradient * torch.inf
    )
    with pytest.raises(TrainingError, match=r"gradient is not finite in update 1 \(neck\."):
        train(trainer, data)
    assert (tmp_path / "run" / BAD_BATCH).exists()
    assert equal(weights(trainer), before)
    assert trainer.position.step == 0


def saved_run(data: Path, folder: Path, recipe: Recipe | None = None) -> Trainer:
    trainer = make_trainer(data, folder, recipe)
    train(trainer, data, stop_after=1)
    trainer.save()
    return trainer


def test_another_run_is_not_resumed(data: Path, tmp_path: Path) -> None:
    run = saved_run(data, tmp_path / "run")
    with pytest.raises(TrainingError, match=r"its optimisation\.lr is 0\.0002, not 0\.001"):
        make_trainer(data, tmp_path / "run", tiny_recipe("optimisation.lr=0.001")).resume()
    with pytest.raises(TrainingError, match="its seed is 0, not 1"):
        make_trainer(data, tmp_path / "run", seed=1).resume()
    others = tuple(Category(id=i, name=f"other {i}") for i in range(2))
    other = Trainer(run.recipe, Asag(run.recipe.network), others, tmp_path / "run", seed=0)
    before = weights(other)
    with pytest.raises(TrainingError, match=r"its classes is \[\[3, 'ball'\]"):
        other.resume()
    assert equal(weights(other), before)


def test_a_best_of_other_images_is_not_compared_with(data: Path, tmp_path: Path) -> None:
    run = saved_run(data, tmp_path / "run")

    def again(validation: str) -> Trainer:
        return Trainer(
            run.recipe,
            Asag(run.recipe.network),
            run.categories,
            tmp_path / "run",
            seed=0,
            validation=validation,
        )

    before = again("5 images")
    before.resume()
    before.save_evaluated(0.75)
    same, other = again("5 images"), again("9 images")
    assert same.resume()
    assert (same.position.best, same.changed) == (0.75, ())
    assert other.resume()
    assert other.changed == (
        "the best AP begins anew: 0.750 was measured on 5 images, now it is measured on 9 images",
    )
    other.save_evaluated(0.5)
    assert (other.position.best, other.position.best_on) == (0.5, "9 images")


@pytest.mark.parametrize("damage", ["empty", "garbage", "truncated", "other content", "missing weights"])
def test_a_damaged_state(data: Path, tmp_path: Path, damage: str) -> None:
    saved_run(data, tmp_path / "run")
    path = tmp_path / "run" / STATE
    content = path.read_bytes()
    if damage == "other content":
        torch.save([1, 2], path)
    elif damage == "missing weights":
        state = torch.load(path, weights_only=True)
        state["model"].popitem()
        torch.save(state, path)
    else:
        path.write_bytes(
            {"empty": b"", "garbage": b"no pickle", "truncated": content[: len(content) // 2]}[damage]
        )
    with pytest.raises(TrainingError, match=r"cannot resume from .*state\.pt', which is damaged") as caught:
        make_trainer(data, tmp_path / "run").resume()
    assert "\n" not in str(caught.value)


def test_the_checkpoint_can_be_loaded(data: Path, tmp_path: Path) -> None:
    trainer = saved_run(data, tmp_path / "run")
    loaded = load_checkpoint(tmp_path / "run" / LAST)
    assert loaded.config == trainer.recipe.network
    assert loaded.preprocessing == trainer.recipe.preprocessing
    assert [category.name for category in loaded.categories] == ["ball", "cup"]
    assert (loaded.trained, loaded.epoch) == (True, None)
    assert equal(dict(loaded.state), weights(trainer))
    train(trainer, data)
    trainer.save()
    assert load_checkpoint(tmp_path / "run" / LAST).epoch == 0


def test_the_best_is_kept(data: Path, tmp_path: Path) -> None:
    trainer = make_trainer(data, tmp_path / "run")
    best = tmp_path / "run" / BEST
    trainer.save_evaluated(None)
    assert not best.exists()
    kept = []
    for ap in (0.2, 0.1, 0.2, None, 0.3):
        with torch.no_grad():
            next(trainer.model.parameters()).add_(1)
        trainer.save_evaluated(ap)
        last, stored = load_checkpoint(tmp_path / "run" / LAST), load_checkpoint(best)
        kept.append(equal(dict(last.state), dict(stored.state)))
    assert kept == [True, False, False, False, True]
    resumed = make_trainer(data, tmp_path / "run")
    resumed.resume()
    assert resumed.position.best == 0.3


def test_an_evaluation_without_any_success_is_kept_as_the_first(data: Path, tmp_path: Path) -> None:
    trainer = make_trainer(data, tmp_path / "run")
    trainer.save_evaluated(0.0)
    assert (tmp_path / "run" / BEST).exists()


def test_a_state_that_cannot_be_written(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = saved_run(data, tmp_path / "run")
    before = (tmp_path / "run" / STATE).read_bytes()

    def full(*_: Any) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OutputError, match="is the disk full"):
        trainer.save()
    assert (tmp_path / "run" / STATE).read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_waits_for_the_update(data: Path, tmp_path: Path, number: signal.Signals) -> None:
    with Interruption() as interruption:
        trainer = make_trainer(data, tmp_path / "run")
        trainer.interruption = interruption
        handle = trainer.optimizer.register_step_pre_hook(lambda *_: signal.raise_signal(number))
        rows: list[Row] = []
        with pytest.raises(KeyboardInterrupt):
            trainer.train_epoch(make_loader(data), rows.append)
        handle.remove()
    assert interruption.signal == number
    assert len(rows) == trainer.position.step == 1
