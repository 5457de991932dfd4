"""The graph of the loop on the device, to be timed: as it is, and without conditional nodes.

They are for any network whose stages run on one `Device`: PyTorch's or engines.
"""

from __future__ import annotations

from collections.abc import Callable

from asag_deploy.backends.hooked_network import WrappedNetwork
from asag_deploy.backends.network import Network
from asag_deploy.backends.tensorrt.backend import EngineNetwork
from asag_deploy.backends.tensorrt.loop_graph import LoopGraph, Workspace
from asag_deploy.bundle.manifest import Probing
from asag_deploy.cuda import Device, DeviceArray
from asag_deploy.cuda.graph import Chain
from asag_deploy.engines.shapes import MOST_SLOTS, PATCH_BUCKET
from asag_deploy.errors import BackendError
from asag_deploy.kernels import add_decide
from asag_deploy.loop.probing import round_up, stage_name
from asag_deploy.loop.stopping import StopRule


class SameShapes(WrappedNetwork):
    """A network to which the host's loop gives the shapes that the graph of a rule is made for.

    Libraries choose their kernels by shapes, and kernels differ in rounding: only so do both loops compute
    the same to the bit, and never take a score that lies on a threshold for another.
    """

    def __init__(self, network: Network, probing: Probing, rule: StopRule) -> None:
        super().__init__(network)
        most = min(rule.max_patches or MOST_SLOTS, MOST_SLOTS)
        self.patch_bucket = round_up(most, PATCH_BUCKET, MOST_SLOTS)
        self.query_bucket = probing.anchor_cap


class AskingGraph(LoopGraph):
    """The graph that decides, launched on what it was last given."""

    def again(self) -> None:
        """Put the graph on the device's stream, and nothing else."""
        if self._graph is None:
            raise BackendError("the graph of the loop has been closed")
        self._device.cuda.launch(self._graph, self._device.stream)


class NeverAskingGraph(AskingGraph):
    """The same work without conditional nodes: `decide` runs, and then every level, whatever it said."""

    def _add_probe(self, chain: Chain, number: int) -> None:
        for following in range(number, len(self.levels)):
            chain.add_kernel(self._adder(following))
            self._add(chain, stage_name(self.levels[following]), following + 1)

    def _adder(self, number: int) -> Callable[[int, list[int]], int]:
        return lambda graph, before: add_decide(
            self._kernels,
            *self._decision(number),
            **self._settings(number),
            graph=graph,
            dependencies=before,
        )


def open_graph(
    kind: type[AskingGraph], network: EngineNetwork, probing: Probing, rule: StopRule, image: DeviceArray
) -> AskingGraph:
    """Open a graph of its own for images such as `image`; used under the device's lock, closed by the caller.

    Raises BackendError if it cannot be captured, or if the network has no kernels.
    """
    if network.kernels is None:
        raise BackendError("the loop on the device takes the compiled kernels")
    names = ("backbone", *map(stage_name, probing.levels), "decoder")
    stages = {name: network.stage(name) for name in names}
    workspace = Workspace(network.device)
    return kind(stages, network.device, network.kernels, workspace, probing, rule, image, fixed=False)


class Stopwatch:
    """Times between two events of the device's stream."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._start, self._end = (device.cuda.create_event(timing=True) for _ in range(2))

    def device_ms(self, work: Callable[[], object]) -> float:
        """Return the milliseconds that the device takes for what `work` puts on the stream; wait for it."""
        cuda, stream = self._device.cuda, self._device.stream
        with self._device.lock:
            cuda.synchronize(stream)
            cuda.record(self._start, stream)
            work()
            cuda.record(self._end, stream)
            cuda.wait_event(self._end)
        return cuda.elapsed_ms(self._start, self._end)

    def close(self) -> None:
        """Let go of the events."""
        for event in (self._start, self._end):
            self._device.cuda.destroy_event(event)
