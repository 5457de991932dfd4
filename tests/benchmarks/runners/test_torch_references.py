"""The PyTorch references: the checkpoint that a bundle was exported from, eager and compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.config

from asag_bench.runners.references import open_reference
from asag_bench.runners.runner import Runner
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import Manifest, Preprocessing
from asag_deploy.detector_options import DetectorOptions
from asag_deploy.errors import CheckpointError, ConfigError
from asag_evaluation.data.doodles import draw_doodles
from asag_training import checkpoints
from asag_training.checkpoints import Checkpoint, save_checkpoint
from asag_training.network.stage_plan import postprocessing_plan, probing_plan
from support.small_network import small_checkpoint


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return small_checkpoint(backbone_depth=26)


@pytest.fixture(scope="module")
def file(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("references") / "small.safetensors"
    save_checkpoint(path, checkpoint)
    return path


def bundle_of(checkpoint: Checkpoint, variant: str | None = None) -> Bundle:
    """What the manifest would say; PyTorch needs no graphs."""
    config = checkpoint.config
    manifest = Manifest(
        producer="tests",
        variant=variant or config.variant,
        head="main",
        precision="fp32",
        opset=20,
        trained=False,
        categories=tuple(checkpoint.categories),
        preprocessing=Preprocessing(shorter_side=96, longer_side=160),
        probing=probing_plan(config),
        postprocessing=postprocessing_plan(config),
        graphs=(),
    )
    return Bundle(path=Path(), manifest=manifest)


def reference(name: str, bundle: Bundle, file: Path | None) -> Runner:
    network: Any = None  # of the bundle, which these references do without
    return open_reference(name, bundle, network, DetectorOptions(), file)


def test_eager(checkpoint: Checkpoint, file: Path) -> None:
    runner = reference("torch", bundle_of(checkpoint), file)
    run = runner([draw_doodles(96, 128, 0), draw_doodles(96, 96, 1)], None)
    assert len(run.exits) == 2
    assert {"backbone", "decoder", "loop"} <= set(run.phases_ms)
    assert runner([draw_doodles(96, 128, 0)], "P5").exits == ("P5",)


def test_autocast_computes_in_bfloat16_what_float32_finds(checkpoint: Checkpoint, file: Path) -> None:
    exact: Any = reference("torch", bundle_of(checkpoint), file)
    lower: Any = reference("torch-bf16", bundle_of(checkpoint), file)
    image = torch.rand(1, 3, 96, 128)
    given = {"image": image, "image_size": torch.tensor([[96, 128]])}
    one, other = (runner.network.stage("backbone")(given) for runner in (exact, lower))
    for feature in ("p2", "p5"):
        assert (one[feature].dtype, other[feature].dtype) == (torch.float32, torch.bfloat16)
        difference = (one[feature] - other[feature]).abs().max()
        assert 0 < difference < 0.1 * one[feature].abs().max()
    assert other["anchors"].dtype == torch.float32, "coordinates stay what they are"
    run = lower([draw_doodles(96, 128, 0), draw_doodles(96, 96, 1)], None)
    assert len(run.exits) == 2
    assert np.isfinite(lower.detector()(draw_doodles(96, 128, 0), channel_order="rgb").xyxy).all()


def test_weights_that_an_untrained_bundle_has(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def drawn(variant: str) -> Checkpoint:
        asked.append(variant)
        return checkpoint

    monkeypatch.setattr(checkpoints, "untrained_checkpoint", drawn)
    assert reference("torch", bundle_of(checkpoint), None)([draw_doodles(96, 128, 0)], "P5").exits == ("P5",)
    assert asked == ["asag-a-r50-100"]


def test_every_stage_is_compiled(checkpoint: Checkpoint, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def fake_compile(stage: Any, *, dynamic: bool) -> Any:
        assert dynamic
        compiled.append(stage.name)
        return original(stage, dynamic=dynamic, backend="eager")  # traced, but no C++ compiler needed

    original = torch.compile
    monkeypatch.setattr(torch, "compile", fake_compile)
    with torch._dynamo.config.patch(recompile_limit=8):  # and as it was afterwards
        runner = reference("torch-compile", bundle_of(checkpoint), file)
        assert compiled == ["normalize", "backbone", "probe_p4", "probe_p3", "decoder"]
        assert torch._dynamo.config.recompile_limit >= 100, "beyond it PyTorch goes on uncompiled, silently"
        image = draw_doodles(96, 128, 0)
        assert runner([image], "P5").exits == ("P5",)


def test_another_network(checkpoint: Checkpoint, file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds asag-a-r50-100, but the bundle asag-s-r50-100"):
        reference("torch", bundle_of(checkpoint, "asag-s-r50-100"), file)
    with pytest.raises(CheckpointError, match="there is no checkpoint file"):
        reference("torch", bundle_of(checkpoint), tmp_path / "absent.pth")


def test_pictures_are_prepared_as_for_the_bundle(checkpoint: Checkpoint, file: Path) -> None:
    runner: Any = reference("torch", bundle_of(checkpoint), file)
    found = runner.detector()(draw_doodles(192, 256, 0), channel_order="rgb")
    assert found.original_shape == (192, 256)
    assert np.isfinite(found.xyxy).all()
