"""What is to hold of a network on a GPU, real or simulated: each function fails with an AssertionError.

The network is the demo's, in PyTorch behind the interface of engines
(`asag_bench.runners.torch_cuda`), on scenes that stop at every level.  Nothing here imports more
than a bare GPU machine has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import asag_export
from asag_bench.runners.torch_cuda_graphs import SameShapes
from asag_deploy.backends.hooked_network import HookedNetwork
from asag_deploy.backends.network import Network
from asag_deploy.backends.tensorrt.backend import EngineNetwork
from asag_deploy.bundle.manifest import GraphSpec, Level, Manifest, Precision, Preprocessing, Probing
from asag_deploy.cuda import Device
from asag_deploy.cuda.graph import Node, nodes
from asag_deploy.detections import Detections
from asag_deploy.detector import Detector
from asag_deploy.loop.loop import HostLoop, Loop
from asag_deploy.loop.probing import detect
from asag_deploy.loop.stopping import StopRule
from asag_deploy.processing.on_host import OnHost
from asag_deploy.processing.postprocess import Found as Detected
from asag_evaluation.data.scenes import Kind, draw
from asag_export.gate.parity import LEAST_IN_COMMON, Found, in_common
from asag_export.stage_export import stage_inputs, stage_outputs
from asag_training.checkpoints import Checkpoint, load_checkpoint
from asag_training.network.model import build
from asag_training.network.stage_plan import build_stages, postprocessing_plan, probing_plan
from asag_training.network.stages import TorchNetwork
from support.detection_samples import assert_same

Picture = NDArray[np.uint8]

SIDE = 320
"""Of the scenes, as the network was trained."""
LEVELS: tuple[Level, ...] = ("P5", "P4", "P3")
RULES = {
    "exact": StopRule(),
    "fast": StopRule(min_selected=3, max_patches=15),
    "to P4": StopRule(max_level="P4"),
}
SEED = 7


@cache
def demo_checkpoint() -> Checkpoint:
    return load_checkpoint(Path(asag_export.__file__).with_name("asag-a-scenes.safetensors"))


@cache
def demo_probing() -> Probing:
    return probing_plan(demo_checkpoint().config)


def manifest_of(
    checkpoint: Checkpoint, precision: Precision = "fp32", preprocessing: Preprocessing | None = None
) -> Manifest:
    """What a bundle of the checkpoint would say of itself; there are no graphs behind it."""
    probing = probing_plan(checkpoint.config)
    modules = build_stages(build(checkpoint.config, checkpoint.state), probing)
    given = (checkpoint.config, probing, precision)
    return Manifest(
        producer="tests",
        variant=checkpoint.config.variant,
        head="main",
        precision=precision,
        opset=20,
        trained=checkpoint.trained,
        categories=tuple(checkpoint.categories),
        preprocessing=preprocessing or checkpoint.preprocessing or Preprocessing(),
        probing=probing,
        postprocessing=postprocessing_plan(checkpoint.config),
        graphs=tuple(
            GraphSpec(
                name=module.name,
                file=f"{module.name}.onnx",
                sha256="",
                inputs=stage_inputs(module, *given),
                outputs=stage_outputs(module, *given),
            )
            for module in modules
        ),
    )


def on_the_cpu(manifest: Manifest) -> TorchNetwork:
    """The demo's network as PyTorch runs it here, in float32."""
    model = build(demo_checkpoint().config, demo_checkpoint().state)
    return TorchNetwork(build_stages(model, manifest.probing, "main", manifest.preprocessing))


HOST = HostLoop()


def detector_of(
    network: Network, manifest: Manifest, loop: Loop = HOST, rule: StopRule = RULES["exact"]
) -> Detector:
    return Detector(manifest, network, rule, loop=loop)


