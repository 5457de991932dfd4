"""What is timed of the bundles, backends and precisions that were named, and what cannot be."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from asag_bench.measuring.plan import Plan, bundles_on_backends, check_shape
from asag_bench.result import Options
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import Preprocessing
from asag_deploy.errors import ConfigError
from support.tiny_bundle import make_bundle


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("plan") / "first")


def like(bundle: Bundle, folder: str, **changes: Any) -> Bundle:
    """Another bundle of the same network, but for the changes."""
    return Bundle(path=Path(folder), manifest=dataclasses.replace(bundle.manifest, **changes))


def plan(*backends: str, precisions: tuple[str, ...] = ()) -> Plan:
    options = Options(backends=backends, precisions=precisions)
    return Plan(command="", bundles=(Path(),), options=options)


def names(asked: Plan, *bundles: Bundle) -> dict[str, str]:
    return {each.name: each.precision for each in bundles_on_backends(asked, bundles)}


def test_one_bundle_goes_by_its_backends(fp32: Bundle) -> None:
    found = names(plan("onnxruntime", "openvino-bf16"), fp32)
    assert found == {"onnxruntime": "fp32", "openvino-bf16": "bf16"}


def test_several_bundles_go_by_what_tells_them_apart(fp32: Bundle) -> None:
    half = like(fp32, "second", precision="fp16")
    both = {"onnxruntime fp32": "fp32", "onnxruntime fp16": "fp16"}
    assert names(plan("onnxruntime"), fp32, half) == both
    found = names(plan("onnxruntime"), fp32, like(fp32, "second"))
    assert list(found) == ["onnxruntime first", "onnxruntime second"]
    found = names(plan("onnxruntime"), fp32, like(fp32, "elsewhere/first"))
    assert list(found) == [f"onnxruntime {fp32.path}", "onnxruntime elsewhere/first"]


def test_precisions_choose_among_what_was_named(fp32: Bundle) -> None:
    half = like(fp32, "second", precision="fp16")
    found = names(plan("onnxruntime", "openvino-bf16", precisions=("fp16", "bf16")), fp32, half)
    assert found == {
        "openvino-bf16 fp32": "bf16",
        "onnxruntime fp16": "fp16",
        "openvino-bf16 fp16": "fp16",
    }
    found = names(plan("onnxruntime", precisions=("fp32", "bf16")), fp32)
    assert found == {"onnxruntime": "fp32", "openvino-bf16": "bf16"}
    with pytest.raises(ConfigError, match="--precision is 'int8', but what was given computes in fp32; name"):
        names(plan("onnxruntime", precisions=("int8",)), fp32)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"variant": "asag-s-r50-100"}, r"networks \(.*, head main and asag-s-r50-100, head main\)"),
        ({"categories": ()}, "classes"),
        ({"preprocessing": Preprocessing(shorter_side=320)}, "pre-processing"),
    ],
)
def test_bundles_of_different_networks(fp32: Bundle, changes: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=f"'.*first' and 'other' differ in their {what}"):
        bundles_on_backends(plan("onnxruntime"), [fp32, like(fp32, "other", **changes)])


def test_shapes_that_the_network_would_not_see() -> None:
    spec = Preprocessing()
    check_shape(None, spec)
    check_shape((800, 1088), spec)
    check_shape((1333, 800), spec)
    with pytest.raises(ConfigError, match="pictures of --shape 640x640 would be resized to 800x800"):
        check_shape((640, 640), spec)
    with pytest.raises(ConfigError, match="--shape 800x1600 would be resized to 666x1332"):
        check_shape((800, 1600), spec)
