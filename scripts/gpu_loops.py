"""The probing loop on the device against that of the host: the same results, and the time both take."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asag_deploy.backends import open_network
from asag_deploy.backends.device_loop import DeviceLoop
from asag_deploy.bundle import Bundle
from asag_deploy.errors import ParityError
from asag_deploy.manifest import Level
from asag_deploy.probing import FAST_MAX_PATCHES, FAST_MIN_SELECTED, Probed, StopRule, detect

OUTPUTS = ("logits", "boxes", "anchors")
WARM_UPS = 20


def compare_loops(
    bundle: Bundle, backend: str, image: Any, size: NDArray[np.int64], repeats: int
) -> dict[str, Any]:
    """Every stop, alone and beside an empty image; then the time of both loops, and of always probing.

    image: a normalised picture (1, 3, H, W) and its size (1, 2).  Raises ParityError if another level was
    probed, or if an output differs by more than the gate allows; BackendError if there is no loop on the
    device here.
    """
    network = open_network(backend, bundle)
    device = network.loop("device")
    probing = bundle.manifest.probing
    fast = StopRule(min_selected=FAST_MIN_SELECTED, max_patches=FAST_MAX_PATCHES)
    levels: list[Level] = ["P5", *(level.level for level in probing.levels)]
    rules = {"fast": fast, **{f"exact to {level}": StopRule(max_level=level) for level in levels}}
    batches = {"alone": (image, size), "beside an empty one": _beside_nothing(image, size)}
    differences = {}
    for rule_name, rule in rules.items():
        for batch_name, (images, sizes) in batches.items():
            uploaded = network.upload(images)
            host = detect(network, probing, rule, uploaded, sizes)
            for _ in range(2):  # the one that captures, and one that replays
                found = device(network, probing, rule, uploaded, sizes)
                where = f"{rule_name}, {batch_name}"
                differences[where] = _difference(network, bundle, where, host, found)
    runs: dict[str, Callable[[Any], Probed]] = {
        "host": lambda given: detect(network, probing, fast, given, size),
        "device": lambda given: device(network, probing, fast, given, size),
        "always probing": lambda given: detect(
            network, probing, StopRule(min_selected=0, max_patches=FAST_MAX_PATCHES), given, size
        ),
    }
    times = _time(network, network.upload(image), runs, repeats)
    told = ", ".join(f"{name} {taken['p50']:.2f} ms" for name, taken in times.items())
    redone = device.redone if isinstance(device, DeviceLoop) else 0
    return {"detail": told, "differences": differences, "total_ms": times, "detected_again": redone}


def _beside_nothing(image: Any, size: NDArray[np.int64]) -> tuple[Any, NDArray[np.int64]]:
    """A batch whose images are likely to stop at different levels."""
    return np.concatenate([image, np.zeros_like(image)]), np.concatenate([size, size])


def _difference(network: Any, bundle: Bundle, where: str, host: Probed, device: Probed) -> float:
    from asag_export.gate import tolerance

    counts = [network.download(side.outputs["anchor_count"]) for side in (host, device)]
    same = (
        np.array_equal(host.probed, device.probed)
        and host.stop == device.stop
        and [run.patches.tolist() for run in host.levels] == [run.patches.tolist() for run in device.levels]
        and np.array_equal(*counts)
    )
    if not same:
        raise ParityError(f"{where}: the loop on the device probed otherwise than the host's")
    worst = 0.0
    for name in OUTPUTS:
        expected, actual = (network.download(side.outputs[name]) for side in (host, device))
        for i, count in enumerate(counts[0]):
            apart = float(np.abs(expected[i, :count] - actual[i, :count]).max(initial=0))
            allowed = tolerance(name, expected[i, :count], bundle.manifest.precision)
            if not apart <= allowed:
                raise ParityError(
                    f"{where}: '{name}' of the loop on the device differs from the host's by {apart:.3g} "
                    f"where {allowed:.3g} is allowed; look at the layers of the decoder's engine"
                )
            worst = max(worst, apart)
    return worst


def _time(
    network: Any, image: Any, runs: dict[str, Callable[[Any], Probed]], repeats: int
) -> dict[str, dict[str, float]]:
    """Percentiles in milliseconds of calls in turn, each until its result has been read."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(WARM_UPS + repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            network.download(run(image).outputs["anchor_count"])
            if i >= WARM_UPS:
                taken[name].append((time.perf_counter() - start) * 1000)
    return {
        name: {f"p{part}": round(float(np.percentile(values, part)), 4) for part in (50, 90, 99)}
        for name, values in taken.items()
    }
