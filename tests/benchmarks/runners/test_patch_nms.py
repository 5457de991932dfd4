"""Patch NMS in a graph, as the peer `unsplit` has it, against its reference in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from asag_bench.runners.patch_nms import patch_nms_model
from asag_deploy.bundle.manifest import ProbeLevel, Probing
from asag_export.choices import OPSETS
from asag_training.network.operators import patch_nms
from support import naive_operators as naive
from support.naive_operators import NmsSettings


def runner(settings: NmsSettings, opset: int = 20) -> Callable[..., list[NDArray[Any]]]:
    """Runs one session, whatever the shapes that come."""
    level = ProbeLevel(level="P4", stride=settings.stride, capacity=settings.capacity, anchors_per_patch=1)
    probing = Probing(
        mode="exact",
        patch_size=settings.patch_size,
        levels=(level,),
        max_candidates=settings.max_candidates,
        patch_nms_iou=settings.iou_threshold,
        anchor_floor=1,
        anchor_cap=1,
    )
    model = patch_nms_model(probing, level, opset)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]

    def run(*arrays: NDArray[Any]) -> list[NDArray[Any]]:
        return [np.asarray(out) for out in session.run(None, dict(zip(names, arrays, strict=True)))]

    return run


@pytest.mark.parametrize(
    "settings",
    naive.NMS_SETTINGS,
)
def test_finds_what_the_reference_finds(settings: NmsSettings) -> None:
    run = runner(settings)
    for name, anchors, selected, image_size in naive.nms_inputs(settings):
        tensors = (torch.from_numpy(anchors), torch.from_numpy(selected), torch.from_numpy(image_size))
        expected = patch_nms(*tensors, **settings._asdict())
        for actual, tensor in zip(run(anchors, selected, image_size), expected, strict=True):
            np.testing.assert_array_equal(actual, tensor.numpy(), err_msg=name)
            assert actual.dtype == np.int64


@pytest.mark.parametrize("opset", OPSETS)
def test_every_opset_is_enough(opset: int) -> None:
    settings = NmsSettings()
    inputs = list(naive.nms_inputs(settings))[3]
    given = (inputs.anchors, inputs.selected, inputs.image_size)
    np.testing.assert_array_equal(runner(settings, opset)(*given)[0], runner(settings)(*given)[0])
