"""The network as a module: its parameters, its parts, and who may influence whom."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from asag_deploy.errors import ConfigError
from asag_training.network.body import Body, FrozenBatchNorm2d
from asag_training.network.config import Activation, variant_config
from asag_training.network.mobilenet import MobileNet
from asag_training.network.model import Asag, HeadOutput, build
from asag_training.network.pyramid import map_of, pyramid_strides
from asag_training.network.relation_block import Proposals
from asag_training.network.resnet import ResNet
from support.small_network import small_config

REFERENCE = Path(__file__).parents[2] / "reference"
LAYOUTS = sorted(path.stem.removeprefix("layout_") for path in REFERENCE.glob("layout_*.json"))
DECODERS = ("asag-a-r50-100", "asag-s-r50-100", "asag-d-r50-100")
LIGHT = "asag-a-lite-s"

IMAGE_SIZE = torch.tensor([[96, 128], [80, 70]])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_are_the_official_ones(layout: str) -> None:
    name = layout.replace("_", "-")
    config = variant_config(name if name.count("-") == 3 else name.replace("crowdhuman", "r50-crowdhuman"))
    with torch.device("meta"):
        model = Asag(config)
    shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    assert shapes == json.loads((REFERENCE / f"layout_{layout}.json").read_text(encoding="utf-8"))


def test_there_are_layouts() -> None:
    assert {layout[:6] for layout in LAYOUTS} == {"asag_a", "asag_s"}


@pytest.fixture(params=[*DECODERS, LIGHT])
def model(request: pytest.FixtureRequest) -> Asag:
    return build(small_config(request.param)).requires_grad_(False)


def predict(
    model: Asag, features: list[Tensor], anchors: Tensor, valid: Tensor
) -> tuple[Proposals, dict[str, HeadOutput]]:
    proposals, blocked = model.relate(features, anchors, valid, IMAGE_SIZE)
    heads = model.config.head_names
    return proposals, {head: model.decode(head, features, proposals, blocked, IMAGE_SIZE) for head in heads}


def random_anchors(queries: int) -> Tensor:
    """(2, Q, 4) cxcywh in pixels, inside the images more or less."""
    return torch.rand(2, queries, 4) * torch.tensor([128, 96, 60, 60]) + torch.tensor([0, 0, 4, 4])


def test_padding_queries_do_not_matter(model: Asag) -> None:
    features = model.features(torch.randn(2, 3, 96, 128), IMAGE_SIZE)
    anchors = random_anchors(11)
    valid = torch.arange(11) < torch.tensor([[7], [1]])
    proposals, outputs = predict(model, features, anchors, valid)
    anchors = torch.where(valid[..., None], anchors, random_anchors(11))
    other_proposals, other_outputs = predict(model, features, anchors, valid)

    assert not torch.equal(proposals.boxes, other_proposals.boxes)
    torch.testing.assert_close(other_proposals.logits[valid], proposals.logits[valid], atol=1e-6, rtol=0)
    torch.testing.assert_close(other_proposals.boxes[valid], proposals.boxes[valid], atol=1e-6, rtol=0)
    assert list(outputs) == ["aux_0", "aux_1", "aux_2", "main"]
    for head, output in outputs.items():
        assert torch.isfinite(output.logits).all()
        torch.testing.assert_close(other_outputs[head].logits[valid], output.logits[valid], atol=1e-6, rtol=0)
        torch.testing.assert_close(other_outputs[head].boxes[valid], output.boxes[valid], atol=1e-6, rtol=0)


def test_more_padding_does_not_matter(model: Asag) -> None:
    features = model.features(torch.randn(2, 3, 96, 128), IMAGE_SIZE)
    anchors = random_anchors(9)
    all_valid = torch.ones(2, 5).bool()
    _, few = predict(model, features, anchors[:, :5], all_valid)
    _, many = predict(model, features, anchors, torch.arange(9).expand(2, 9) < 5)
    for head, output in few.items():
        torch.testing.assert_close(many[head].logits[:, :5], output.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(many[head].boxes[:, :5], output.boxes, atol=1e-5, rtol=1e-5)


def test_valid_queries_see_each_other(model: Asag) -> None:
    features = model.features(torch.randn(2, 3, 96, 128), IMAGE_SIZE)
    anchors, valid = random_anchors(4), torch.ones(2, 4).bool()
    _, before = predict(model, features, anchors, valid)
    anchors[:, 3] = random_anchors(1)[:, 0]
    _, after = predict(model, features, anchors, valid)
    assert not torch.allclose(before["main"].logits[:, :3], after["main"].logits[:, :3], atol=1e-6)


def test_heads_are_different_decoders(model: Asag) -> None:
    features = model.features(torch.randn(2, 3, 96, 128), IMAGE_SIZE)
    _, outputs = predict(model, features, random_anchors(3), torch.ones(2, 3).bool())
    logits = [output.logits for output in outputs.values()]
    assert all(not torch.equal(logits[i], logits[j]) for i in range(4) for j in range(i))


def test_images_of_a_batch_do_not_see_each_other(model: Asag) -> None:
    images, anchors = torch.randn(2, 3, 96, 128), random_anchors(6)
    valid = torch.arange(6) < torch.tensor([[6], [2]])
    _, outputs = predict(model, model.features(images, IMAGE_SIZE), anchors, valid)
    images[1], anchors[1] = torch.randn(3, 96, 128), random_anchors(6)[1]
    _, changed = predict(model, model.features(images, IMAGE_SIZE), anchors, valid)
    torch.testing.assert_close(changed["main"].logits[0], outputs["main"].logits[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(changed["main"].boxes[0], outputs["main"].boxes[0], atol=1e-5, rtol=1e-5)


def test_unknown_head(model: Asag) -> None:
    assert [model.head_index(name) for name in model.config.head_names] == [0, 1, 2, 3]
    with pytest.raises(
        ConfigError, match=r"no decoder head 'aux_3' .* its heads are aux_0, aux_1, aux_2, main"
    ):
        model.head_index("aux_3")


def test_build_takes_the_weights_it_is_given() -> None:
    config = small_config(heads=1)
    state = {name: tensor + 0.25 for name, tensor in Asag(config).state_dict().items()}
    model = build(config, state)
    assert not model.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(RuntimeError, match=r"decoder\.decoder_embedding\.weight"):
        build(config, {name: t for name, t in state.items() if name != "decoder.decoder_embedding.weight"})


@pytest.mark.parametrize(("depth", "blocks"), [(50, (3, 4, 6, 3)), (101, (3, 4, 23, 3))])
def test_resnet(depth: int, blocks: tuple[int, ...]) -> None:
    body = ResNet(depth, width=4)
    found = tuple(len(list(body.get_submodule(f"layer{i + 1}").children())) for i in range(4))
    assert found == blocks
    with torch.no_grad():
        shapes = [tuple(feature.shape) for feature in body(torch.randn(1, 3, 65, 96))]
    assert shapes == [(1, 16, 17, 24), (1, 32, 9, 12), (1, 64, 5, 6), (1, 128, 3, 3)]


@pytest.mark.parametrize("variant", [LIGHT, "asag-a-lite-m"])
def test_light_networks_have_no_p2(variant: str) -> None:
    model = build(small_config(variant, heads=1))
    with torch.no_grad():
        features = model.features(torch.randn(1, 3, 97, 64), torch.tensor([[97, 64]]))
    shapes = [(1, 13, 8, 32), (1, 7, 4, 32), (1, 4, 2, 32), (1, 2, 1, 32)]
    assert [tuple(feature.shape) for feature in features] == shapes
    assert torch.equal(features[3], features[2][:, ::2, ::2])
    assert map_of("P5", features, model.config) is features[2]
    assert pyramid_strides(model.config) == (8, 16, 32, 64)
    # An anchor is read from the map of its size, whatever the finest map is: 448 pixels from P5.
    anchors = torch.tensor([[[32.0, 48.0, 448.0, 448.0]]])
    all_valid = torch.ones(1, 1).bool()
    before = model.relate(features, anchors, all_valid, IMAGE_SIZE[:1])[0].content
    for i, matters in enumerate((False, False, True, False)):
        changed = [*features]
        changed[i] = features[i] + torch.randn_like(features[i])
        after = model.relate(changed, anchors, all_valid, IMAGE_SIZE[:1])[0].content
        assert torch.equal(after, before) != matters


def test_an_encoder_makes_the_maps_of_asag_d() -> None:
    model = build(small_config("asag-d-r101-300", heads=1, encoder_layers=6))
    assert model.encoder is not None
    assert len(model.encoder.layers) == 6
    assert pyramid_strides(model.config) == (8, 16, 32, 64)
    image, size = torch.randn(1, 3, 96, 128), torch.tensor([[96, 128]])
    with torch.no_grad():
        features = model.features(image, size)
        shapes = [(1, 12, 16, 32), (1, 6, 8, 32), (1, 3, 4, 32), (1, 2, 2, 32)]
        assert [tuple(feature.shape) for feature in features] == shapes
        # Every cell is of all maps, near and far, and of what is image.
        image[..., 64:] = 0
        other = model.features(image, size)
        narrower = model.features(image, torch.tensor([[96, 64]]))
    assert all(not torch.allclose(a, b, atol=1e-4) for a, b in zip(features, other, strict=True))
    assert not torch.allclose(other[0][:, :, :8], narrower[0][:, :, :8], atol=1e-4)


def test_boxes_of_asag_d_are_measured_as_those_of_the_others() -> None:
    """Positions are embedded in cells of P2, though there is no such map."""
    anchors, valid = torch.tensor([[[64.0, 48.0, 32.0, 16.0]]]), torch.ones(1, 1).bool()
    found = []
    for variant in DECODERS:
        model = build(small_config(variant, heads=1))
        with torch.no_grad():
            features = model.features(torch.randn(1, 3, 96, 128), IMAGE_SIZE[:1])
            found.append(model.relate(features, anchors, valid, IMAGE_SIZE[:1])[0])
    for proposals in found:  # which start where the anchors are
        torch.testing.assert_close(proposals.xyzr, torch.tensor([[[16.0, 12.0, 2.5, -0.5]]]))
        torch.testing.assert_close(proposals.boxes, torch.tensor([[[0.5, 0.5, 0.25, 1 / 6]]]))


def test_network_over_resnet_101() -> None:
    model = build(small_config("asag-s-r101-300", heads=1))
    with torch.no_grad():
        features = model.features(torch.randn(1, 3, 97, 64), torch.tensor([[97, 64]]))
    shapes = [tuple(feature.shape) for feature in features]
    assert shapes == [(1, 25, 16, 32), (1, 13, 8, 32), (1, 7, 4, 32), (1, 4, 2, 32)]


def test_frozen_batch_norm_is_batch_norm_in_evaluation() -> None:
    frozen, norm = FrozenBatchNorm2d(6), nn.BatchNorm2d(6).eval()
    state = {"weight": torch.randn(6), "bias": torch.randn(6)}
    state |= {"running_mean": torch.randn(6), "running_var": torch.rand(6) + 0.1}
    frozen.load_state_dict(state)
    norm.load_state_dict({**state, "num_batches_tracked": torch.tensor(0)})
    x = torch.randn(2, 6, 5, 4)
    torch.testing.assert_close(frozen.train()(x), norm(x), atol=1e-5, rtol=1e-5)
    assert torch.equal(frozen.running_mean, state["running_mean"])


def test_batch_norm_that_learns_is_batch_norm() -> None:
    ours, norm = FrozenBatchNorm2d(6), nn.BatchNorm2d(6)
    ours.learns_statistics = True
    for _ in range(3):
        x = torch.randn(4, 6, 5, 4) * 3 + 1
        torch.testing.assert_close(ours(x), norm(x), atol=1e-5, rtol=1e-5)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(ours, name), getattr(norm, name))
    torch.testing.assert_close(ours.eval()(x), norm.eval()(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "make", [lambda: ResNet(26, width=4), lambda: MobileNet("small", 8), lambda: MobileNet("medium", 8)]
)
def test_training_folds_fixed_statistics_into_the_convolutions(make: Callable[[], Body]) -> None:
    torch.manual_seed(0)  # of so few channels all may be dead by chance, and have no gradient
    body = make()
    with torch.no_grad():
        for module in body.modules():
            if isinstance(module, FrozenBatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean):
                    tensor.normal_()
                module.running_var.uniform_(0.5, 2)
    image = torch.randn(2, 3, 33, 64)
    for folded, plain in zip(body.train()(image), body.eval()(image), strict=True):
        torch.testing.assert_close(folded, plain, atol=1e-4 * float(plain.detach().abs().max()), rtol=1e-4)
    sum(feature.sum() for feature in body.train()(image)).backward()
    norms = [module for module in body.modules() if isinstance(module, FrozenBatchNorm2d)]
    assert all(norm.weight.grad is not None and norm.weight.grad.any() for norm in norms)


def test_stem_and_first_layer_can_be_frozen() -> None:
    body = ResNet(50, width=4)
    body.freeze_stem()
    trained = {name.split(".")[0] for name, p in body.named_parameters() if p.requires_grad}
    frozen = {name.split(".")[0] for name, p in body.named_parameters() if not p.requires_grad}
    assert trained == {"layer2", "layer3", "layer4"}
    assert frozen == {"conv1", "bn1", "layer1"}


@pytest.mark.parametrize("variant", DECODERS)
def test_activation_setting(variant: str) -> None:
    kinds: dict[Activation, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}
    state = Asag(small_config(variant, heads=1)).state_dict()
    features = [torch.randn(2, 24 >> i, 32 >> i, 32) for i in range(4)]
    anchors, valid = random_anchors(4), torch.ones(2, 4).bool()
    outputs = []
    for name, kind in kinds.items():
        model = build(small_config(variant, heads=1, activation=name), state)
        parts = (model.anchor_generator, model.rpn, model.decoder)
        used = {type(module) for part in parts for module in part.modules()} & set(kinds.values())
        # Deformable DETR's own layers have ReLU whatever the rest has.
        assert used == ({kind, nn.ReLU} if model.encoder is not None else {kind})
        with torch.no_grad():
            raw = model.anchor_generator.first_level(features[-1], IMAGE_SIZE).raw
            outputs.append((raw, predict(model, features, anchors, valid)[1]["main"].logits))
    assert all(not torch.allclose(*pair) for pair in zip(outputs[0], outputs[1], strict=True))
    assert all(not torch.allclose(*pair) for pair in zip(outputs[0], outputs[2], strict=True))
