"""Peers: as large as published, the same in a backend as in PyTorch, and timed in the same rounds."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from asag_bench import cli
from asag_bench.runners import references
from asag_bench.runners.peer_networks import BUILDERS, PeerStage, build_peer, export_peer, merge_branches
from asag_bench.runners.peer_runner import PeerRunner, open_peer, stretched
from asag_bench.runners.peers import BEST, GRAPH, PEERS, PIXELS, RESULTS, Peer
from asag_bench.runners.references import check_references
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.detector_options import DetectorOptions
from asag_deploy.errors import BackendError, ConfigError
from support.small_peers import CLASSES, SIDE, SMALL, picture_batch
from support.tiny_bundle import make_bundle, picture

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "peers.md").read_text(encoding="utf-8")
HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
needs_transformers = pytest.mark.skipif(
    not HAS_TRANSFORMERS, reason="needs transformers: pip install 'asag-deploy[peers]'"
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("peers") / "bundle")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build the peers in small, without a network to the outside."""

    def refuse(*_: object) -> None:
        raise AssertionError("nothing may be asked of the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    export_peer.cache_clear()
    for name, builder in SMALL.items():
        monkeypatch.setitem(BUILDERS, name, builder)
        monkeypatch.setitem(PEERS, name, dataclasses.replace(PEERS[name], side=SIDE))


def test_every_peer_is_a_reference_and_stands_on_the_page() -> None:
    assert BUILDERS.keys() == PEERS.keys() <= references.REFERENCES.keys()
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in PAGE.splitlines() if "|" in row]
    for name, peer in PEERS.items():
        (row,) = [row for row in rows if row[0] == f"{peer.title} (`{name}`)"]
        gflops = "-" if peer.gflops is None else f"{peer.gflops:g}"
        figures = [f"{peer.ap}", f"{peer.parameters_m:g}", gflops, f"{peer.side}x{peer.side}"]
        assert row[1:5] == figures
        assert peer.source in row[5]


@needs_transformers
@pytest.mark.parametrize("name", PEERS)
def test_networks_have_as_many_parameters_as_published(name: str) -> None:
    with torch.device("meta"):
        network = merge_branches(BUILDERS[name]())
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    published = PEERS[name].parameters_m
    assert round(millions, len(f"{published:g}".partition(".")[2])) == published


@needs_transformers
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if peer.gflops is not None])
def test_networks_cost_what_was_published(name: str) -> None:
    """Within 3%: publications count activations and norms, which are not counted here."""
    image = torch.zeros(1, 3, PEERS[name].side, PEERS[name].side)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        build_peer(name)(pixel_values=image)
    assert counter.get_total_flops() / 1e9 == pytest.approx(PEERS[name].gflops, rel=0.03)


@needs_transformers
@pytest.mark.parametrize("name", ["d-fine-s", "rt-detrv2-r50"])
def test_what_is_deployed_computes_what_is_trained(name: str) -> None:
    torch.manual_seed(0)
    network = SMALL[name]().eval()
    image = torch.rand(2, 3, SIDE, SIDE)
    with torch.no_grad():
        deployed: Any = merge_branches(network)
        found = deployed(pixel_values=image)
        torch.manual_seed(0)
        trained: Any = SMALL[name]().eval()
        if name == "d-fine-s":
            trained.model.enc_bbox_head = trained.model.enc_bbox_head.predictor
        expected = trained(pixel_values=image)
    assert expected.pred_boxes.std(dim=1).min() > 0.01
    assert expected.logits.std() > 0.01
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.pred_boxes, expected.pred_boxes, atol=1e-4, rtol=1e-4)
    kinds = [type(module).__name__ for module in deployed.modules()]
    assert not any(kind.endswith("RepVggBlock") for kind in kinds)


