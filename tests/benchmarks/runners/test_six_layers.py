"""Six decoder layers over learned queries: the graph computes what its module does, over the same pyramid."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from asag_bench.runners.references import check_references, open_reference
from asag_bench.runners.six_layers import (
    DECODERS,
    LAYERS,
    PyramidStage,
    SixLayers,
    query_count,
    six_layer_config,
    six_layer_decoder,
)
from asag_deploy.backends import open_network
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.detector_options import DetectorOptions
from asag_deploy.errors import ConfigError
from asag_deploy.loop.stages import features_among
from asag_deploy.processing.preprocess import make_batch
from asag_evaluation.data.doodles import draw_doodles
from asag_training.checkpoints import Checkpoint, save_checkpoint
from asag_training.network.config import variant_config
from asag_training.network.model import build
from asag_training.network.stages import NormalizeStage, TorchNetwork
from support.small_network import small_checkpoint

IMAGES = [draw_doodles(96, 128, 0), draw_doodles(80, 96, 1)]
RESULTS = ("logits", "boxes", "det_scores", "det_boxes")


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return small_checkpoint()


@pytest.fixture(scope="module")
def bundle(small_bundle: Bundle) -> Bundle:
    """Of which six layers share the first two graphs."""
    return small_bundle


@pytest.fixture(scope="module")
def file(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("six") / "small.safetensors"
    save_checkpoint(path, checkpoint)
    return path


@pytest.fixture(scope="module", params=DECODERS)
def graph(request: pytest.FixtureRequest, bundle: Bundle, file: Path) -> SixLayers:
    return reference(request.param, bundle, file)


def reference(name: str, bundle: Bundle, file: Path | None) -> SixLayers:
    bundles_own: Any = None
    runner = open_reference(name, bundle, bundles_own, DetectorOptions(threads=1), file)
    assert isinstance(runner, SixLayers)
    return runner


def outputs_of(runner: SixLayers, bundle: Bundle) -> dict[str, Any]:
    """What the layers make of a batch of two sizes."""
    network = runner._network
    pixels, sizes = make_batch(IMAGES, bundle.manifest.preprocessing)
    size = network.upload(sizes)
    image = network.stage("normalize")({"pixels": network.upload(pixels), "image_size": size})["image"]
    features = network.stage("backbone")({"image": image, "image_size": size})
    found = network.stage("decoder")({**features, "image_size": size})
    return {name: network.download(found[name]) for name in RESULTS}


def test_the_graph_computes_what_the_module_computes(graph: SixLayers, bundle: Bundle, file: Path) -> None:
    module = reference(f"torch-{graph.name}", bundle, file)
    found, expected = outputs_of(graph, bundle), outputs_of(module, bundle)
    assert expected["logits"].shape == (2, 100, 80)
    assert expected["boxes"].std(axis=1).min() > 0.05
    np.testing.assert_allclose(found["logits"], expected["logits"], atol=1e-3)
    np.testing.assert_allclose(found["boxes"], expected["boxes"], atol=1e-4)
    np.testing.assert_allclose(found["det_scores"], expected["det_scores"], atol=1e-3)
    for runner in (graph, module):
        run = runner(IMAGES, None)
        assert run.exits == ()
        assert run.phases_ms["decoder"] > 0
        assert "probe_p4" not in run.phases_ms
        assert sum(run.phases_ms.values()) == pytest.approx(run.total_ms)


def test_there_are_six_layers_and_each_of_them_counts(bundle: Bundle, checkpoint: Checkpoint) -> None:
    config = six_layer_config("adamixer", bundle, checkpoint)
    decoder = six_layer_decoder(config)
    layers = list(cast(torch.nn.ModuleList, decoder.decoder.bbox_head))
    assert len(layers) == LAYERS
    features = [torch.randn(1, 96 >> i, 128 >> i, config.hidden_dim) for i in range(4)]
    given = (*features, torch.tensor([[384, 512]]))
    with torch.no_grad():
        before = decoder(*given)[0]
        for layer in layers:
            bias = layer.get_parameter("ffn_norm.bias")
            bias.add_(0.5)
            assert not torch.equal(decoder(*given)[0], before)
            bias.sub_(0.5)


def test_the_pyramid_is_the_bundles_own(graph: SixLayers, bundle: Bundle, checkpoint: Checkpoint) -> None:
    network = graph._network
    own = open_network(None, bundle, threads=1)
    model = build(checkpoint.config, checkpoint.state)
    in_torch = TorchNetwork([NormalizeStage(bundle.manifest.preprocessing), PyramidStage(model).eval()])
    size = np.array([[96, 128]])
    image = np.random.default_rng(0).normal(size=(1, 3, 96, 128)).astype(np.float32)
    found: list[dict[str, Any]] = []
    for any_network in (network, own, in_torch):
        given = {"image": any_network.upload(image), "image_size": any_network.upload(size)}
        features = any_network.stage("backbone")(given)
        found.append({name: any_network.download(features[name]) for name in features_among(features)})
    for name in found[0]:
        np.testing.assert_array_equal(found[0][name], found[1][name])
        np.testing.assert_allclose(found[0][name], found[2][name], atol=1e-3)


def test_as_many_queries_as_the_variant_stands_for() -> None:
    assert query_count(variant_config("asag-a-r50-100")) == 100
    assert query_count(variant_config("asag-s-r101-300")) == 300


def test_what_cannot_be_built(bundle: Bundle, file: Path) -> None:
    with pytest.raises(
        ConfigError, match="the bundle's features have 32 channels, but those of asag-a-r50-100 256"
    ):
        reference("adamixer-6", bundle, None)
    trained = dataclasses.replace(bundle.manifest, trained=True)
    check_references(["torch-adamixer-6"], None, bundle.manifest)
    check_references(["torch-adamixer-6"], file, trained)
    with pytest.raises(ConfigError, match="'torch-adamixer-6' needs the weights"):
        check_references(["torch-adamixer-6"], None, trained)