def scenes() -> Iterator[Picture]:
    """Scenes of 320 x 320 without end: of large objects, where probing stops early, and with tiny ones."""
    kinds: tuple[Kind, ...] = ("large", "mixed", "large", "large", "tiny")
    number = 0
    while True:
        image = draw(SIDE, SIDE, SEED, number, (kinds[number % len(kinds)],)).image
        for turns in range(4):  # the same objects elsewhere: another picture, without drawing one
            turned = np.rot90(image, turns)
            yield np.ascontiguousarray(turned)
            yield np.ascontiguousarray(turned[:, ::-1])
        number += 1


def pictures_of_every_level(network: Network, manifest: Manifest, each: int) -> dict[Level, list[Picture]]:
    """So many pictures that stop at each level by themselves, as the host's loop decides."""
    detector = detector_of(SameShapes(network, manifest.probing, RULES["exact"]), manifest)
    found: dict[Level, list[Picture]] = {level: [] for level in LEVELS}
    for looked_at, picture in enumerate(scenes()):
        if all(len(pictures) >= each for pictures in found.values()):
            return found
        assert looked_at < 12 * each + 160, {level: len(pictures) for level, pictures in found.items()}
        level = detector(picture, channel_order="rgb").trace.exit_level
        if len(found[level]) < each:
            found[level].append(picture)
    raise AssertionError


def check_loops(
    network: EngineNetwork, manifest: Manifest, pictures: Mapping[Level, Sequence[Picture]]
) -> None:
    """The device's loop decides and detects as the host's: every picture, by every rule, and in a batch."""
    loop = network.loop("device")
    for rule in RULES.values():
        alike = SameShapes(network, manifest.probing, rule)
        host, device = (detector_of(alike, manifest, each, rule) for each in (HOST, loop))
        for level, of_level in pictures.items():
            for picture in of_level:
                expected = host(picture, channel_order="rgb")
                assert rule is not RULES["exact"] or expected.trace.exit_level == level
                assert_same([expected], [device(picture, channel_order="rgb")])
    mixed = [of_level[0] for of_level in pictures.values()]
    alike = SameShapes(network, manifest.probing, RULES["exact"])
    host, device = (detector_of(alike, manifest, each) for each in (HOST, loop))
    for _ in range(2):
        assert_same(host(mixed, channel_order="rgb"), device(mixed, channel_order="rgb"))


def check_threads(
    network: EngineNetwork, manifest: Manifest, pictures: Sequence[Picture], *, calls: int, threads: int
) -> None:
    """Calls from several threads give what one thread gets, whichever loop each of them uses."""
    alike = SameShapes(network, manifest.probing, RULES["exact"])
    loops = [network.loop("device"), HOST]
    detectors = [detector_of(alike, manifest, loop) for loop in loops]
    expected = [detectors[1](picture, channel_order="rgb") for picture in pictures]

    def once(number: int) -> tuple[int, Detections]:
        which = number % len(pictures)
        # A quarter by the host's loop, so that its captures happen among the launches of the other.
        return which, detectors[number % 4 == 3](pictures[which], channel_order="rgb")

    with ThreadPoolExecutor(threads) as pool:
        for which, found in pool.map(once, range(calls)):
            assert_same([expected[which]], [found])


def check_cpu_agrees(network: Network, manifest: Manifest, pictures: Sequence[Picture]) -> None:
    """In float32, PyTorch on the CPU finds nearly all the same."""
    on_cpu, here = (detector_of(n, manifest) for n in (on_the_cpu(manifest), network))
    shares = []
    for picture in pictures:
        one, other = (
            Found(scores=d.confidence, classes=d.class_id, boxes=d.xyxy)
            for d in (detector(picture, channel_order="rgb") for detector in (on_cpu, here))
        )
        shares.append(in_common(one, other))
    assert np.mean(shares) >= LEAST_IN_COMMON, shares


