"""The paper's other detectors: the graph computes what its module does, over the bundle's own maps."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch

from asag_bench.runners.compared import adamixer, deformable_detr, efficient_detr, sparse_rcnn
from asag_bench.runners.compared.map_stages import stage_of_maps
from asag_bench.runners.compared.published import COMPARED, IN_TORCH, references
from asag_bench.runners.compared.runner import (
    BUILDERS,
    ComparedRunner,
    build_compared,
    compared_config,
    query_count,
)
from asag_bench.runners.references import check_references, open_reference
from asag_deploy.backends import open_network
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.detector_options import DetectorOptions
from asag_deploy.errors import ConfigError
from asag_deploy.processing.preprocess import make_batch
from asag_evaluation.data.doodles import draw_doodles
from asag_export import stage_export
from asag_export.stage_export import ExportedStage, export_stage
from asag_training.checkpoints import Checkpoint, save_checkpoint
from asag_training.network.config import variant_config
from asag_training.network.model import build
from asag_training.network.stages import TorchNetwork
from support.small_network import small_checkpoint

IMAGES = [draw_doodles(96, 128, 0), draw_doodles(80, 96, 1)]
RESULTS = ("logits", "boxes", "det_scores", "det_boxes")


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return small_checkpoint()


@pytest.fixture(scope="module")
def bundle(small_bundle: Bundle) -> Bundle:
    """Whose maps they share."""
    return small_bundle


@pytest.fixture(scope="module")
def file(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("six") / "small.safetensors"
    save_checkpoint(path, checkpoint)
    return path


class Exported(NamedTuple):
    """A detector as a graph, and as a module beside it."""

    graph: ComparedRunner
    module: ComparedRunner
    operators: tuple[str, ...]
    """The kind of each of the decoder's nodes."""


FEW = 2
"""Layers in sequence are alike, and two show what one hands to the next: six take most of a minute."""


@pytest.fixture(scope="module", params=COMPARED)
def exported(request: pytest.FixtureRequest, bundle: Bundle, file: Path) -> Exported:
    """With `FEW` layers in the place of six, once for all that look at it."""
    models: list[onnx.ModelProto] = []

    def export(*given: Any, **options: Any) -> ExportedStage:
        stage = export_stage(*given, **options)
        models.append(stage[0])
        return stage

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_export, "export_stage", export)
        for layered in (adamixer, deformable_detr, sparse_rcnn):
            patch.setattr(layered, "LAYERS", FEW)
        patch.setattr(efficient_detr, "ENCODER_LAYERS", FEW)
        graph = reference(request.param, bundle, file)
        module = reference(f"torch-{request.param}", bundle, file)
    (model,) = models
    return Exported(graph, module, tuple(node.op_type for node in model.graph.node))


@pytest.fixture
def graph(exported: Exported) -> ComparedRunner:
    return exported.graph


def reference(name: str, bundle: Bundle, file: Path | None) -> ComparedRunner:
    bundles_own: Any = None
    runner = open_reference(name, bundle, bundles_own, DetectorOptions(threads=1), file)
    assert isinstance(runner, ComparedRunner)
    return runner


def outputs_of(runner: ComparedRunner, bundle: Bundle) -> dict[str, Any]:
    """What a detector makes of a batch of two sizes."""
    network = runner._network
    pixels, sizes = make_batch(IMAGES, bundle.manifest.preprocessing)
    size = network.upload(sizes)
    image = network.stage("normalize")({"pixels": network.upload(pixels), "image_size": size})["image"]
    features = network.stage("backbone")({"image": image, "image_size": size})
    found = network.stage("decoder")({**features, "image_size": size})
    return {name: network.download(found[name]) for name in RESULTS}


def test_the_graph_computes_what_the_module_computes(exported: Exported, bundle: Bundle) -> None:
    graph, module, _ = exported
    found, expected = outputs_of(graph, bundle), outputs_of(module, bundle)
    assert expected["logits"].shape == (2, 100, 80)
    assert expected["boxes"][..., :2].std(axis=1).min() > 0.05
    np.testing.assert_allclose(found["logits"], expected["logits"], atol=1e-3)
    np.testing.assert_allclose(found["boxes"], expected["boxes"], atol=1e-4)
    np.testing.assert_allclose(found["det_scores"], expected["det_scores"], atol=1e-3)
    for runner in (graph, module):
        run = runner(IMAGES, None)
        assert run.exits == ()
        assert run.phases_ms["decoder"] > 0
        assert "probe_p4" not in run.phases_ms
        assert sum(run.phases_ms.values()) == pytest.approx(run.total_ms)


