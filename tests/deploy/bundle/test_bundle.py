"""Bundles: written whole, opened only when everything in them is right."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asag_deploy.bundle.bundle import Bundle, stage_names, write_bundle
from asag_deploy.errors import BundleCorruptError, BundleNotFoundError, BundleVersionError, OutputError
from support.tiny_bundle import CLASSES, make_bundle, tiny_manifest
from support.tiny_graphs import models

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


def change_manifest(bundle: Bundle, change: Change) -> None:
    file = bundle.path / "manifest.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def test_open(bundle: Bundle) -> None:
    opened = Bundle.open(str(bundle.path))
    assert opened == bundle
    assert [graph.name for graph in opened.manifest.graphs] == [*stage_names(("P4", "P3"))]
    assert opened.graph_path("probe_p4") == bundle.path / "probe_p4.onnx"
    assert [category.name for category in opened.manifest.categories] == list(CLASSES)


def test_unknown_graph(bundle: Bundle) -> None:
    with pytest.raises(KeyError, match="probe_p2"):
        bundle.graph_path("probe_p2")


def test_missing_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleNotFoundError, match=r"there is no bundle '.*nowhere'; .*`asag-export"):
        Bundle.open(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["x" * 300, "nothing\0here"])
def test_a_name_that_no_folder_can_have(name: str) -> None:
    with pytest.raises(BundleNotFoundError, match=r"can(not)? be (a|no) bundle|no bundle"):
        Bundle.open(name)


def test_directory_that_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleNotFoundError, match=r"holds no manifest\.json; .*`asag-export"):
        Bundle.open(tmp_path)


def test_file_instead_of_a_directory(bundle: Bundle) -> None:
    with pytest.raises(BundleNotFoundError, match="is a file, but a bundle is a directory"):
        Bundle.open(bundle.graph_path("decoder"))


def test_manifest_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(BundleCorruptError, match="cannot read"):
        Bundle.open(tmp_path)


def test_manifest_that_is_not_json(bundle: Bundle) -> None:
    (bundle.path / "manifest.json").write_bytes((bundle.path / "manifest.json").read_bytes()[:-40])
    with pytest.raises(BundleCorruptError, match=r"manifest\.json' is not JSON; .*`asag-export"):
        Bundle.open(bundle.path)


def test_newer_schema(bundle: Bundle) -> None:
    change_manifest(bundle, lambda data: data.update(schema_version=99, new_field=1))
    with pytest.raises(BundleVersionError, match=r"schema version 99 .* upgrade"):
        Bundle.open(bundle.path)


def test_field_of_the_wrong_type(bundle: Bundle) -> None:
    change_manifest(bundle, lambda data: data["graphs"][2].update(sha256=5))
    with pytest.raises(BundleCorruptError, match=r"`graphs\[2\]\.sha256` is 5, expected text"):
        Bundle.open(bundle.path)


def test_truncated_graph(bundle: Bundle) -> None:
    file = bundle.graph_path("backbone")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BundleCorruptError, match=r"backbone\.onnx' is truncated or was altered"):
        Bundle.open(bundle.path)


def test_altered_graph(bundle: Bundle) -> None:
    file = bundle.graph_path("decoder")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(BundleCorruptError) as error:
        Bundle.open(bundle.path)
    assert str(error.value) == (
        f"'{file}' is truncated or was altered, its SHA-256 is not the one in manifest.json; copy the bundle "
        "again, or export it again with `asag-export --checkpoint FILE --output-dir DIR`"
    )


def test_a_damaged_int8_bundle_names_what_makes_such(bundle: Bundle) -> None:
    change_manifest(bundle, lambda data: data.update(precision="int8"))
    bundle.graph_path("decoder").write_bytes(b"")
    with pytest.raises(BundleCorruptError) as error:
        Bundle.open(bundle.path)
    assert str(error.value).endswith(
        "copy the bundle again, or quantise its float32 bundle again with "
        "`asag-quantize BUNDLE --images PATH --output-dir DIR`"
    )


def test_missing_graph_file(bundle: Bundle) -> None:
    bundle.graph_path("probe_p3").unlink()
    with pytest.raises(BundleCorruptError, match=r"cannot read the graph '.*probe_p3\.onnx' \(no such file"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize("name", stage_names(("P4", "P3")))
def test_missing_graph_entry(bundle: Bundle, name: str) -> None:
    def drop(data: dict[str, Any]) -> None:
        data["graphs"] = [graph for graph in data["graphs"] if graph["name"] != name]

    change_manifest(bundle, drop)
    with pytest.raises(BundleCorruptError, match=f"has 0 entries for the graph '{name}', expected 1"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["graphs"].append(data["graphs"][0]), "2 entries for the graph 'normalize'"),
        (lambda data: data["graphs"][0].update(file="../secret"), r"`graphs\[0\]\.file` is '\.\./secret'"),
        (lambda data: data["graphs"][0].update(file="/etc/passwd"), r"expected a file inside the bundle"),
        (lambda data: data["probing"]["levels"].reverse(), r"are \['P3', 'P4'\], expected none, P4, or"),
        (lambda data: data["probing"]["levels"].pop(0), r"`probing\.levels` are \['P3'\]"),
        (lambda data: data["probing"]["levels"][1].update(capacity=0), r"levels\[1\]\.capacity` is 0"),
        (lambda data: data["probing"].update(anchor_cap=0), r"anchor_cap` is 0, expected at least 1"),
        (lambda data: data["probing"].update(max_patches=-1), r"max_patches` is -1, expected at least 1"),
        (lambda data: data["preprocessing"].update(longer_side=63), r"longer_side` is 63, .* at least 64"),
        (lambda data: data["preprocessing"].update(size_divisor=0), r"size_divisor` is 0"),
        (lambda data: data["postprocessing"].update(nms_iou=-0.5), r"nms_iou` is -0\.5, expected at least 0"),
        (lambda data: data["categories"].pop(), r"`categories` names 2 classes, but the graphs predict 3"),
        (lambda data: data["graphs"][4]["outputs"].pop(0), "the graph 'decoder' has no output 'logits'"),
    ],
)
def test_manifest_that_contradicts_itself(bundle: Bundle, change: Change, message: str) -> None:
    change_manifest(bundle, change)
    with pytest.raises(BundleCorruptError, match=message):
        Bundle.open(bundle.path)


def test_first_level_alone_needs_no_probe_graphs(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", levels=())
    names = sorted(file.name for file in bundle.path.iterdir())
    assert names == ["README.md", "backbone.onnx", "decoder.onnx", "manifest.json", "normalize.onnx"]


def test_writer_opens_a_draft_and_takes_the_manifest_again(tmp_path: Path) -> None:
    with write_bundle(tmp_path / "bundle") as writer:
        for name, model in models(()).items():
            outputs = make_bundle(tmp_path / f"other {name}", levels=()).manifest.graph(name).outputs
            writer.add_graph(name, model.SerializeToString(), inputs=(), outputs=outputs)
        manifest = tiny_manifest(levels=())
        draft = writer.finish(manifest)
        assert draft.path != tmp_path / "bundle"
        assert not (tmp_path / "bundle").exists()
        writer.finish(dataclasses.replace(manifest, parity={"passed": True}))
    assert Bundle.open(tmp_path / "bundle").manifest.parity == {"passed": True}


def test_unfinished_bundle_does_not_appear(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="finish"), write_bundle(tmp_path / "bundle") as writer:
        writer.add_graph("decoder", b"", inputs=(), outputs=())
    assert list(tmp_path.iterdir()) == []


def test_incomplete_bundle_does_not_appear(tmp_path: Path) -> None:
    with pytest.raises(BundleCorruptError, match="'normalize'"), write_bundle(tmp_path / "bundle") as writer:
        writer.finish(tiny_manifest())
    assert list(tmp_path.iterdir()) == []


def test_failed_export_leaves_the_bundle_before(bundle: Bundle) -> None:
    def interrupted_export() -> None:
        with write_bundle(bundle.path, overwrite=True) as writer:
            writer.add_graph("normalize", b"graph", inputs=(), outputs=())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_export()
    assert Bundle.open(bundle.path) == bundle
    assert list(bundle.path.parent.iterdir()) == [bundle.path]


def test_existing_bundle_is_replaced_only_on_request(bundle: Bundle) -> None:
    with pytest.raises(OutputError, match="already exists"), write_bundle(bundle.path):
        pytest.fail("the body must not run")
    with write_bundle(bundle.path, overwrite=True) as writer:
        for name, model in models(()).items():
            spec = bundle.manifest.graph(name)
            writer.add_graph(name, model.SerializeToString(), inputs=spec.inputs, outputs=spec.outputs)
        writer.finish(tiny_manifest(levels=()))
    assert Bundle.open(bundle.path).manifest.probing.levels == ()
    assert not (bundle.path / "probe_p4.onnx").exists()


def test_messages_name_it_from_the_working_directory(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert bundle.shown == bundle.path
    monkeypatch.chdir(bundle.path.parent)
    assert bundle.shown == Path(bundle.path.name)
