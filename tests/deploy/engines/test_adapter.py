"""The adapter against the recorded signatures of TensorRT-RTX, TensorRT 10 and TensorRT 11.

A recorded module accepts only names and arguments that the real one has, so these tests fail where the
adapter uses something that one of them lacks.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from asag_deploy.engines import adapter
from asag_deploy.engines.adapter import Library, open_library
from asag_deploy.engines.shapes import InputRange
from asag_deploy.errors import BackendError, ConfigError, EngineError
from support.engine_bundle import PLAIN
from support.record_tensorrt import record as describe
from support.recorded_tensorrt import (
    NEWEST,
    OLDEST,
    RECORDS,
    RTX,
    Recorded,
    RecordedModule,
    file_of,
)

INPUTS = (InputRange(name="x", dtype="float32", least=(1, 2), usual=(2, 2), most=(4, 2)),)
TENSORRTS = [record for record in RECORDS if "rtx" not in record]
Install = Callable[[str], RecordedModule]


def opened(install: Install, record: str) -> tuple[Library, RecordedModule]:
    module = install(record)
    return open_library("tensorrt-rtx" if "rtx" in record else "tensorrt"), module


def test_there_is_a_record_of_every_interface() -> None:
    majors = {record.rpartition("-")[2].split(".")[0] for record in TENSORRTS}
    assert majors == {"10", "11"}
    assert {RTX, OLDEST, NEWEST} <= set(RECORDS)


def test_the_record_is_that_of_the_installed_library() -> None:
    real = pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX: pip install tensorrt-rtx")
    if real.__version__ not in RTX:
        pytest.skip(f"TensorRT-RTX {real.__version__} is installed, the record is of {RTX}")
    assert describe(real) == json.loads(file_of(RTX).read_text())


@pytest.mark.parametrize("record", RECORDS)
def test_a_build_uses_nothing_that_is_not_there(install: Install, record: str) -> None:
    library, module = opened(install, record)
    assert library.compile(b"graph", "decoder", INPUTS, PLAIN) == b"serialized"
    (shape,) = module.called("IOptimizationProfile.set_shape")
    assert (shape["input"], shape["min"], shape["opt"], shape["max"]) == ("x", (1, 2), (2, 2), (4, 2))
    assert module.called("OnnxParser.parse")[0]["model"] == b"graph"
    assert [call["flag"].name for call in module.called("IBuilderConfig.clear_flag")] == ["TF32"]


@pytest.mark.parametrize("record", RECORDS)
def test_tf32_and_the_optimization_level_are_the_users_choice(install: Install, record: str) -> None:
    library, module = opened(install, record)
    options = dataclasses.replace(
        PLAIN,
        tf32=True,
        optimization_level=5,
    )
    library.compile(b"graph", "decoder", INPUTS, options)
    assert not module.called("IBuilderConfig.clear_flag")
    assert module.called("IBuilderConfig.builder_optimization_level =") == [{"value": 5}]


@pytest.mark.parametrize("record", RECORDS)
def test_networks_are_strongly_typed(install: Install, record: str) -> None:
    library, module = opened(install, record)
    library.compile(b"graph", "decoder", INPUTS, PLAIN)
    flags = module.called("Builder.create_network")[0]["flags"]
    asked_for = 1 << module.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    # TensorRT 11 and RTX know no other networks.
    assert flags == (asked_for if module.__version__.startswith("10.") else 0)


@pytest.mark.parametrize("record", RECORDS)
def test_what_is_captured_stays_on_its_stream_and_in_its_memory(install: Install, record: str) -> None:
    library, module = opened(install, record)
    assert library.user_allocation == ("rtx" in record)
    library.compile(
        b"graph", "decoder", INPUTS, dataclasses.replace(PLAIN, user_allocation=library.user_allocation)
    )
    assert module.called("IBuilderConfig.max_aux_streams =") == [{"value": 0}]
    flags = [call["flag"].name for call in module.called("IBuilderConfig.set_flag")]
    assert flags == (["REQUIRE_USER_ALLOCATION"] if "rtx" in record else [])


def test_rtx_is_told_the_compute_capabilities(install: Install) -> None:
    library, module = opened(install, RTX)
    assert library.capabilities == ("sm120", "sm121", "sm75", "sm80", "sm86", "sm89")
    options = dataclasses.replace(
        PLAIN,
        capabilities=("sm86", "sm120"),
    )
    library.compile(b"graph", "decoder", INPUTS, options)
    assert module.called("IBuilderConfig.num_compute_capabilities =") == [{"value": 2}]
    told = module.called("IBuilderConfig.set_compute_capability")
    assert [(call["compute_capability"].name, call["index"]) for call in told] == [("SM86", 0), ("SM120", 1)]


@pytest.mark.parametrize("record", TENSORRTS)
def test_tensorrt_builds_for_its_own_gpu_with_a_timing_cache(install: Install, record: str) -> None:
    library, module = opened(install, record)
    assert library.capabilities is None
    library.compile(b"graph", "decoder", INPUTS, PLAIN)
    assert library.timing_cache == b"serialized"
    library.compile(b"graph", "decoder", INPUTS, PLAIN)
    given = [call["serialized_timing_cache"] for call in module.called("IBuilderConfig.create_timing_cache")]
    assert given == [b"", b"serialized"]
    assert all(call["ignore_mismatch"] is True for call in module.called("IBuilderConfig.set_timing_cache"))


@pytest.mark.parametrize("record", TENSORRTS)
def test_engines_for_other_gpus_and_releases(install: Install, record: str) -> None:
    library, module = opened(install, record)
    options = dataclasses.replace(
        PLAIN,
        compatibility="ampere_plus",
        version_compatible=True,
    )
    library.compile(b"graph", "decoder", INPUTS, options)
    assert [call["flag"].name for call in module.called("IBuilderConfig.set_flag")] == ["VERSION_COMPATIBLE"]
    (level,) = module.called("IBuilderConfig.hardware_compatibility_level =")
    assert level["value"].name == "AMPERE_PLUS"


def test_a_compatibility_that_came_later_is_refused_by_name(install: Install) -> None:
    library, _ = opened(install, OLDEST)
    options = dataclasses.replace(
        PLAIN,
        compatibility="same_compute_capability",
    )
    with pytest.raises(ConfigError, match=r"TensorRT 10.0.1 knows no .*'same_compute_capability'"):
        library.compile(b"graph", "decoder", INPUTS, options)


@pytest.mark.parametrize("record", RECORDS)
def test_a_graph_that_cannot_be_read_is_named_with_its_node(install: Install, record: str) -> None:
    library, module = opened(install, record)
    module.answers |= {"OnnxParser.parse": False, "OnnxParser.num_errors": 1}
    module.answers |= {"ParserError.node_name": "node_7", "ParserError.node_operator": "NonZero"}
    module.answers["ParserError.desc"] = "Not supported.\n  In parse at ModelImporter.cpp:140"
    with pytest.raises(EngineError, match=r"'decoder' at the node 'node_7' \(NonZero\): Not supported$"):
        library.compile(b"graph", "decoder", INPUTS, PLAIN)


@pytest.mark.parametrize("record", RECORDS)
def test_a_graph_that_does_not_compile_is_named_with_the_reason(install: Install, record: str) -> None:
    library, module = opened(install, record)
    module.answers["Builder.build_serialized_network"] = None
    with pytest.raises(EngineError, match=r"'decoder' for sm86: it gave no reason$"):
        library.compile(b"graph", "decoder", INPUTS, PLAIN)


def test_a_capability_that_is_refused_after_all(install: Install) -> None:
    library, module = opened(install, RTX)
    module.answers["IBuilderConfig.set_compute_capability"] = False
    with pytest.raises(EngineError, match="refused to build for sm86: it gave no reason"):
        library.compile(b"graph", "decoder", INPUTS, PLAIN)


def test_the_reason_is_the_first_that_is_not_the_missing_gpu(install: Install) -> None:
    library, module = opened(install, RTX)
    logger = library._messages.logger

    class Failing(RecordedModule):
        def call(self, name: str, *args: Any) -> Any:
            if name == "Builder.build_serialized_network":
                for message in ("cudaError 35: no driver", "Cannot compile\n'node_matmul'", "Something else"):
                    logger.log(logger.Severity.ERROR, message)
                logger.log(logger.Severity.WARNING, "never mind")
                return None
            return super().call(name, *args)

    module.__class__ = Failing
    with pytest.raises(EngineError, match=r"for sm86: Cannot compile 'node_matmul'$"):
        library.compile(b"graph", "decoder", INPUTS, PLAIN)


@pytest.mark.parametrize("record", TENSORRTS)
def test_plugins_are_registered_and_found(
    install: Install, record: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, module = opened(install, record)
    (tmp_path / "plugins.so").touch()
    modes = []

    class PluginLibrary:
        def __init__(self, name: str, mode: int) -> None:
            modes.append(mode)

        def asag_register_plugins(self, registry: None) -> int:
            return 0

    monkeypatch.setattr(ctypes, "CDLL", PluginLibrary)
    found = library.load_plugins(tmp_path / "plugins.so", ["PadAnchors", "PatchNMS"])
    assert [plugin.name for plugin in found] == ["AsagPadAnchors", "AsagPatchNMS"]
    assert modes == [ctypes.RTLD_GLOBAL]
    asked = module.called("IPluginRegistry.get_creator")
    assert [(call["type"], call["version"]) for call in asked] == [
        ("AsagPadAnchors", "1"),
        ("AsagPatchNMS", "1"),
    ]
    module.answers["IPluginRegistry.get_creator"] = None
    with pytest.raises(ConfigError, match=r"has no plugin for any of PadAnchors, PatchNMS"):
        library.load_plugins(tmp_path / "plugins.so", ["PadAnchors", "PatchNMS"])


def test_plugin_libraries_that_are_none(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, _ = opened(install, NEWEST)
    path = tmp_path / "plugins.so"
    with pytest.raises(ConfigError, match=r"there is no plugin library '.*plugins.so'"):
        library.load_plugins(path, ["PatchNMS"])
    path.write_text("not a library")
    with pytest.raises(BackendError, match="cannot load the plugin library"):
        library.load_plugins(path, ["PatchNMS"])
    monkeypatch.setattr(ctypes, "CDLL", lambda name, mode: object())
    with pytest.raises(ConfigError, match="no function asag_register_plugins"):
        library.load_plugins(path, ["PatchNMS"])

    failing = SimpleNamespace(
        asag_register_plugins=lambda registry: -5, asag_message=Mock(return_value=b"why")
    )
    monkeypatch.setattr(ctypes, "CDLL", lambda name, mode: failing)
    with pytest.raises(BackendError, match=r"could not register its plugins \(why\)"):
        library.load_plugins(path, ["PatchNMS"])


def test_rtx_takes_no_plugins(install: Install, tmp_path: Path) -> None:
    library, _ = opened(install, RTX)
    with pytest.raises(ConfigError, match="TensorRT-RTX takes no plugins"):
        library.load_plugins(tmp_path / "plugins.so", ["PatchNMS"])


@pytest.mark.parametrize(
    ("engine_format", "remedy"),
    [
        ("tensorrt-rtx", r"pip install 'asag-deploy\[engines\]'"),
        ("tensorrt", r"pip install 'asag-deploy\[tensorrt\]' tensorrt"),
    ],
)
def test_a_library_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, engine_format: str, remedy: str
) -> None:
    name = adapter.MODULES["tensorrt-rtx" if "rtx" in engine_format else "tensorrt"]

    def missing(module: str) -> None:
        raise ModuleNotFoundError(f"No module named '{module}'", name=module)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(BackendError, match=rf"{name} is not installed; install it with `{remedy}`"):
        open_library(engine_format)


@pytest.mark.parametrize(
    "error",
    [
        OSError("libnvinfer.so.11: cannot open shared object file"),
        ImportError("undefined symbol"),
        ModuleNotFoundError("No module named 'tensorrt_libs'", name="tensorrt_libs"),
    ],
)
def test_a_library_that_is_broken(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def broken(module: str) -> None:
        raise error

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(
        BackendError, match=r"tensorrt is installed but cannot be loaded \(.*\); install it again"
    ):
        open_library("tensorrt")


def test_an_unknown_format() -> None:
    with pytest.raises(ConfigError, match="'openvino'; choose one of tensorrt-rtx, tensorrt"):
        open_library("openvino")


def test_a_recorded_module_refuses_what_the_real_one_does_not_have(install: Install) -> None:
    module = install(OLDEST)
    config = Recorded(module, "IBuilderConfig")
    with pytest.raises(AttributeError, match="has no 'num_compute_capabilities'"):
        config.num_compute_capabilities = 1
    with pytest.raises(AttributeError, match="has no 'set_compute_capability'"):
        config.set_compute_capability(0, 0)
    with pytest.raises(TypeError, match="fits none"):
        config.set_timing_cache(None, wrong=True)
    with pytest.raises(AssertionError, match="is a method"):
        config.set_timing_cache = 1
    assert not hasattr(module, "ComputeCapability")
    assert "tensorrt" in sys.modules