def check_processing(network: EngineNetwork, manifest: Manifest, pictures: Sequence[Picture]) -> None:
    """Pictures are prepared, and detections finished, to the bit as on the CPU; also pictures on the GPU."""
    on_gpu, here, cpu = network.processing(manifest), OnHost(network, manifest), on_the_cpu(manifest)
    on_cpu = OnHost(cpu, manifest)
    assert type(on_gpu) is not OnHost
    for picture in pictures:
        expected = on_cpu.prepare([picture], "bgr")
        for given in (picture, network.upload(picture)):
            prepared = on_gpu.prepare([given], "bgr")
            np.testing.assert_array_equal(prepared.sizes, expected.sizes)
            np.testing.assert_array_equal(network.download(prepared.image), cpu.download(expected.image))
        probed = detect(network, manifest.probing, StopRule(), prepared.image, prepared.sizes)
        one, other = (side.begin_decode(probed.outputs, prepared.shapes)() for side in (here, on_gpu))
        np.testing.assert_array_equal(one.anchors, other.anchors)
        for name in Detected._fields:
            for expected_one, found in zip(one.found, other.found, strict=True):
                np.testing.assert_array_equal(getattr(expected_one, name), getattr(found, name), err_msg=name)


def check_memory(
    network: EngineNetwork, manifest: Manifest, pictures: Sequence[Picture], rounds: int
) -> None:
    """After the first calls of their kind nothing more is allocated, on the GPU or pinned."""
    detectors = [detector_of(network, manifest, loop) for loop in (HOST, network.loop("device"))]

    def once() -> tuple[int, int]:
        for picture in pictures:
            for detector in detectors:
                detector(picture, channel_order="rgb")
        return network.device.allocated, len(network.device._pinned._all)

    for _ in range(4):
        allocated, pinned = once()
    for _ in range(rounds):
        now = once()
        assert now[0] == allocated
        assert now[1] <= pinned + 2, "a GPU that lags behind may need a slot more, but not one a round"


def check_pinned(network: EngineNetwork, rounds: int = 50) -> None:
    """What was uploaded stays what it was, though the array is written again; slots are used again."""
    array, uploaded = np.empty((300, 1000), dtype=np.int64), []
    for number in range(rounds):
        array[:] = number
        uploaded.append(network.upload(array))
    for number, there in enumerate(uploaded):
        assert (network.download(there) == number).all(), number
    slots = len(network.device._pinned._all)
    for number in range(rounds):
        array[:] = number
        network.download(network.upload(array))
    assert len(network.device._pinned._all) == slots


def check_captures(network: EngineNetwork, manifest: Manifest, picture: Picture) -> None:
    """What a stage does is kernels, copies on the device and cleared memory, nothing of the host's."""
    calls: list[tuple[str, dict[str, Any]]] = []
    noting = HookedNetwork(network, before=lambda name, inputs: calls.append((name, dict(inputs))))
    prepared = network.processing(manifest).prepare([picture], "rgb")
    detect(noting, manifest.probing, StopRule(), prepared.image, prepared.sizes)
    assert [name for name, _ in calls] == ["backbone", "probe_p4", "probe_p3", "decoder"]
    for name, inputs in calls:
        found = _captured(network.device, network.stage(name), inputs)
        assert found
        assert {node.kind for node in found} <= {"Kernel", "Memcpy", "Memset", "Empty"}, name
        assert not any(node.source_on_host or node.target_on_host for node in found), name


def _captured(device: Device, stage: Any, inputs: Mapping[str, Any]) -> list[Node]:
    """What a run of the stage is as a graph."""
    with device.lock:
        context = stage.open_context(inputs)
        arrays = [inputs[tensor.name] for tensor in stage.inputs]
        outputs = [
            device.empty(shape, tensor.dtype)
            for tensor, shape in zip(stage.outputs, context.output_shapes, strict=True)
        ]
        addresses = tuple(array.pointer for array in (*arrays, *outputs))
        context.enqueue(addresses)
        device.synchronize()
        graph = device.capture(lambda stream: context.enqueue(addresses, stream))
        found = list(nodes(device.cuda, graph))
        device.cuda.destroy_graph(graph)
        context.close()
    return found
