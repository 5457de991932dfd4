"""Runs and pictures that lie elsewhere: a server that speaks S3, and any file system of pyarrow's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from asag_deploy.batch.places import Place, beside, kind_of, whole_name
from asag_deploy.errors import OutputError
from support.batch_runs import make_pictures
from support.fake_s3 import fake_s3
from support.tiny_bundle import make_bundle

pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pytest.importorskip("pandas", reason="pandas is not installed")

# What a run does, but for Ray, in a process of its own: the library behind S3 takes a while to end.
ELSEWHERE = """
import io, json, os, sys
from pyarrow.parquet import read_table
from asag_deploy.batch.places import Place, kind_of
from asag_deploy.batch.run import Identity, open_run
from asag_deploy.batch.sources import find_sources
from asag_deploy.batch.worker import Plan, Worker
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.detector_options import DetectorOptions

bundle, place = Bundle.open(sys.argv[1]), Place("s3://bucket/out")
of = Identity(bundle=bundle.fingerprint, options={}, sources=find_sources(sys.argv[2:]))
said = []
for _ in range(2):
    with open_run(place, of) as run:
        done, pending = run.parts()
        plan = Plan(place=place, key=run.key, attempt="one", bundle=bundle.path, batch=1, threshold=0.3,
                    fingerprint=bundle.fingerprint, detector=DetectorOptions(threads=1))
        reports = [Worker(plan).do(part) for part in pending]
        run.tidy()
        came = [(report.pictures, report.failed, report.problem) for report in reports]
        said.append([len(done), came, sum(run.count_failed(done))])
rows = read_table(io.BytesIO(place.read("results/part-0000000.parquet"))).to_pylist()
print(json.dumps([said, [(row["path"], row["error"]) for row in rows]]), flush=True)
os._exit(0)  # as asag-batch ends then: the library behind S3 may abort what ends as usual
"""


@pytest.mark.slow
def test_pictures_and_results_on_s3(tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    with fake_s3() as (address, objects):
        for path in make_pictures(tmp_path / "a", 3):
            objects[f"bucket/a/deep/{path.name}"] = path.read_bytes()
        objects["bucket/a/broken.jpg"] = b"nothing"
        objects["bucket/list.txt"] = b"a/deep/0000.png\nnowhere.png\n"
        environment = {
            **os.environ,
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        sources = ["s3://bucket/a", "s3://bucket/list.txt"]
        done = subprocess.run(
            [sys.executable, "-c", ELSEWHERE, str(tmp_path / "bundle"), *sources],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        names = sorted(name for name in objects if name.startswith("bucket/out/"))
    said, rows = json.loads(done.stdout)
    assert said == [[0, [[5, 2, None]], 0], [1, [], 2]]
    assert [path for path, error in rows if error is None] == [
        f"s3://bucket/a/deep/000{i}.png" for i in range(3)
    ]
    errors = {path: error for path, error in rows if error is not None}
    assert "'s3://bucket/a/broken.jpg' is damaged" in errors["s3://bucket/a/broken.jpg"]
    assert errors["nowhere.png"] == "image 'nowhere.png' does not exist"
    assert [name.removeprefix("bucket/out/") for name in names if not name.endswith("/")] == [
        "index/generation-000.json",
        "index/pictures-000-00000.parquet",
        "results/part-0000000.parquet",
        "run.json",
    ]


def test_a_file_system_that_renames() -> None:
    place = Place("mock:///run")
    assert (place.read("a/b.json"), place.size("a/b.json"), place.holds_anything()) == (None, None, False)
    place.write("a/b.json", b"one")
    place.write("a/b.json", b"three")
    assert (place.read("a/b.json"), place.size("a/b.json")) == (b"three", 5)
    assert [file.name for file in place.files(recursive=True)] == ["mock:///run/a/b.json"]
    assert kind_of("mock:///run/a") == "folder"
    assert place.holds_anything()
    place.remove("a")
    place.remove("a")
    assert kind_of("mock:///run/a/b.json") == "nothing"


def test_names() -> None:
    assert whole_name("s3://bucket/a/") == "s3://bucket/a"
    assert whole_name("file:///a/b") == "/a/b"
    assert whole_name("/a/../b/") == "/b"
    assert beside("/lists", "a.png") == "/lists/a.png"
    assert beside("s3://bucket", "/a.png") == "/a.png"


def test_what_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(OutputError):
        Place(str(tmp_path / "a")).write("b/c", b"")
