"""The model card: what it says, that model hubs can read it, and that nothing depends on it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import Category, Manifest
from asag_deploy.bundle.model_card import MODEL_CARD, model_card
from support.bundle_edits import replace_graph
from support.tiny_bundle import make_bundle, tiny_manifest

PARITY: dict[str, Any] = {
    "passed": True,
    "backend": "onnxruntime",
    "precision": "fp32",
    "stages": [
        {"stage": "probe_p4", "output": "anchors", "difference": 9.2e-5, "tolerance": 0.0064, "cases": 13}
        | {"passed": True}
    ],
    "checks": [{"name": "batch of one", "passed": True, "rows": []}],
    "runs": [{"case": "2x2", "same_stops": True, "agreement": 0.995, "passed": True}],
}
INT8: dict[str, Any] = {
    "activations": "uint8",
    "pictures": 32,
    "convolutions": 40,
    "products": 12,
    "signal_to_noise": {"p3": 24.25, "boxes": float("inf")},
    "least_signal_to_noise": 10.0,
    "accuracy": [{"backend": "openvino", "images": 50, "float32": 0.5, "int8": 0.499, "loss": 0.001}],
    "most_loss": 0.005,
}


def manifest_with(**changes: Any) -> Manifest:
    return dataclasses.replace(tiny_manifest(), **changes)


def front_matter(text: str) -> dict[str, Any]:
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub reads model cards")
    card = hub.ModelCard(text)
    found: dict[str, Any] = card.data.to_dict()
    return found


def test_model_hubs_read_it() -> None:
    found = front_matter(model_card(manifest_with(trained=True, variant="asag-a-r50-100")))
    assert found["library_name"] == "asag-deploy"
    assert found["pipeline_tag"] == "object-detection"
    assert found["tags"] == ["asag", "onnx", "adaptive-probing", "fp32"]
    assert found["model_name"] == "asag-a-r50-100"
    assert "license" not in found


@pytest.mark.parametrize("variant", ["a: b", "- x", "#", '"', "a\\b", "{}", "yes", "1e3", "@x", "Zürich"])
def test_any_variant_is_a_text_in_yaml(variant: str) -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML reads the front matter")
    lines = model_card(manifest_with(variant=variant)).split("---\n")[1]
    assert yaml.safe_load(lines)["model_name"] == variant
    assert front_matter(model_card(manifest_with(variant=variant)))["model_name"] == variant


def test_what_it_says() -> None:
    text = model_card(manifest_with(trained=True, parity=PARITY))
    assert "untrained" not in text
    assert "failed" not in text
    assert "| probe\\_p4 | anchors | 9.2e-05 | 0.0064 | 13 | holds |" in text
    assert "- batch of one: holds" in text
    assert "1 of 1 runs stop where PyTorch does, and at least 99.5% of the detections are the same" in text
    assert "asag-detect . photos/" in text
    assert "Install a wheel of asag-deploy, or" in text
    assert "pip install asag-deploy" not in text, "which no index has"


def test_classes_are_shown_as_they_are() -> None:
    categories = (Category(id=1, name="a|b *x* <i>"), Category(id=7, name="cat"), Category(id=9, name="cat"))
    text = model_card(manifest_with(categories=categories))
    assert "a\\|b \\*x\\* \\<i\\> (1), cat (id 7) (7), cat (id 9) (9)." in text


def test_untrained_and_failed_are_said_first() -> None:
    text = model_card(manifest_with(trained=False, parity={**PARITY, "passed": False}))
    assert text.index("untrained: its weights are random") < text.index("## Run it")
    assert text.index("failed its gate") < text.index("## Run it")
    assert front_matter(text)["tags"][-1] == "untrained"


def test_int8() -> None:
    parity = {"passed": True, "quantization": INT8, "float32": PARITY}
    text = model_card(manifest_with(precision="int8", parity=parity))
    assert "40 convolutions and 12 matrix products are in INT8" in text
    assert "| p3 | 24.2 |" in text
    assert "| openvino | 50 | 0.5000 | 0.4990 | 0.0010 |" in text
    assert "## Parity of the float32 bundle" in text
    assert "int8" in front_matter(text)["tags"]
    unmeasured = {"passed": True, "quantization": {**INT8, "accuracy": []}, "float32": {}}
    text = model_card(manifest_with(precision="int8", parity=unmeasured))
    assert "What it costs in AP was not measured." in text
    assert "## Parity" not in text


@pytest.mark.parametrize(
    "parity",
    [
        {},
        {"stages": 3, "runs": "x", "checks": [1]},
        {"quantization": [], "float32": 0},
        {"quantization": {}, "float32": {"stages": [{}]}},
        {"stages": [{"difference": "much"}], "runs": [{"agreement": None}], "checks": [{}]},
    ],
)
def test_a_report_of_another_kind(parity: dict[str, Any]) -> None:
    assert "## Limits" in model_card(manifest_with(parity=parity))


def test_lies_in_the_bundle_and_may_be_edited_or_missing(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    card = bundle.path / MODEL_CARD
    assert card.read_text(encoding="utf-8") == model_card(bundle.manifest)
    card.write_bytes(b"\xff not even a text")
    assert Bundle.open(bundle.path) == bundle
    card.unlink()
    assert Bundle.open(bundle.path) == bundle


def test_a_bundle_that_is_made_of_another_gets_its_own(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    (bundle.path / MODEL_CARD).unlink()
    copy = replace_graph(bundle, "decoder", bundle.graph_path("decoder").read_bytes(), tmp_path / "copy")
    assert (copy.path / MODEL_CARD).read_text(encoding="utf-8") == model_card(copy.manifest)
