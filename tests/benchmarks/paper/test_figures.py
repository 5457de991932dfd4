"""The paper's figures: what they draw, and that files are there for each."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from asag_bench.light_peers.peer import Said, build, load_peer, save_weights
from asag_bench.light_peers.recipe import peer_recipe
from asag_bench.paper.cli import main
from asag_bench.paper.figures.draw import NUMBERS
from asag_bench.paper.figures.maps import heat_map, scores_of_network, scores_of_peer
from asag_bench.paper.figures.plots import paper_points
from asag_deploy.bundle.manifest import Preprocessing
from asag_evaluation.data.scenes import SCENE_CATEGORIES, write_scenes
from asag_training.checkpoints import Checkpoint, save_checkpoint
from asag_training.network.config import DecoderType, finest_map_of
from asag_training.network.model import build as build_network
from support.small_network import small_checkpoint

SMALL = Preprocessing(shorter_side=96, longer_side=160)


def scene_checkpoint(decoder: DecoderType = "adamixer") -> Checkpoint:
    variant = {"adamixer": "asag-a-r50-100", "deformable-detr": "asag-d-r50-100"}[decoder]
    made = small_checkpoint(variant, num_classes=len(SCENE_CATEGORIES), patch_size=6, heads=1)
    return dataclasses.replace(made, categories=SCENE_CATEGORIES, preprocessing=SMALL)


def save_peer(folder: Path) -> Path:
    """AdaMixer of six layers, as narrow, with random weights."""
    recipe = peer_recipe("adamixer-6", "scenes")
    network = scene_checkpoint().config
    said = Said(
        recipe=dataclasses.replace(recipe, network=network, preprocessing=SMALL, queries=10),
        categories=SCENE_CATEGORIES,
        seed=0,
    )
    folder.mkdir()
    (folder / "recipe.json").write_text(said.to_json())
    save_weights(build(said.recipe, 0), folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, count=2, seed=0, size=96, split="val2017")
    return folder


@pytest.mark.slow
def test_every_figure_is_drawn(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network, output = tmp_path / "a.safetensors", tmp_path / "figures"
    save_checkpoint(network, scene_checkpoint())
    peer = save_peer(tmp_path / "six")
    command = ["figures", "--data", str(data), "--network", f"asag-a-100={network}", "--threads", "1"]
    command += ["--peer", f"adamixer-6={peer}", "--run", str(network), "--run", str(network)]
    command += ["--pictures", "2", "--output-dir", str(output)]
    assert main(command) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    numbers = {path.stem.removeprefix("figure-").partition("-image")[0] for path in paths}
    assert numbers == set(NUMBERS)
    for path in paths:
        picture = cv2.imread(str(path))
        assert picture is not None, path
        assert min(picture.shape[:2]) > 200
        assert picture.std() > 5
    assert main([*command, "--only", "A-1"]) == 0  # into the same folder


def test_what_cannot_be_drawn_says_what_it_needs(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["figures", "--data", str(data), "--only", "5,7,A-1", "--output-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].endswith("figure-A-1.png")
    assert out[1:] == [
        "figure 5: needs several checkpoints of one run, in their order: give each as --run FILE",
        "figure 7: needs a network: give one as --network ROLE=FILE",
    ]
    assert main(["figures", "--data", str(data), "--only", "2", "--output-dir", str(tmp_path)]) == 2
    assert "figure '2' is none that is drawn of results" in capsys.readouterr().err
    other = tmp_path / "mine"
    other.mkdir()
    (other / "figure-1.png").write_bytes(b"x")
    assert main(["figures", "--data", str(data), "--output-dir", str(other)]) == 2
    assert "figure-1.png' is there, but no 'paper.json' beside it" in capsys.readouterr().err


def test_a_missing_plotting_library_is_named(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert main(["figures", "--data", str(data), "--output-dir", str(tmp_path)]) == 2
    assert "drawing plots needs the package matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize("decoder", ["adamixer", "deformable-detr"])
def test_scores_are_the_norms_of_the_networks_own_maps(decoder: DecoderType) -> None:
    checkpoint = scene_checkpoint(decoder)
    image = np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    scores = scores_of_network(checkpoint)(image)
    first = int(finest_map_of(decoder)[1])
    assert list(scores) == [f"P{level}" for level in range(first, first + 4)]
    pixels = (image / 255 - np.array(SMALL.mean) / 255) / (np.array(SMALL.std) / 255)
    tensor = torch.from_numpy(pixels.transpose(2, 0, 1)[None].copy()).float()
    model = build_network(checkpoint.config, checkpoint.state)
    with torch.no_grad():
        maps = model.features(tensor, torch.tensor([[96, 128]]))
    for found, expected in zip(scores.values(), maps, strict=True):
        assert found == pytest.approx(expected[0].square().sum(dim=-1).sqrt().numpy(), rel=1e-3)


def test_a_peers_maps_cover_the_picture(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    scores = scores_of_peer(load_peer(save_peer(tmp_path / "six")))(image)
    assert {name: found.shape for name, found in scores.items()} == {
        "P2": (24, 32),
        "P3": (12, 16),
        "P4": (6, 8),
        "P5": (3, 4),
    }


def test_a_heat_map_tells_cells_by_their_norm() -> None:
    picture = np.full((40, 40, 3), 128, dtype=np.uint8)
    scores = np.array([[0.0, 1.0], [1.0, 0.0]], dtype=np.float32)
    drawn = heat_map(picture, scores).astype(int)
    assert (drawn[5, 5] == drawn[35, 35]).all()
    assert drawn[5, 35, 0] > drawn[5, 5, 0] + 60  # yellow has more red than blue has
    assert (heat_map(picture, np.ones((2, 2), dtype=np.float32)) == drawn[5, 5]).all()


def test_figure_1_has_the_papers_networks_once() -> None:
    points = paper_points()
    assert len(set(points)) == len(points)
    assert {point.name for point in points} >= {"ASAG-A", "ASAG-S", "ASAG-D", "AdaMixer", "F-QRCNN"}
    assert all(point.fps > 0 for point in points)