class _Fixed(nn.Module):
    """A network that finds the same everywhere, and keeps the picture that it was given."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.logits = torch.randn(2, 200, 3, generator=generator)
        self.boxes = torch.rand(2, 200, 4, generator=generator)

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        self.image = pixel_values
        return SimpleNamespace(logits=self.logits, pred_boxes=self.boxes)


def test_a_peer_goes_from_pixels_to_the_best_detections() -> None:
    peer = dataclasses.replace(PEERS["rf-detr-n"], side=4)
    network = _Fixed()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    scores, labels, boxes = (result.numpy() for result in PeerStage(network, peer)(torch.tensor(pixels)))
    normal = (pixels / 255 - np.array(peer.mean)) / np.array(peer.std)
    np.testing.assert_allclose(network.image.numpy(), normal.transpose(0, 3, 1, 2), atol=1e-5)
    every = 1 / (1 + np.exp(-network.logits.numpy()))
    for image in range(2):
        best = np.argsort(-every[image].ravel())[:BEST]
        np.testing.assert_allclose(scores[image], every[image].ravel()[best], atol=1e-6)
        np.testing.assert_array_equal(labels[image], best % 3)
        x, y, width, height = network.boxes.numpy()[image][best // 3].T
        corners = np.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], axis=1)
        np.testing.assert_allclose(boxes[image], corners, atol=1e-6)


def test_pictures_are_stretched_to_a_square() -> None:
    image = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    assert stretched(image, 20).shape == (20, 20, 3)
    averages = image.reshape(20, 3, 30, 3, 3)[:, :, ::1].mean(axis=1)
    assert abs(float(stretched(image, 20).mean()) - float(averages.mean())) < 0.5
    assert stretched(image, 100).dtype == np.uint8


@needs_transformers
@pytest.mark.slow
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["d-fine-s", "rf-detr-n"])
def test_a_backend_computes_what_the_layers_compute(name: str, bundle: Bundle) -> None:
    """RT-DETRv2 is D-FINE with fewer operators, and each export takes long."""
    pixels = picture_batch(2)
    with torch.no_grad():
        expected = PeerStage(build_peer(name), PEERS[name])(pixels)
    for backend, atol in (("onnxruntime", 1e-4), ("openvino", 1e-4)):
        runner = open_peer(name, name, bundle, DetectorOptions(backend=backend, threads=1))
        network = runner._network(2)
        outputs = network.stage(GRAPH)({PIXELS: network.upload(pixels.numpy())})
        found = {result: network.download(outputs[result]) for result in RESULTS}
        for image in range(2):
            order = np.argsort(-found["det_scores"][image], kind="stable")
            np.testing.assert_allclose(found["det_scores"][image][order], expected[0][image], atol=atol)
            pairs = sorted(
                zip(found["det_labels"][image], found["det_boxes"][image].sum(axis=1), strict=True)
            )
            wanted = sorted(
                zip(expected[1][image].numpy(), expected[2][image].sum(dim=1).numpy(), strict=True)
            )
            np.testing.assert_allclose(np.array(pairs), np.array(wanted), atol=1e-3)
    assert {int(label) for label in found["det_labels"].ravel()} <= set(range(CLASSES))


@needs_transformers
@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_peers_are_timed_in_the_same_rounds_once_on_each_backend(bundle: Bundle, tmp_path: Path) -> None:
    arguments = ["run", str(bundle.path), "--limit", "2", "--duration", "0.05", "--warmup", "1", "--quiet"]
    arguments += ["--backend", "onnxruntime,openvino", "--reference", "rf-detr-n"]
    arguments += ["--baseline", "rf-detr-n openvino", "--threads", "1"]
    assert cli.main([*arguments, "--output-dir", str(tmp_path), "--no-plots"]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    names = ["onnxruntime", "openvino", "rf-detr-n onnxruntime", "rf-detr-n openvino"]
    for group in result["strata"]:
        runners = {name: found for name, found in group["subjects"].items() if "stopped" not in name}
        assert list(runners) == names
        assert len({found["calls"] for found in runners.values()}) == 1
    notes = [note for note in result["notes"] if "RF-DETR-N" in note]
    assert len(notes) == 2
    assert "stretched to 64x64, computed in fp32; published AP 48.4 on COCO (arXiv 2511.09554)" in notes[0]
    assert list(result["memory"]["subjects"]) == names[:2], "PyTorch's memory is not the peer's"
    assert result["headline"]["six_layers"] == {}
    assert re.search(r"\| rf-detr-n openvino \|.*\| - \| - \|", (tmp_path / "result.md").read_text())


def test_a_graph_is_made_for_each_number_of_images_and_not_on_the_clock() -> None:
    opened: list[int] = []

    class Network:
        def stage(self, name: str) -> Any:
            assert name == GRAPH
            return self.run

        def upload(self, array: Any) -> Any:
            return array

        download = upload

        def run(self, inputs: dict[str, Any]) -> dict[str, Any]:
            images = len(inputs[PIXELS])
            boxes = np.full((images, 2, 4), 0.5, np.float32)
            return dict(
                zip(RESULTS, (np.ones((images, 2)), np.zeros((images, 2), np.int64), boxes), strict=True)
            )

    def open_network(images: int) -> Any:
        opened.append(images)
        return Network()

    runner = PeerRunner("peer", Peer(**{**dataclasses.asdict(PEERS["d-fine-s"]), "side": 8}), open_network)
    for images in (1, 2, 1, 2, 1):
        run = runner([picture(0)] * images, "P5")
        assert run.total_ms > 0
        assert (run.exits, run.phases_ms) == ((), {})
    assert opened == [1, 2]


def test_what_keeps_a_peer_from_being_timed(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"unknown reference 'd-fine-xl'; the references are torch, .*d-fine-s"
    ):
        check_references(["d-fine-xl"], None, bundle.manifest)
    with pytest.raises(
        BackendError, match="'rf-detr-n' has no engines, which the backend 'tensorrt-rtx' runs: time"
    ):
        open_peer("rf-detr-n", "", bundle, DetectorOptions(backend="tensorrt-rtx"))

    def absent() -> nn.Module:
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")

    monkeypatch.setitem(BUILDERS, "d-fine-s", absent)
    install = r"which is not installed: install it with `pip install 'asag-deploy\[peers\]'`"
    with pytest.raises(
        ConfigError, match=f"the reference 'd-fine-s' needs the package transformers, {install}"
    ):
        build_peer("d-fine-s")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == "transformers" else find_spec(name),
    )
    with pytest.raises(ConfigError, match=f"this reference needs the package transformers, {install}"):
        check_references(["d-fine-s"], None, bundle.manifest)
