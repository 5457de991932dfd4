"""Both loops over real engines on a GPU: every stop, alone and in a batch whose images stop elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from asag_deploy.backends import BACKENDS, open_network
from asag_deploy.backends.network import Network
from asag_deploy.backends.tensorrt.backend import EngineNetwork
from asag_deploy.backends.tensorrt.device_loop import DeviceLoop
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.bundle.manifest import Preprocessing
from asag_deploy.engines.build import BuildOptions
from asag_deploy.engines.sidecar import Format
from asag_deploy.kernels import LIBRARY_VARIABLE, cuda_library_path
from asag_deploy.loop.probing import Probed, detect
from asag_deploy.loop.stopping import FAST_MAX_PATCHES, FAST_MIN_SELECTED, StopRule
from asag_deploy.processing.canvases import Canvas
from asag_export.bundle_export import export_bundle
from asag_export.gate.gate import tolerance
from support.small_network import small_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

FORMATS: tuple[Format, ...] = ("tensorrt-rtx", "tensorrt")
RULES = {
    "fast": StopRule(min_selected=FAST_MIN_SELECTED, max_patches=FAST_MAX_PATCHES),
    "to P5": StopRule(max_level="P5"),
    "to P4": StopRule(max_level="P4"),
    "to P3": StopRule(max_level="P3"),
}
CANVAS = Canvas(256, 320)
SMALL_IMAGES = Preprocessing(shorter_side=160, longer_side=320)
CALLS = 3
"""The first captures, the others replay."""


@pytest.fixture(scope="module", params=FORMATS)
def bundle(request: pytest.FixtureRequest, shared_bundle: Callable[..., Bundle]) -> tuple[str, Bundle]:
    """A backend, and the small network with its engines for this GPU."""
    name: Format = request.param
    missing = BACKENDS[name].problem()
    if missing is not None:
        pytest.skip(str(missing))
    if cuda_library_path() is None:
        pytest.skip(f"needs the compiled kernels: {LIBRARY_VARIABLE} is not set")

    def export(path: Path) -> None:
        options = BuildOptions(engine_format=name, canvases=(CANVAS,))
        export_bundle(small_checkpoint(), path, engines=options, preprocessing=SMALL_IMAGES)

    return name, shared_bundle(f"gpu-{name}", export)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("rule", RULES)
def test_the_device_decides_as_the_host_does(bundle: tuple[str, Bundle], rule: str, images: int) -> None:
    backend, opened = bundle
    network = open_network(backend, opened)
    assert isinstance(network, EngineNetwork)
    reason = network.why_no_device_loop()
    if reason is not None:
        pytest.skip(reason)
    loop = network.loop("device")
    assert isinstance(loop, DeviceLoop)
    probing = opened.manifest.probing
    rng = np.random.default_rng(0)
    image = rng.normal(size=(1, 3, 8, 10)).astype(np.float32).repeat(32, axis=2).repeat(32, axis=3)
    batch = np.concatenate([image, np.zeros_like(image)])[:images]  # nothing is in the second
    sizes = np.array([[256, 320]] * images)
    uploaded = network.upload(batch)
    expected = detect(network, probing, RULES[rule], uploaded, sizes)
    for _ in range(CALLS):
        found = loop(network, probing, RULES[rule], uploaded, sizes)
        assert found.stop == expected.stop
        np.testing.assert_array_equal(found.probed, expected.probed)
        _assert_equal(network, opened, expected, found)
    # One image goes by the engines of its canvas, two by those that take every shape.
    assert [graph.fixed for graph in loop._graphs.values()] == [images == 1]


def _assert_equal(network: Network, bundle: Bundle, expected: Probed, found: Probed) -> None:
    """Counts are equal, and the decoder's outputs within what the gate allows."""
    counts = network.download(expected.outputs["anchor_count"])
    np.testing.assert_array_equal(network.download(found.outputs["anchor_count"]), counts)
    for name in ("logits", "boxes", "anchors"):
        one, other = (network.download(side.outputs[name]) for side in (expected, found))
        for i, count in enumerate(counts):
            allowed = tolerance(name, one[i, :count], bundle.manifest.precision)
            np.testing.assert_allclose(other[i, :count], one[i, :count], rtol=0, atol=allowed)
