"""Networks around another one keep what it can do, and hooks see every call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asag_deploy.backends import open_network
from asag_deploy.backends.hooked_network import HookedNetwork, WrappedNetwork
from asag_deploy.backends.tensorrt.device_loop import DeviceLoop
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.detector import Detector
from asag_deploy.errors import ConfigError
from asag_deploy.loop.loop import HostLoop
from asag_deploy.loop.stages import Array
from asag_deploy.loop.stopping import StopRule
from asag_deploy.processing.canvases import Canvas
from asag_deploy.processing.on_gpu import OnGpu
from asag_deploy.processing.on_host import OnHost
from support.simulated_gpu.fake_gpu import write_engines
from support.simulated_gpu.fake_kernels import FakeKernels
from support.tiny_bundle import batch, make_bundle, picture

STAGES = ["backbone", "probe_p4", "probe_p3", "decoder"]
IMAGE = picture(5, 2)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    made = make_bundle(tmp_path_factory.mktemp("wrapped") / "bundle")
    write_engines(made)
    return made


class Counting(WrappedNetwork):
    """Counts what is downloaded."""

    downloads = 0

    def download(self, array: Array) -> Any:
        self.downloads += 1
        return super().download(array)


def test_the_host_is_the_default(bundle: Bundle) -> None:
    network = open_network(None, bundle)
    assert not network.takes_device_arrays
    assert list(network.canvases) == []
    assert isinstance(network.processing(bundle.manifest), OnHost)
    assert type(network.loop()) is HostLoop
    network.keep(network.upload(np.zeros(3)))
    network.close()
    network.close()


def test_the_processing_of_the_host_runs_over_the_wrapper(bundle: Bundle) -> None:
    wrapper = Counting(open_network(None, bundle))
    with Detector(bundle.manifest, wrapper, StopRule()) as detector:
        detector(IMAGE, channel_order="rgb")
    assert wrapper.downloads >= 3 + 5  # counts of three levels, and detections


def test_a_wrapper_keeps_what_a_gpu_can_do(kernels: FakeKernels, bundle: Bundle) -> None:
    network = open_network("tensorrt-rtx", bundle)
    wrapper = WrappedNetwork(WrappedNetwork(network))
    assert (wrapper.patch_bucket, wrapper.query_bucket) == (network.patch_bucket, network.query_bucket)
    assert wrapper.takes_device_arrays
    assert isinstance(wrapper.processing(bundle.manifest), OnGpu)
    assert wrapper.why_no_device_loop() is None
    assert isinstance(wrapper.loop("device"), DeviceLoop)
    assert wrapper.loop("device") is network.loop("device")
    with (
        Detector.load(bundle, backend="tensorrt-rtx") as loaded,
        Detector(bundle.manifest, wrapper, StopRule()) as wrapped,
    ):
        expected, found = loaded(IMAGE), wrapped(IMAGE)
        assert found.trace.to_dict() == expected.trace.to_dict()
        np.testing.assert_array_equal(found.xyxy, expected.xyxy)
        assert list(found.times_ms) == list(expected.times_ms)
        outputs = wrapped.forward_on_device(batch(IMAGE), np.array([[64, 64]]))
        assert outputs["logits"].__cuda_array_interface__["shape"][0] == 1
    wrapper.close()


def test_a_wrapper_pads_to_the_same_canvases(kernels: FakeKernels, tmp_path: Path) -> None:
    canvas = Canvas(64, 96)
    bundle = make_bundle(tmp_path / "bundle")
    write_engines(bundle, canvases=(canvas,))
    network = open_network("tensorrt-rtx", bundle)
    watched = HookedNetwork(network)
    on_host = OnHost(watched, bundle.manifest, canvases=watched.canvases)
    for wrapper in (WrappedNetwork(WrappedNetwork(network)), watched):
        assert list(wrapper.canvases) == [canvas]
        for processing in (wrapper.processing(bundle.manifest), on_host):
            assert wrapper.shape(processing.prepare([IMAGE], "rgb").image) == (1, 3, 64, 96)
    network.close()


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt-rtx"])
def test_hooks_see_every_stage(kernels: FakeKernels, bundle: Bundle, backend: str) -> None:
    """On a GPU the loop is then the host's, for that of the device would pass them over."""
    network = open_network(backend, bundle)
    seen: list[tuple[str, str]] = []

    def before(stage: str, inputs: Mapping[str, Array]) -> None:
        assert ("image" in inputs) == (stage == "backbone")
        seen.append(("before", stage))

    def after(stage: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        assert ("logits" in outputs) == (stage == "decoder")
        seen.append(("after", stage))

    hooked = HookedNetwork(network, before=before, after=after)
    with Detector.load(bundle) as plain, Detector(bundle.manifest, hooked, StopRule()) as detector:
        found, expected = detector(IMAGE, channel_order="rgb"), plain(IMAGE, channel_order="rgb")
    assert found.trace.to_dict() == expected.trace.to_dict()
    assert seen == [(when, stage) for stage in STAGES for when in ("before", "after")]
    with pytest.raises(ConfigError, match="'device' cannot be used here: the stages are watched one by one"):
        hooked.loop("device")


def test_a_hook_that_fails_stops_the_call(bundle: Bundle) -> None:
    def refuse(stage: str, inputs: Mapping[str, Array]) -> None:
        raise ZeroDivisionError(stage)

    hooked = HookedNetwork(open_network(None, bundle), before=refuse)
    with (
        Detector(bundle.manifest, hooked, StopRule()) as detector,
        pytest.raises(ZeroDivisionError, match="backbone"),
    ):
        detector(IMAGE)
