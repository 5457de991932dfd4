"""What the project itself has written and reads again: sidecars of engines, caches, results, settings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from asag_bench.reports.compare import compare
from asag_bench.reports.page import page, read_results
from asag_bench.reports.report import markdown
from asag_bench.result import read_result
from asag_deploy.backends.compiled_cache import CompiledCache
from asag_deploy.engines.sidecar import check
from endurance.damage import damaged_bytes, damaged_json
from endurance.judging import ROOT, Target, WrongError
from endurance.targets import Part, one_of_parts
from support.engine_files import CONTENT, VERSION, put, recipe
from support.tiny_bundle import make_bundle

_RESULTS = ROOT / "benchmarks" / "results"


@contextmanager
def open_records(folder: Path) -> Iterator[Target]:
    """`sidecar`, `cache`, `result`, `page` or `settings`, and on the next lines the content."""
    inputs, run = one_of_parts(
        {
            "sidecar": _sidecar(folder / "engines"),
            "cache": _cache(folder / "cache"),
            "result": _result(folder / "result"),
            "page": _page(folder / "page"),
            "settings": _settings(),
        }
    )
    yield Target(inputs=inputs, run=run)


def _sidecar(folder: Path) -> Part:
    bundle = make_bundle(folder)
    beside = put(bundle, recipe(bundle)).with_suffix(".json")
    valid = json.loads(beside.read_text())

    def run(data: bytes) -> None:
        beside.write_bytes(data)
        found = check(
            bundle,
            "decoder",
            engine_format="tensorrt-rtx",
            sdk_version=VERSION,
            capability="sm86",
            device="a GPU",
        )
        found.sidecar.check_shapes({each.name: (1, 2, 3, 4) for each in found.sidecar.recipe.inputs})
        if found.content != CONTENT:
            raise WrongError("another engine")

    return damaged_json([valid], values=["sm86", "1.8", "ampere_plus"]), run


def _cache(folder: Path) -> Part:
    cache = CompiledCache(folder, "recipe")
    content = b"a compiled graph"
    cache.write("a" * 64, content)
    (file,) = folder.iterdir()

    def run(data: bytes) -> None:
        file.write_bytes(data)
        if cache.read("a" * 64) not in (None, content):
            raise WrongError("the cache gave something else than was put in")

    return damaged_bytes([file.read_bytes()]), run


def _result(folder: Path) -> Part:
    folder.mkdir()
    path, other = folder / "result.json", folder / "other.json"
    seed = _cut(json.loads((_RESULTS / "asag-bench-asag-a-r50-100-cpu.json").read_bytes()))
    for each in (path, other):
        each.write_text(json.dumps(seed))
    whole = read_result(other)

    def run(data: bytes) -> None:
        path.write_bytes(data)
        found = read_result(path)
        markdown(found)
        compare(whole, found, 0.05)
        compare(found, whole, 0.05)

    return damaged_json([seed]), run


def _page(folder: Path) -> Part:
    folder.mkdir()
    path = folder / "result.json"
    path.write_text("{}")
    names = ("throughput-asag-a-scenes-cpu.json", "training-step-asag-a-r50-100-cpu.json")
    seeds = [json.loads((_RESULTS / name).read_bytes()) for name in names]
    seeds.append(_cut(json.loads((_RESULTS / "asag-bench-asag-a-r50-100-cpu.json").read_bytes())))

    def run(data: bytes) -> None:
        path.write_bytes(data)
        page(read_results(folder))

    return damaged_json(seeds), run


def _cut(result: Any) -> Any:
    """A recorded result of one image group and two runners."""
    group = result["strata"][0]
    kept = list(group["subjects"])[:2]
    group["subjects"] = {name: group["subjects"][name] for name in kept}
    group["probing_costs"], group["compared"] = {}, {}
    return result | {"strata": [group]}


def _settings() -> Part:
    """Changes of a recipe, one a line, as `--set` takes them."""
    from asag_training.recipes import recipe

    made = recipe("scenes")
    names = sorted(_paths(dataclasses.asdict(made), ""))
    value = st.one_of(
        damaged_json([1, 0.5, [1, 2], "fp32", None, True]), damaged_bytes([b"1", b"[1, 2]", b"x"])
    )
    change: SearchStrategy[bytes] = st.builds(
        lambda name, equals, text: name.encode() + equals + text.replace(b"\n", b" "),
        st.one_of(st.sampled_from(names), st.sampled_from(names), st.text(max_size=5)),
        st.sampled_from((b"=", b"=", b"=", b"==", b"", b".x=")),
        value,
    )

    def run(data: bytes) -> None:
        recipe("scenes", data.decode(errors="surrogateescape").split("\n"))

    return st.lists(change, min_size=1, max_size=3).map(b"\n".join), run


def _paths(values: Any, prefix: str) -> Iterator[str]:
    for name, value in values.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{name}.")
