"""Training on one's own classes, from a checkpoint of others."""

from __future__ import annotations

import csv
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from asag_deploy.bundle.manifest import Category, Preprocessing
from asag_deploy.errors import CheckpointError
from asag_evaluation.data.coco import CocoDataset
from asag_training.checkpoints import (
    Checkpoint,
    class_layers,
    load_checkpoint,
    save_checkpoint,
    start_from,
)
from asag_training.checkpoints.layout import expected_layout
from asag_training.cli import main
from asag_training.network.config import AsagConfig, DecoderType, finest_map_of
from asag_training.network.model import Asag, build
from support.training_runs import TINY, options_of, tiny_recipe, write_pictures

NETWORK = tiny_recipe().network
OWN = ("ball", "cup")
"""The classes of `write_pictures`."""


def classes(names: Sequence[str]) -> tuple[Category, ...]:
    return tuple(Category(id=100 + i, name=name) for i, name in enumerate(names))


def checkpoint_of(names: Sequence[str], *, named: bool = True, **changes: Any) -> Checkpoint:
    """A network with these classes, whose weights are unlike those of any new one."""
    config = NETWORK.with_changes(num_classes=len(names), **changes)
    generator = torch.Generator().manual_seed(7)
    state = {
        name: tensor + 0.01 * torch.rand(tensor.shape, generator=generator)
        for name, tensor in Asag(config).state_dict().items()
    }
    return Checkpoint(config=config, state=state, categories=classes(names), named=named)


def started(checkpoint: Checkpoint, names: Sequence[str], **changes: Any) -> tuple[Asag, Asag, str]:
    """A network that starts from the checkpoint, the same as it would start without, and what is said."""
    config = NETWORK.with_changes(num_classes=len(names), **changes)
    torch.manual_seed(0)
    model = Asag(config)
    fresh = build(config, {name: tensor.clone() for name, tensor in model.state_dict().items()})
    notes = start_from(model, classes(names), checkpoint, "c.pth")
    return model, fresh, "\n".join(notes)


def outputs(config: AsagConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the last stages make of a picture's features and two anchors."""
    network = build(config, state)
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(1, 64 >> i, 64 >> i, config.hidden_dim, generator=generator) for i in range(4)]
    anchors = torch.tensor([[[100.0, 90.0, 60.0, 80.0], [40.0, 200.0, 30.0, 30.0]]])
    size = torch.tensor([[256, 256]])
    with torch.no_grad():
        proposals, blocked = network.relate(features, anchors, torch.ones(1, 2, dtype=torch.bool), size)
        found = network.decode("main", features, proposals, blocked, size)
    return {"rpn boxes": proposals.boxes, "boxes": found.boxes, "logits": found.logits}


def test_all_but_the_classes_is_taken() -> None:
    """Boxes are those of the checkpoint; logits too, in the rows of classes of the same name."""
    checkpoint = checkpoint_of(["dog", "Traffic Light", "cat"])
    model, fresh, said = started(checkpoint, ["bird", "cat", "traffic_light", "fish"])
    before = outputs(checkpoint.config, dict(checkpoint.state))
    after = outputs(model.config, dict(model.state_dict()))
    assert torch.equal(after["boxes"], before["boxes"])
    assert torch.equal(after["rpn boxes"], before["rpn boxes"])
    assert torch.allclose(after["logits"][..., [1, 2]], before["logits"][..., [2, 1]], atol=1e-6)
    layers = class_layers(model.config)
    assert len(layers) == 2 * (
        1 + model.config.heads
    )  # weight and bias, of the relation block and each decoder
    for name in layers:
        for new in (0, 3):
            assert torch.equal(model.state_dict()[name][new], fresh.state_dict()[name][new])
    assert "keep the rows of the 2 classes of the same name (cat, traffic_light)" in said
    assert "those of bird, fish begin anew" in said
    assert f"{len(model.state_dict()) - len(layers)} of {len(model.state_dict())} tensors" in said


def test_other_classes_begin_anew() -> None:
    for checkpoint in (checkpoint_of(["dog", "cat"]), checkpoint_of(["a", "b", "c"], named=False)):
        model, fresh, said = started(checkpoint, OWN)
        assert all(
            torch.equal(model.state_dict()[n], fresh.state_dict()[n]) for n in class_layers(model.config)
        )
        assert "begin anew, for the 2 classes ball, cup" in said


def test_classes_in_another_order_are_put_in_order() -> None:
    """As many, and of the same names: each row goes where its class is now."""
    checkpoint = checkpoint_of(["cup", "ball"])
    model, _, said = started(checkpoint, OWN)
    for name in class_layers(model.config):
        assert torch.equal(model.state_dict()[name], checkpoint.state[name].flip(0))
    assert "keep the rows of the 2 classes of the same name" in said


def test_classes_without_names_are_taken_in_their_order() -> None:
    checkpoint = checkpoint_of(["class_0", "class_1"], named=False)
    model, _, said = started(checkpoint, OWN)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in checkpoint.state.items())
    assert "the file does not name its classes, and its 2 are taken for yours" in said


CLASSIFIERS = {
    "adamixer": "decoder.bbox_head.{}.fc_cls.weight",
    "sparse-rcnn": "decoder.head_series.{}.class_logits.weight",
    "deformable-detr": "decoder.layers.{}.class_embed.weight",
}


