"""The operators' references against loops that say the same in another way."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from asag_training.network.config import Activation
from asag_training.network.operators import (
    MIXING_ACTIVATIONS,
    ROI_SIZE,
    adaptive_mixing,
    deformable_sample,
    multiscale_roi_align,
    pad_anchors,
    patch_nms,
    pyramid_sample,
)
from support import naive_operators as naive
from support.naive_operators import STRIDES, Bools, Floats, Ints, NmsSettings, PadSettings

SIZES = [(203, 317), (64, 96), (33, 500), (640, 480), (7, 5)]


def roi_align(features: list[Floats], boxes: Floats, strides: tuple[int, ...] = STRIDES) -> Floats:
    maps = [torch.from_numpy(feature) for feature in features]
    return multiscale_roi_align(maps, torch.from_numpy(boxes), strides).numpy()


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_roi_align(height: int, width: int) -> None:
    features, boxes = naive.pyramid(0, height, width), naive.roi_boxes(1, height, width)
    actual = roi_align(features, boxes)
    assert actual.shape == (2, boxes.shape[1], ROI_SIZE, ROI_SIZE, 5)
    # A sample's position is rounded to 2^-24 of itself, and the maps are as steep as maps can be.
    np.testing.assert_allclose(actual, naive.roi_align(features, boxes, STRIDES), atol=2e-4)


@pytest.mark.parametrize(
    ("width", "height", "stride"),
    [
        *((55, 55, 4), (56, 56, 4), (111, 111, 4), (112, 112, 8), (113, 113, 8), (223, 223, 8)),
        *((224, 224, 16), (225, 225, 16), (447, 447, 16), (448, 448, 32), (449, 449, 32)),
        *((900, 900, 32), (0.1, 0.1, 4), (56, 224, 8), (55, 224, 4), (896, 224, 32), (28, 448, 8)),
    ],
)
def test_level_of_a_box(width: float, height: float, stride: int) -> None:
    level = STRIDES.index(stride)
    features = [np.full((1, 8, 8, 1), i, dtype=np.float32) for i in range(4)]
    boxes = np.array([[[0, 0, width, height]]], dtype=np.float32)
    assert roi_align(features, boxes)[0, 0, 0, 0, 0] == pytest.approx(level)
    assert naive.roi_level(boxes[0, 0].astype(np.float64), STRIDES) == level


def test_levels_begin_at_the_finest_stride() -> None:
    strides = (8, 16, 32)
    features = naive.pyramid(0, 300, 400)[1:]
    boxes = naive.roi_boxes(2, 300, 400)
    expected = naive.roi_align(features, boxes, strides)
    np.testing.assert_allclose(roi_align(features, boxes, strides), expected, atol=2e-4)


@pytest.mark.parametrize("level", range(4))
def test_roi_align_is_that_of_onnx_runtime(level: int) -> None:
    height, width = 203, 317
    features, boxes = naive.pyramid(3, height, width), naive.roi_boxes(4, height, width)
    levels = np.array(
        [[naive.roi_level(box.astype(np.float64), STRIDES) for box in of_image] for of_image in boxes]
    )
    image, query = np.nonzero(levels == level)
    assert len(query) > 2
    expected = onnx_roi_align(features[level], boxes[image, query], image, STRIDES[level])
    actual = roi_align(features, boxes)[image, query]
    np.testing.assert_allclose(actual, expected.transpose(0, 2, 3, 1), atol=2e-4)


def onnx_roi_align(feature: Floats, boxes: Floats, image: Ints, stride: int) -> Floats:
    """The standard operator: feature (B, h, w, C), boxes (K, 4) of images (K,) -> (K, C, 7, 7)."""
    node = helper.make_node(
        "RoiAlign",
        ["feature", "boxes", "image"],
        ["out"],
        output_height=ROI_SIZE,
        output_width=ROI_SIZE,
        sampling_ratio=2,
        spatial_scale=1 / stride,
        coordinate_transformation_mode="output_half_pixel",
    )
    inputs = [
        helper.make_tensor_value_info("feature", TensorProto.FLOAT, ["b", "c", "h", "w"]),
        helper.make_tensor_value_info("boxes", TensorProto.FLOAT, ["k", 4]),
        helper.make_tensor_value_info("image", TensorProto.INT64, ["k"]),
    ]
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["k", "c", ROI_SIZE, ROI_SIZE])
    graph = helper.make_graph([node], "roi_align", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 16)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {"feature": feature.transpose(0, 3, 1, 2), "boxes": boxes, "image": image}
    (out,) = session.run(None, {name: np.ascontiguousarray(array) for name, array in feeds.items()})
    return np.asarray(out, dtype=np.float32)


def test_roi_align_of_no_boxes() -> None:
    features = naive.pyramid(0, 64, 96)
    assert roi_align(features, np.zeros((2, 0, 4), dtype=np.float32)).shape == (2, 0, 7, 7, 5)


def test_roi_align_has_gradients_to_the_features_it_touched() -> None:
    maps = [torch.from_numpy(m).requires_grad_() for m in naive.pyramid(0, 128, 128, batch=1)]
    out = multiscale_roi_align(maps, torch.tensor([[[10.0, 10.0, 60.0, 60.0]]]), STRIDES)
    gradient, *others = torch.autograd.grad(out.sum(), maps)
    assert not any(other.any() for other in others)
    # Every sample's weights sum to 1, and a bin is the mean of its samples.
    assert gradient.sum().item() == pytest.approx(49 * 5, rel=1e-5)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("groups", [1, 3])
def test_pyramid_sample(height: int, width: int, groups: int) -> None:
    features = naive.pyramid(5, height, width, channels=6)
    xy, weight = naive.sample_points(6, height, width, groups=groups)
    maps = [torch.from_numpy(feature) for feature in features]
    actual = pyramid_sample(maps, torch.from_numpy(xy), torch.from_numpy(weight), STRIDES)
    assert actual.shape == (2, 12, groups, 6, 6 // groups)
    np.testing.assert_allclose(actual, naive.pyramid_sample(features, xy, weight, STRIDES), atol=2e-4)


def test_pyramid_sample_has_gradients_to_points_weights_and_features() -> None:
    maps = [torch.from_numpy(m).requires_grad_() for m in naive.pyramid(0, 64, 64, batch=1, channels=4)]
    xy = torch.full((1, 1, 2, 3, 2), 30.3).requires_grad_()
    weight = torch.full((1, 1, 2, 3, 4), 0.25).requires_grad_()
    out = pyramid_sample(maps, xy, weight, STRIDES)
    gradients = torch.autograd.grad(out.square().sum(), [*maps, xy, weight])
    assert all(gradient.any() for gradient in gradients)


@pytest.mark.parametrize(("height", "width"), [*SIZES, (1, 1)])
@pytest.mark.parametrize("groups", [1, 3])
def test_deformable_sample(height: int, width: int, groups: int) -> None:
    features = naive.pyramid(7, height, width, channels=6)
    xy, weight = naive.deformable_points(8, features, groups=groups)
    maps = [torch.from_numpy(feature) for feature in features]
    actual = deformable_sample(maps, torch.from_numpy(xy), torch.from_numpy(weight))
    assert actual.shape == (2, 9, 6)
    np.testing.assert_allclose(actual, naive.deformable_sample(features, xy, weight), atol=2e-4)


def test_deformable_sample_has_gradients_to_points_weights_and_features() -> None:
    maps = [torch.from_numpy(m).requires_grad_() for m in naive.pyramid(0, 64, 64, batch=1, channels=4)]
    xy = torch.full((1, 1, 2, 4, 3, 2), 0.45).requires_grad_()
    weight = torch.full((1, 1, 2, 4, 3), 0.25).requires_grad_()
    out = deformable_sample(maps, xy, weight)
    gradients = torch.autograd.grad(out.square().sum(), [*maps, xy, weight])
    assert all(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("activation", MIXING_ACTIVATIONS)
@pytest.mark.parametrize("sizes", [(2, 3, 2, 5, 6, 7), (1, 2, 4, 16, 32, 32), (1, 1, 1, 1, 3, 1)])
def test_adaptive_mixing(activation: Activation, sizes: tuple[int, ...]) -> None:
    sampled, parameters, out_points = naive.mixing_inputs(0, *sizes)
    actual = adaptive_mixing(torch.from_numpy(sampled), torch.from_numpy(parameters), out_points, activation)
    expected = naive.adaptive_mixing(sampled, parameters, out_points, activation)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5)


def test_adaptive_mixing_has_gradients_to_samples_and_parameters() -> None:
    sampled, parameters, out_points = naive.mixing_inputs(1, 1, 2, 2, 4, 6, 5)
    samples, matrices = (torch.from_numpy(each).requires_grad_() for each in (sampled, parameters))
    out = adaptive_mixing(samples, matrices, out_points, "silu")
    gradients = torch.autograd.grad(out.square().sum(), (samples, matrices))
    assert all(gradient.any() for gradient in gradients)


def run_nms(
    anchors: Floats, selected: Bools, image_size: Ints, settings: NmsSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = (torch.from_numpy(anchors), torch.from_numpy(selected), torch.from_numpy(image_size))
    return patch_nms(*tensors, **settings._asdict())


@pytest.mark.parametrize("settings", naive.NMS_SETTINGS)
def test_patch_nms(settings: NmsSettings) -> None:
    for name, anchors, selected, image_size in naive.nms_inputs(settings):
        origins, counts = naive.patch_nms(anchors, selected, image_size, settings)
        actual_origins, actual_counts = run_nms(anchors, selected, image_size, settings)
        np.testing.assert_array_equal(actual_counts, counts, err_msg=name)
        np.testing.assert_array_equal(actual_origins, origins, err_msg=name)
        assert actual_origins.dtype == actual_counts.dtype == torch.int64


def test_the_nms_inputs_are_what_they_say() -> None:
    settings = NmsSettings()
    counts = {
        inputs.name: naive.patch_nms(*inputs[1:], settings)[1].tolist()
        for inputs in naive.nms_inputs(settings)
    }
    assert counts["one suppresses all"] == counts["all the same"] == counts["3 anchors, small images"]
    assert counts["one suppresses all"] == [1, 1]
    assert counts["40 anchors"] == [0, 0]
    assert max(counts["301 anchors"]) > settings.capacity
    assert counts["overlaps exactly on the threshold of 1/4"] == [12, 12]
    assert counts["a chain, each suppressing the next"] == [15, 15]
    assert counts["only one image of the batch"][0] == 0 < counts["only one image of the batch"][1]


def test_patches_stay_inside_the_image() -> None:
    settings = NmsSettings(capacity=200)
    for _, anchors, selected, image_size in naive.nms_inputs(settings):
        origins, _ = run_nms(anchors, selected, image_size, settings)
        cells = np.ceil(image_size[:, None, ::-1] / settings.stride)
        assert (origins.numpy() >= 0).all()
        assert (origins.numpy() <= np.maximum(cells - settings.patch_size, 0)).all()


PAD_SETTINGS = [PadSettings(), PadSettings(10, 10, 15), PadSettings(5, 1, 5), PadSettings(20, 7, 100)]


@pytest.mark.parametrize("settings", PAD_SETTINGS)
def test_pad_anchors(settings: PadSettings) -> None:
    for name, anchors, keep, image_size, slots in naive.pad_inputs(settings):
        queries, counts = naive.pad_anchors(anchors, keep, image_size, slots, settings)
        tensors = (torch.from_numpy(anchors), torch.from_numpy(keep), torch.from_numpy(image_size))
        actual_queries, actual_counts = pad_anchors(*tensors, torch.arange(slots), **settings._asdict())
        np.testing.assert_array_equal(actual_counts, counts, err_msg=name)
        np.testing.assert_array_equal(actual_queries, queries, err_msg=name)


def scored(scores: list[float]) -> torch.Tensor:
    """(1, N, 5): the anchor at position i is (i, i, 10, 10)."""
    return torch.tensor([[[i, i, 10, 10, score] for i, score in enumerate(scores)]], dtype=torch.float32)


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        # The first level is short of 2, so its best 2 pass, best first, and the others in place.
        ([0, 0, 0, 0, 1, 1], [2, 1, 4, 5]),
        ([1, 0, 0, 0, 1, 1], [2, 1, 4, 5]),
        # Enough of them, so those that pass stay where they are.
        ([1, 1, 0, 0, 1, 0], [0, 1, 4]),
        # More than 4 in all, so the best 4, best first.
        ([1, 1, 1, 0, 1, 1], [4, 2, 1, 5]),
    ],
)
def test_order_of_queries(keep: list[int], expected: list[int]) -> None:
    anchors = scored([0.1, 0.5, 0.6, 0.2, 0.9, 0.3])
    kept = torch.tensor([keep]).bool()
    queries, count = pad_anchors(anchors, kept, torch.tensor([[80, 60]]), torch.arange(6), 4, 2, 4)
    assert queries[0, : int(count), 0].tolist() == expected
    padding = queries[0, int(count) :].tolist()
    assert padding == [[30.0, 40.0, 60.0, 80.0]] * (6 - len(expected))


def test_fewer_anchors_than_slots() -> None:
    queries, count = pad_anchors(
        scored([0.9, 0.8]), torch.ones(1, 2).bool(), torch.tensor([[80, 60]]), torch.arange(9), 2, 1, 5
    )
    assert count.tolist() == [2]
    assert queries[0, :, 2].tolist() == [10, 10, *[60] * 7]


def test_what_is_compiled_is_not_taken_for_an_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch before 2.13 says of all that torch.compile traces that it is exported; so it says here."""
    settings = PadSettings()
    _, anchors, keep, image_size, slots = next(
        given for given in naive.pad_inputs(settings) if given.keep.any()
    )
    maps = [torch.from_numpy(each) for each in naive.pyramid(5, 64, 96, channels=6)]
    boxes = torch.from_numpy(naive.roi_boxes(1, 64, 96))
    xy, weight = (torch.from_numpy(each) for each in naive.sample_points(6, 64, 96, groups=3))
    deformed = [torch.from_numpy(each) for each in naive.deformable_points(6, naive.pyramid(5, 64, 96))]
    sampled, parameters, out_points = naive.mixing_inputs(0, 1, 2, 2, 4, 6, 5)
    mixed = (torch.from_numpy(sampled), torch.from_numpy(parameters), out_points)
    given = (torch.from_numpy(anchors), torch.from_numpy(keep), torch.from_numpy(image_size))

    def all_of_them(slots: torch.Tensor) -> tuple[torch.Tensor, ...]:
        padded = pad_anchors(*given, slots, **settings._asdict())
        return (
            multiscale_roi_align(maps, boxes, STRIDES),
            pyramid_sample(maps, xy, weight, STRIDES),
            deformable_sample(maps, *deformed),
            adaptive_mixing(*mixed, "gelu"),
            *padded,
        )

    expected = all_of_them(torch.arange(slots))
    compiled = torch.compile(all_of_them, backend="eager", fullgraph=True)  # and traced when it is called
    monkeypatch.setattr(torch.compiler, "_is_exporting_flag", True)
    found = compiled(torch.arange(slots))
    assert expected[-1].any()
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, equal_nan=True)
