"""Where the next level looks, as the compiled kernel finds it: stage by stage, and in the loop's graph."""

from __future__ import annotations

from asag_deploy.backends.tensorrt.loop_memory import buffer
from asag_deploy.bundle.manifest import ProbeLevel, Probing
from asag_deploy.cuda import DeviceArray
from asag_deploy.kernels import KernelLibrary, patch_nms


def find_patches(
    kernels: KernelLibrary,
    probing: Probing,
    level: ProbeLevel,
    *,
    anchors: DeviceArray,
    selected: DeviceArray,
    image_size: DeviceArray,
    origins: DeviceArray,
    counts: DeviceArray,
    stream: int,
) -> None:
    """Put patch NMS for `level` on the stream: it writes `origins` and the column `patches` of `counts`.

    The arrays are those of `Network.select`.  Raises BackendError if it cannot be
    launched.
    """
    patch_nms(
        kernels,
        *(buffer(array) for array in (anchors, selected, image_size, origins, counts)),
        stride=level.stride,
        patch_size=probing.patch_size,
        iou_threshold=probing.patch_nms_iou,
        max_candidates=probing.max_candidates,
        stream=stream,
    )
