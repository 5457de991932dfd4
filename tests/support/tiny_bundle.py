"""A tiny but valid bundle that a test can steer by the colour of its images.

The stages obey the contract of `asag_deploy.loop.stages`, but compute everything from an image's top left
pixel, so images of one colour decide what happens (`picture` makes them):

red     anchors of the first level that ask for a closer look, 0 to `FIRST_ANCHORS`
green   anchors of P4 that do
blue    how many fewer patches than anchors there are on P4: so many anchors stand where the first one does

Images of 64 x 64 reach the network as they are; smaller and larger ones are resized to that shorter side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from asag_deploy.backends.network import Network
from asag_deploy.bundle.bundle import Bundle, write_bundle
from asag_deploy.bundle.manifest import (
    Category,
    Level,
    Manifest,
    Mode,
    Postprocessing,
    Preprocessing,
    ProbeLevel,
    Probing,
    TensorSpec,
)
from asag_deploy.loop.stages import LevelOutputs
from support.tiny_graphs import BOTH, CAPACITY, FIRST_ANCHORS, PATCH_ANCHORS, STRIDES, models

PATCH_SIZE = 2
ANCHOR_CAP = 24
MAX_DETECTIONS = 10
PATCH_NMS_IOU = 0.999
"""Patches are dropped that lie where another does."""
CLASSES = ("round", "square", "other")


def picture(
    red: int, green: int = 0, blue: int = 0, *, size: tuple[int, int] = (64, 64)
) -> NDArray[np.uint8]:
    """An RGB image of one colour; `size` is height and width."""
    return np.full((*size, 3), (red, green, blue), dtype=np.uint8)


def batch(*pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Pictures as the network's input: float32 (B, 3, H, W)."""
    return np.stack(pictures).transpose(0, 3, 1, 2).astype(np.float32)


def backbone(network: Network, image: NDArray[np.uint8]) -> dict[str, Any]:
    """What the first stage makes of a picture."""
    size = np.array([image.shape[:2]], dtype=np.int64)
    inputs = {"image": network.upload(batch(image)), "image_size": network.upload(size)}
    return network.stage("backbone")(inputs)


def probe_p4_inputs(network: Network, outputs: dict[str, Any], count: int = 2) -> dict[str, Any]:
    """What `probe_p4` takes after `backbone` has given `outputs` for one image of 64 x 64: `count`
    patches."""
    size = network.upload(np.array([[64, 64]]))
    probing = tiny_manifest().probing
    origins, _ = network.select(probing, probing.levels[0], LevelOutputs.of(outputs), size)
    return {
        "feature": outputs["p4"],
        "feature_size": network.upload(np.array(network.shape(outputs["p4"])[2:])),
        "image_size": size,
        "patches": origins,
        "patch_count": network.upload(np.array([count])),
        "slots": network.upload(np.arange(count)),
    }


def counts(network: Network, red: int) -> list[int]:
    """The four counts of the first stage, of a picture of that red; `patches` among them is still 0."""
    return [int(value) for value in network.download(backbone(network, picture(red))["counts"])[0]]


def make_bundle(
    path: Path,
    *,
    levels: tuple[Level, ...] = BOTH,
    mode: Mode = "exact",
    max_patches: int | None = None,
    nms_iou: float | None = None,
    longer_side: int = 128,
) -> Bundle:
    """Write the tiny bundle to `path` and open it."""
    with write_bundle(path) as writer:
        for name, model in models(levels).items():
            inputs, outputs = model.graph.input, model.graph.output
            writer.add_graph(
                name, model.SerializeToString(), inputs=specs_of(inputs), outputs=specs_of(outputs)
            )
        manifest = tiny_manifest(levels=levels, mode=mode, max_patches=max_patches, nms_iou=nms_iou)
        preprocessing = dataclasses.replace(manifest.preprocessing, longer_side=longer_side)
        writer.finish(dataclasses.replace(manifest, preprocessing=preprocessing))
    return Bundle.open(path)


def tiny_manifest(
    *,
    levels: tuple[Level, ...] = BOTH,
    mode: Mode = "exact",
    max_patches: int | None = None,
    nms_iou: float | None = None,
) -> Manifest:
    """The manifest of the tiny bundle, still without its graphs."""
    return Manifest(
        producer="tests",
        variant="tiny",
        head="main",
        precision="fp32",
        opset=18,
        trained=False,
        categories=tuple(Category(id=10 * i, name=name) for i, name in enumerate(CLASSES, start=1)),
        preprocessing=Preprocessing(shorter_side=64, longer_side=128, mean=(0, 0, 0), std=(1, 1, 1)),
        probing=Probing(
            mode=mode,
            patch_size=PATCH_SIZE,
            levels=tuple(
                ProbeLevel(
                    level=level,
                    stride=STRIDES[level],
                    capacity=CAPACITY[level],
                    anchors_per_patch=PATCH_ANCHORS,
                )
                for level in levels
            ),
            max_candidates=FIRST_ANCHORS,
            patch_nms_iou=PATCH_NMS_IOU,
            anchor_floor=5,
            anchor_cap=ANCHOR_CAP,
            cap_can_be_lowered=True,
            max_patches=max_patches,
        ),
        postprocessing=Postprocessing(max_detections=MAX_DETECTIONS, nms_iou=nms_iou),
        graphs=(),
    )


def specs_of(values: Sequence[onnx.ValueInfoProto]) -> list[TensorSpec]:
    """The inputs or outputs of a graph, as a manifest lists them."""
    return [
        TensorSpec(
            name=value.name,
            dtype=onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
            shape=tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim),
        )
        for value in values
    ]
