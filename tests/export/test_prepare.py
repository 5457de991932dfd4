"""What a network goes through before it is exported."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from asag_export.stage_export import prepare_for_export
from asag_training.network.body import FrozenBatchNorm2d
from asag_training.network.model import Asag, build
from asag_training.network.stage_plan import build_stages, probing_plan
from asag_training.network.stages import TorchNetwork, feature_maps
from support.small_network import small_checkpoint

IMAGE_SIZE = torch.tensor([[128, 160], [100, 90]])


@pytest.fixture(
    params=["asag-a-r50-100", "asag-s-r50-100", "asag-d-r50-100", "asag-a-lite-s", "asag-a-lite-m"]
)
def model(request: pytest.FixtureRequest) -> Asag:
    """A network whose BatchNorms do something."""
    checkpoint = small_checkpoint(request.param, heads=1)
    network = build(checkpoint.config, checkpoint.state)
    for module in network.modules():
        if isinstance(module, FrozenBatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(std=0.2)
    return network


def run(model: Asag) -> dict[str, Tensor]:
    """The outputs of every stage, as `stage.output`, with nothing left to the network's decisions."""
    probing = probing_plan(model.config, "p4-p6")
    network = TorchNetwork(build_stages(model, probing))
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, 128, 160, generator=generator)
    found = {"backbone": network.stage("backbone")({"image": image, "image_size": IMAGE_SIZE})}
    features = found["backbone"]
    found["probe_p4"] = network.stage("probe_p4")(
        {
            "feature": features["p4"],
            "feature_size": torch.tensor(features["p4"].shape[1:3]),
            "image_size": IMAGE_SIZE,
            "patches": torch.zeros(2, probing.levels[0].capacity, 2).long(),
            "patch_count": torch.tensor([1, 1]),
            "slots": torch.arange(1),
        }
    )
    anchors = torch.rand(2, 250, 5, generator=generator) * torch.tensor([160, 128, 60, 60, 0.2])
    found["decoder"] = network.stage("decoder")(
        {
            **features,
            "anchors_p5": anchors,
            "selected_p5": torch.zeros(2, 250).bool(),
            "anchors_p4": torch.zeros(2, 20, 5),
            "probed": torch.zeros(2, 1).bool(),
            "image_size": IMAGE_SIZE,
            "query_slots": torch.arange(150),
        }
    )
    return {f"{stage}.{name}": tensor for stage, out in found.items() for name, tensor in out.items()}


FLOATS = (
    *(
        "backbone.anchors",
        "probe_p4.anchors",
        "decoder.logits",
        "decoder.boxes",
        "decoder.anchors",
        "decoder.det_scores",
    ),
)


def test_folding_changes_nothing(model: Asag) -> None:
    prepared = prepare_for_export(model, "fp32")
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in prepared.modules())
    expected, actual = run(model), run(prepared)
    maps = tuple(f"backbone.{name}" for name in feature_maps(model.config))
    for name in (*maps, *FLOATS):
        bound = 1e-5 * float(expected[name].abs().max())
        torch.testing.assert_close(actual[name], expected[name], atol=bound, rtol=1e-4, msg=name)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_original_is_left_as_it_is(model: Asag, precision: str) -> None:
    model.train()
    model.neck.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    gradients = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    prepared = prepare_for_export(model, precision)  # type: ignore[arg-type]
    assert not prepared.training
    assert not any(parameter.requires_grad for parameter in prepared.parameters())
    for parameter in prepared.parameters():
        parameter.zero_()
    assert model.training
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert gradients == {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def test_half_precision_is_of_weights_and_features_only(model: Asag) -> None:
    prepared = prepare_for_export(model, "fp16")
    assert {parameter.dtype for parameter in prepared.parameters()} == {torch.float16}
    outputs, expected = run(prepared), run(model)
    half = {name for name, tensor in outputs.items() if tensor.dtype == torch.float16}
    assert half == {f"backbone.{name}" for name in feature_maps(model.config)}
    full = {name for name, tensor in outputs.items() if tensor.dtype == torch.float32}
    assert full == {*FLOATS, *(f"decoder.{n}" for n in ("det_boxes", "proposal_scores", "proposal_boxes"))}
    for name in ("decoder.logits", "backbone.p3"):
        bound = 2e-2 * float(expected[name].abs().max())
        torch.testing.assert_close(outputs[name].float(), expected[name], atol=bound, rtol=0, msg=name)
    # The same anchors went in, and coordinates have lost nothing on their way through.
    assert torch.equal(outputs["decoder.anchors"], expected["decoder.anchors"])
