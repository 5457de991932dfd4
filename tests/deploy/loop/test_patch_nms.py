"""Patch NMS on the host against a naive version of it."""

from __future__ import annotations

import numpy as np
import pytest

from asag_deploy.loop.patch_nms import patch_nms
from support import naive_operators as naive
from support.naive_operators import NmsSettings


@pytest.mark.parametrize(
    "settings",
    naive.NMS_SETTINGS,
)
def test_finds_what_the_naive_version_finds(settings: NmsSettings) -> None:
    for name, anchors, selected, image_size in naive.nms_inputs(settings):
        expected = naive.patch_nms(anchors, selected, image_size, settings)
        actual = patch_nms(anchors, selected, image_size, **settings._asdict())
        for one, other in zip(expected, actual, strict=True):
            np.testing.assert_array_equal(one, other, err_msg=name)
            assert other.dtype == np.int64


def test_an_anchor_without_a_score_is_no_candidate() -> None:
    settings = NmsSettings(capacity=4)
    anchors = np.array(
        [[[100, 100, 9, 9, np.nan], [300, 300, 9, 9, -0.5], [500, 500, 9, 9, 0.0]]], np.float32
    )
    selected, size = np.ones((1, 3), dtype=np.bool_), np.array([[800, 800]])
    origins, counts = patch_nms(anchors, selected, size, **settings._asdict())
    assert counts.tolist() == [1]
    assert origins[0, 0].tolist() == [23, 23]  # 500 / 16 - 7.5
    assert not origins[0, 1:].any()