@pytest.mark.parametrize("name", COMPARED)
def test_every_layer_counts(name: str, bundle: Bundle, checkpoint: Checkpoint) -> None:
    detector = build_compared(name, compared_config(bundle, checkpoint))
    layers = layers_of(detector)
    assert len(layers) == COMPARED[name].layers
    assert name not in SAMPLINGS or detector.config.encoder_layers == 6
    given = (*maps_of(detector.maps, checkpoint), torch.tensor([[384, 512]]))
    with torch.no_grad():
        before = detector(*given)[0]
        for layer in layers:
            named = dict(layer.named_parameters())
            bias = next(named[name] for name in LAST_NORMS if name in named)
            bias.add_(0.5)
            assert not torch.equal(detector(*given)[0], before)
            bias.sub_(0.5)


LAST_NORMS = ("ffn_norm.bias", "norm3.bias")


def layers_of(detector: Any) -> list[torch.nn.Module]:
    """The layers of a detector's decoder, in sequence."""
    decoder = detector.decoder
    for name in ("bbox_head", "head_series"):
        decoder = getattr(decoder, name, decoder)
    return list(decoder) if isinstance(decoder, torch.nn.ModuleList) else [decoder]


def maps_of(maps: tuple[str, ...], checkpoint: Checkpoint) -> tuple[torch.Tensor, ...]:
    """What the backbone, or the neck, makes of a random picture of 384 x 512."""
    stage = stage_of_maps(maps, build(checkpoint.config, checkpoint.state))
    with torch.no_grad():
        return tuple(stage(torch.randn(1, 3, 384, 512), torch.tensor([[384, 512]])))


def test_all_that_are_named_can_be_built() -> None:
    assert BUILDERS.keys() == COMPARED.keys()
    names = set(references())
    assert names == {*COMPARED, *(f"{IN_TORCH}{name}" for name in COMPARED)}


def test_a_grid_gives_the_queries_where_it_scores_best(bundle: Bundle, checkpoint: Checkpoint) -> None:
    detector: Any = build_compared("f-qrcnn", compared_config(bundle, checkpoint), queries=3)
    generator = detector.generator
    for convolution in (generator.score, generator.distances, generator.content):
        convolution.weight.zero_()
    generator.hidden.weight.zero_()
    generator.distances.bias.copy_(torch.tensor([1.0, 2.0, 3.0, 0.5]))
    size = torch.tensor([[256, 384]])
    maps = [torch.zeros(1, 32, 256 >> i, 384 >> i) for i in (3, 4, 5, 6, 7)]
    with torch.no_grad():
        generator.score.weight[:, 0] = 1.0
        generator.hidden.weight[0, 0, 1, 1] = 1.0
        maps[1][0, 0, 1, 2] = 9.0  # P4, row 1, column 2: its centre is (40, 24)
        maps[0][0, 0, 5, 7] = 5.0
        found = generator(maps, size)
    pixels = found.boxes[0] * torch.tensor([384.0, 256.0, 384.0, 256.0])
    assert pixels[0].tolist() == pytest.approx([40 + 16, 24 - 12, 64, 40])
    assert pixels[1].tolist() == pytest.approx([60 + 8, 44 - 6, 32, 20])


def test_the_maps_are_the_bundles_own(graph: ComparedRunner, bundle: Bundle, checkpoint: Checkpoint) -> None:
    maps = build_compared(graph.name, compared_config(bundle, checkpoint)).maps
    model = build(checkpoint.config, checkpoint.state)
    in_torch = TorchNetwork([stage_of_maps(maps, model).eval()])
    networks: list[Any] = [graph._network, in_torch]
    if maps[0] == "p2":
        networks.append(open_network(None, bundle, threads=1))
    size = np.array([[96, 128]])
    image = np.random.default_rng(0).normal(size=(1, 3, 96, 128)).astype(np.float32)
    found: list[dict[str, Any]] = []
    for network in networks:
        given = {"image": network.upload(image), "image_size": network.upload(size)}
        outputs = network.stage("backbone")(given)
        found.append({name: network.download(x) for name, x in outputs.items() if name[1:].isdigit()})
    assert tuple(found[0]) == maps
    for others in found[1:]:
        for name in found[0]:
            np.testing.assert_allclose(others[name], found[0][name], atol=1e-3)


SAMPLINGS = {"deformable-detr-6": 2 * FEW, "efficient-detr": FEW + 1}
"""One in each layer, those of the encoder among them."""


def test_sampling_stays_an_operator(exported: Exported) -> None:
    """Where tracing has to be tried in another way, its reference would be in the graph."""
    assert exported.operators.count("DeformableSample") == SAMPLINGS.get(exported.graph.name, 0)


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