@pytest.mark.parametrize("decoder", CLASSIFIERS)
@pytest.mark.parametrize(("theirs", "ours"), [(2, 1), (1, 3), (4, 2)])
def test_another_number_of_decoders(theirs: int, ours: int, decoder: DecoderType) -> None:
    kind: dict[str, Any] = {"decoder": decoder, "finest_map": finest_map_of(decoder)}
    checkpoint = checkpoint_of(OWN, heads=theirs, **kind)
    model, _, said = started(checkpoint, OWN, heads=ours, **kind)
    main = [
        state[CLASSIFIERS[decoder].format(n - 1)]
        for state, n in ((checkpoint.state, theirs), (model.state_dict(), ours))
    ]
    assert torch.equal(*main)
    before, after = (
        outputs(c, dict(s))
        for c, s in ((checkpoint.config, checkpoint.state), (model.config, model.state_dict()))
    )
    assert torch.equal(before["logits"], after["logits"])
    assert "main from main" in said


def test_another_network_is_refused_with_what_would_fit() -> None:
    checkpoint = checkpoint_of(OWN, first_level_anchors=12, backbone_depth=50)
    with pytest.raises(CheckpointError) as caught:
        started(checkpoint, OWN)
    assert "'c.pth' is not a checkpoint of asag-a-scenes as the recipe has it" in str(caught.value)
    assert "--set network.backbone_depth=50 --set network.first_level_anchors=12" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_to_do_comes_before_the_weights_that_differ() -> None:
    checkpoint = checkpoint_of(OWN, decoder="sparse-rcnn", backbone_depth=50)
    with pytest.raises(CheckpointError) as caught:
        started(checkpoint, OWN)
    said = str(caught.value)
    assert re.search(r": give the recipe of that network, or .*\(missing: .*; and \d+ more\)$", said)
    assert len(re.findall(r"\w+(?:\.\w+){2,}", said)) <= 3
    assert len(said) < 500


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    return write_pictures(write_pictures(root), "val2017", count=1, seed=1)


def train(data: Path, run: Path, *options: str) -> int:
    words = [
        "--data",
        str(data),
        "--output-dir",
        str(run),
        "--workers",
        "0",
        "--device",
        "cpu",
        "--pictures",
        "0",
    ]
    once = options_of([*TINY, "schedule.epochs=1", "patches.target_patch_epochs=0"])
    return main([*words, *once, *options])


def test_from_the_command_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a file of another tool: it trains, goes on, and is a checkpoint of the new classes in the end."""
    assert tuple(category.name for category in CocoDataset.open(data).categories) == OWN
    source = checkpoint_of([f"class_{i}" for i in range(5)])
    wrapped = {f"module.{name}": tensor for name, tensor in source.state.items()}
    average = {name: tensor * 1.01 for name, tensor in wrapped.items()}
    torch.save({"state_dict": wrapped, "ema_state_dict": average}, tmp_path / "other.ckpt")
    options = ("--init", str(tmp_path / "other.ckpt"))
    assert train(data, tmp_path / "run", *options) == 0
    output = capsys.readouterr().out
    assert "begin anew, for the 2 classes ball, cup" in output
    assert "`--weights ema` takes them" in output
    loaded = load_checkpoint(tmp_path / "run" / "last.safetensors")
    assert loaded.categories == CocoDataset.open(data).categories
    name = "backbone.0.body.bn1.running_mean"  # which TINY leaves as it is
    assert torch.equal(loaded.state[name], source.state[name])
    assert expected_layout(loaded.config)["rpn.fc_cls.weight"][0] == 2

    assert train(data, tmp_path / "run", *options, "--resume") == 0
    assert "begin anew" not in capsys.readouterr().out
    assert train(data, tmp_path / "ema", *options, "--weights", "ema") == 0
    taken = load_checkpoint(tmp_path / "ema" / "last.safetensors").state[name]
    assert torch.equal(taken, source.state[name] * 1.01)
    assert train(data, tmp_path / "no", "--weights", "ema") == 2
    assert "give --init too" in capsys.readouterr().err


def test_what_the_weights_rely_on_stays(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The activation, mean and deviation that they were trained with, unless others are asked for by name."""
    source = checkpoint_of(["dog", "cat"], activation="relu", score_low=0.2)
    own = Preprocessing(shorter_side=64, longer_side=64, mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0))
    save_checkpoint(tmp_path / "own.safetensors", dataclasses.replace(source, preprocessing=own))
    options = ("--init", str(tmp_path / "own.safetensors"), "--set", "preprocessing.std=[7,7,7]")
    assert train(data, tmp_path / "run", *options) == 0
    output = capsys.readouterr().out
    assert "network.activation is relu, as the checkpoint has it" in output
    assert f"not the checkpoint's: network.score_low is {NETWORK.score_low}, not 0.2\n" in output
    assert (
        "preprocessing.std is (7, 7, 7), though the checkpoint was trained with (4, 5, 6)"
        in output.replace(".0", "")
    )
    loaded = load_checkpoint(tmp_path / "run" / "last.safetensors")
    assert loaded.config.activation == "relu"
    assert loaded.preprocessing == Preprocessing(
        shorter_side=96, longer_side=96, mean=own.mean, std=(7.0, 7.0, 7.0)
    )


def test_other_data_is_another_run(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(data, tmp_path / "run") == 0
    other = write_pictures(write_pictures(tmp_path / "other", seed=5), "val2017", count=1)
    assert train(other, tmp_path / "run", "--resume") == 2
    assert "its training data is 8 images with 16 objects (checksum" in capsys.readouterr().err
    with (tmp_path / "run" / "steps.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2"]
