"""What the library's inspector says of an engine, counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from asag_deploy.bundle.bundle import Bundle
from asag_deploy.cuda.driver import Gpu
from asag_deploy.engines import BuildOptions, build_engines
from asag_deploy.engines.adapter import open_library
from asag_deploy.engines.inspector import Layers, count_layers, in_words
from asag_deploy.engines.shapes import InputRange
from asag_deploy.engines.sidecar import read_sidecar
from support.engine_bundle import PLAIN
from support.recorded_tensorrt import NEWEST, RECORDS, RTX, RecordedModule

Install = Callable[[str], RecordedModule]


def layer(inputs: list[str], outputs: list[str], key: str = "Format/Datatype") -> dict[str, object]:
    tensors = [[{"Name": "x", key: kind} for kind in kinds] for kinds in (inputs, outputs)]
    return {"Name": "layer", "LayerType": "CaskConvolution", "Inputs": tensors[0], "Outputs": tensors[1]}


def text(*layers: object) -> str:
    return json.dumps({"Layers": layers, "Bindings": ["x"]})


@pytest.mark.parametrize(
    ("inputs", "outputs", "types"),
    [
        (["Half"], ["Half"], "fp16"),
        (["Float"], ["Half"], "fp16+fp32"),
        (["Row major linear FP32"], ["Channel major FP16 format where channel % 8 == 0"], "fp16+fp32"),
        (["Thirty-two wide channel vectorized row major Int8 format"], ["Float"], "fp32+int8"),
        (["BFloat16"], ["BF16"], "bf16"),
        (["FP8"], ["Half"], "fp16+fp8"),
        (["Int64", "Bool"], ["Int32"], "other"),
        (["Int64", "Half"], ["Half"], "fp16"),
        ([], [], "other"),
    ],
)
def test_types(inputs: list[str], outputs: list[str], types: str) -> None:
    for key in ("Format/Datatype", "Datatype"):
        assert count_layers(text(layer(inputs, outputs, key))) == {types: 1}


def test_layers_are_counted() -> None:
    half, cast = layer(["Half"], ["Half"]), layer(["Float"], ["Half"])
    found = count_layers(text(half, cast, half, {"Name": "of another kind", "Inputs": "?"}))
    assert found == {"fp16": 2, "fp16+fp32": 1, "other": 1}
    assert in_words(found) == "2 in fp16, 1 in fp16+fp32, 1 in other"


@pytest.mark.parametrize("wrong", ["", "[]", "{}", '{"Layers": 3}', '{"Layers": ["by", "name"]}', "null"])
def test_an_answer_without_types(wrong: str) -> None:
    assert count_layers(wrong) is None
    assert in_words(None).startswith("the inspector was not asked, since")


@pytest.mark.parametrize("record", RECORDS)
def test_every_library_is_asked_in_words_that_it_has(install: Install, record: str) -> None:
    module = install(record)
    library = open_library("tensorrt-rtx" if "rtx" in record else "tensorrt")
    answer = text(layer(["Half"], ["Half"]))
    module.answers["EngineInspector.get_engine_information"] = answer
    assert library.layers(b"engine", version_compatible=False) == {"fp16": 1}
    assert not module.called("Runtime.engine_host_code_allowed =")
    (call,) = module.called("EngineInspector.get_engine_information")
    assert call["format"].name == "JSON"
    library.layers(b"engine", version_compatible=True)
    assert module.called("Runtime.engine_host_code_allowed =") == [{"value": True}]
    module.answers["Runtime.deserialize_cuda_engine"] = None
    assert library.layers(b"engine", version_compatible=False) is None


@pytest.mark.parametrize("record", RECORDS)
def test_engines_are_built_with_what_the_inspector_tells(install: Install, record: str) -> None:
    module = install(record)
    inputs = (InputRange(name="x", dtype="float32", least=(1,), usual=(1,), most=(1,)),)
    open_library("tensorrt-rtx" if "rtx" in record else "tensorrt").compile(b"", "decoder", inputs, PLAIN)
    (verbosity,) = module.called("IBuilderConfig.profiling_verbosity =")
    assert verbosity["value"].name == "DETAILED"


def said(path: Path) -> Layers | None:
    return read_sidecar(path.with_suffix(".json"), "").layers


def test_the_sidecar_says_it_where_there_is_the_gpu(
    bundle: Bundle, install: Install, gpu: Gpu, tmp_path: Path
) -> None:
    module = install(RTX)
    module.answers["EngineInspector.get_engine_information"] = text(layer(["Half"], ["Float"]))
    report = build_engines(bundle, BuildOptions(gpus=(gpu.capability, "sm120")))
    found = {path.parent.name: said(path) for path in report.built}
    assert found == {gpu.capability: {"fp16+fp32": 1}, "sm120": None}
    module = install(NEWEST)
    module.answers["EngineInspector.get_engine_information"] = text(layer(["Half"], ["Half"]))
    report = build_engines(bundle, BuildOptions(engine_format="tensorrt"))
    assert {str(said(path)) for path in report.built} == {"{'fp16': 1}"}


def test_the_sidecar_does_not_say_it_where_there_is_none(
    bundle: Bundle, install: Install, no_gpu: None
) -> None:
    module = install(RTX)
    report = build_engines(bundle, BuildOptions(gpus=("sm86",)))
    assert {said(path) for path in report.built} == {None}
    assert not module.called("Runtime.deserialize_cuda_engine")
