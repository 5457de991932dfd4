"""What the backends call is what TensorRT-RTX, TensorRT 10 and TensorRT 11 have, by the recorded signatures.

The stand-in that the other tests run on is held to the same.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from asag_deploy.backends.tensorrt import stage as tensorrt_stage
from support.recorded_tensorrt import OLDEST, RECORDS, RTX, RecordedModule, file_of, parse
from support.simulated_gpu import fake_tensorrt

RTX_ALONE = {"create_runtime_config", "is_stream_capturable", "set_execution_context_allocation_strategy"}
NOT_IN_THE_OLDEST = {"set_device_memory", "get_device_memory_size_for_profile_v2"}
"""`device_memory` is set instead, and the size asked for without `_v2`."""

FAKES: tuple[type[Any], ...] = (
    fake_tensorrt.Runtime,
    fake_tensorrt.ICudaEngine,
    fake_tensorrt.IExecutionContext,
)


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("fake", FAKES, ids=lambda fake: fake.__name__)
def test_the_stand_in_has_only_what_is_there(fake: type[Any], record: str) -> None:
    members = RecordedModule(file_of(record), "recorded").record["classes"][fake.__name__]
    for name in _public(fake):
        if name not in members:
            assert name in NOT_IN_THE_OLDEST | RTX_ALONE, f"{fake.__name__}.{name}"
            continue
        lines, ours = members[name], getattr(fake, name)
        if lines is None:
            assert isinstance(ours, property), name
            continue
        arguments = list(inspect.signature(ours).parameters)
        assert arguments in [list(parse(line)[0].parameters) for line in lines], name


def test_what_the_oldest_lacks_has_another_way() -> None:
    classes = RecordedModule(file_of(OLDEST), "recorded").record["classes"]
    lacks = [("IExecutionContext", "set_device_memory", "device_memory")]
    size = "get_device_memory_size_for_profile"
    for cls, missing, instead in (*lacks, ("ICudaEngine", f"{size}_v2", size)):
        assert missing not in classes[cls]
        assert instead in classes[cls]


def test_how_rtx_compiles_at_run_time() -> None:
    """These are not recorded, so the library itself is asked."""
    real = pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX: pip install tensorrt-rtx")
    if real.__version__ not in RTX:
        pytest.skip(f"TensorRT-RTX {real.__version__} is installed, the tests know {RTX}")
    assert {"DISABLED"} <= set(real.CudaGraphStrategy.__members__)
    assert {"EAGER", "NONE"} <= set(real.DynamicShapesKernelSpecializationStrategy.__members__)
    assert {"USER_MANAGED"} <= set(real.ExecutionContextAllocationStrategy.__members__)
    ours = {name for name in dir(fake_tensorrt.IRuntimeConfig) if not name.startswith("_")}
    assert ours - {"cache", "strategy"} <= set(dir(real.IRuntimeConfig))
    assert {"serialize", "deserialize"} <= set(dir(real.IRuntimeCache))
    kinds = set(fake_tensorrt.DataType.__members__) - {"STRANGE"}
    assert kinds <= set(tensorrt_stage._TYPES) <= set(real.DataType.__members__)


def test_an_engine_that_is_none_is_refused_by_the_library_itself() -> None:
    """Without a GPU, too: by what it says, and not by a crash."""
    real = pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX: pip install tensorrt-rtx")
    from asag_deploy.engines.adapter import open_library

    library = open_library("tensorrt-rtx")
    library.messages.clear()
    runtime = real.Runtime(library.messages.logger)
    assert runtime.deserialize_cuda_engine(b"no engine at all") is None
    assert "bufferSize" in library.messages.first_error


def _public(fake: type[Any]) -> list[str]:
    return [name for name in vars(fake) if not name.startswith("_")]
