"""Optimisation profiles, from what a manifest says."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from asag_deploy.bundle.manifest import GraphSpec, Manifest, Preprocessing, TensorSpec
from asag_deploy.engines.shapes import Batches, InputRange, profile
from asag_deploy.errors import BundleCorruptError, ConfigError
from asag_deploy.processing.preprocess import resized_shape
from support.tiny_bundle import ANCHOR_CAP, tiny_manifest
from support.tiny_graphs import CAPACITY, PATCH_ANCHORS

BATCHES = Batches(usual=2, most=8)


def graph(name: str, **inputs: tuple[int | str, ...]) -> GraphSpec:
    specs = tuple(TensorSpec(name=key, dtype="float32", shape=shape) for key, shape in inputs.items())
    return GraphSpec(name=name, file=f"{name}.onnx", sha256="", inputs=specs, outputs=())


def manifest(shorter: int = 800, longer: int = 1333) -> Manifest:
    return dataclasses.replace(
        tiny_manifest(), preprocessing=Preprocessing(shorter_side=shorter, longer_side=longer)
    )


def ranges(spec: GraphSpec, of: Manifest) -> dict[str, InputRange]:
    return {range_.name: range_ for range_ in profile(spec, of, BATCHES)}


def test_image_sizes() -> None:
    (image,) = profile(graph("backbone", image=("batch", 3, "height", "width")), manifest(), BATCHES)
    assert image.least == (1, 3, 32, 32)
    assert image.usual == (2, 3, 800, 1088)
    assert image.most == (8, 3, 1344, 1344)
    assert image.holds((8, 3, 1344, 32))
    assert not image.holds((9, 3, 800, 1088))
    assert not image.holds((1, 3, 800, 1376))
    assert not image.holds((1, 3, 800))


def test_features_are_the_strides_of_the_image() -> None:
    spec = graph(
        "decoder", p2=("batch", "height_p2", "width_p2", 256), p5=("batch", "height_p5", "width_p5", 256)
    )
    found = ranges(spec, manifest())
    assert found["p2"].usual == (2, 200, 272, 256)
    assert found["p2"].most == (8, 336, 336, 256)
    assert found["p5"].least == (1, 1, 1, 256)
    assert found["p5"].usual == (2, 25, 34, 256)


def test_patches_and_queries() -> None:
    spec = graph(
        "decoder",
        anchors_p4=("batch", "anchors_p4", 5),
        anchors_p3=("batch", "anchors_p3", 5),
        query_slots=("queries",),
    )
    found = ranges(spec, manifest())
    # A level that was not probed is one patch of zeros.
    assert found["anchors_p4"].least == (1, PATCH_ANCHORS, 5)
    assert found["anchors_p4"].most == (8, PATCH_ANCHORS * CAPACITY["P4"], 5)
    assert found["anchors_p3"].most == (8, PATCH_ANCHORS * CAPACITY["P3"], 5)
    assert (found["query_slots"].least, found["query_slots"].most) == ((1,), (ANCHOR_CAP,))


def test_a_probe_has_the_cells_and_the_capacity_of_its_level() -> None:
    for name, stride, capacity in (("probe_p4", 16, CAPACITY["P4"]), ("probe_p3", 8, CAPACITY["P3"])):
        spec = graph(name, feature=("batch", "height_feature", "width_feature", 4), slots=("patches",))
        found = ranges(spec, manifest())
        assert found["feature"].usual == (2, 800 // stride, 1088 // stride, 4)
        assert (found["slots"].least, found["slots"].most) == ((1,), (capacity,))


def test_every_range_is_in_order_and_holds_its_ends() -> None:
    for shorter, longer in ((32, 32), (64, 128), (800, 1333), (1000, 1000)):
        spec = graph("backbone", image=("batch", 3, "height", "width"), p3=("height_p3", "width_p3"))
        for range_ in profile(spec, manifest(shorter, longer), BATCHES):
            assert all(range_.holds(shape) for shape in (range_.least, range_.usual, range_.most))


def test_every_image_of_an_ordinary_format_fits() -> None:
    spec = manifest()
    (image,) = profile(graph("backbone", image=("batch", 3, "height", "width")), spec, BATCHES)
    for height, width in itertools.product(range(50, 2500, 211), repeat=2):
        sides = (-(-side // 32) * 32 for side in resized_shape(height, width, spec.preprocessing))
        assert image.holds((1, 3, *sides)), (height, width)


def test_an_unknown_size_is_refused() -> None:
    with pytest.raises(BundleCorruptError, match=r"input 'x' of the graph 'decoder'.*'depth'.*asag-export"):
        profile(graph("decoder", x=("batch", "depth")), manifest(), BATCHES)


@pytest.mark.parametrize(("usual", "most"), [(0, 4), (5, 4), (1, 0)])
def test_batches_that_make_no_sense(usual: int, most: int) -> None:
    with pytest.raises(ConfigError, match="batches"):
        Batches(usual=usual, most=most)
