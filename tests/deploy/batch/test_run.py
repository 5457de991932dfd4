"""A run in its folder: its index, what is done of it, and with what it goes on."""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest

from asag_deploy.batch.index import IndexReader, part_size
from asag_deploy.batch.places import Place
from asag_deploy.batch.rows import COLUMNS, as_parquet, count_errors, failed_row, schema
from asag_deploy.batch.run import Identity, Run, open_run
from asag_deploy.batch.sources import find_sources
from asag_deploy.errors import OutputError, SourceError
from support.batch_runs import make_pictures

pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pytest.importorskip("pandas", reason="pandas is not installed")


def identity(*sources: Path, bundle: str = "b" * 64, threshold: float = 0.3) -> Identity:
    found = find_sources([str(source) for source in sources])
    return Identity(bundle=bundle, options={"threshold": threshold, "mode": None}, sources=found)


def names_of(run: Run) -> list[str]:
    reader = IndexReader(run.place)
    return [Path(picture.path).name for part in chain(*run.parts()) for picture in reader.pictures(part)]


def test_each_picture_is_in_one_part(tmp_path: Path) -> None:
    make_pictures(tmp_path / "a", 4100)  # more than one file of the index
    with open_run(Place(str(tmp_path / "out")), identity(tmp_path / "a")) as run:
        done, pending = run.parts()
        assert (done, len(pending), run.pictures) == ([], 205, 4100)
        assert {part.pictures for part in pending} == {20}
        assert len({part.file for part in pending}) == 2
        assert names_of(run) == [f"{i:04d}.png" for i in range(4100)]


def test_parts_are_as_large_as_the_run_asks_for() -> None:
    assert [part_size(count) for count in (1, 20_000, 118_287, 100_000_000)] == [20, 20, 119, 1000]


def test_pictures_that_are_listed_again_are_left_out(tmp_path: Path) -> None:
    make_pictures(tmp_path / "a", 3)
    (tmp_path / "list.txt").write_text(f"a/0001.png\nb.png\nb.png\n{tmp_path}/b.png\n")
    with open_run(Place(str(tmp_path / "out")), identity(tmp_path / "a", tmp_path / "list.txt")) as run:
        assert Counter(names_of(run)) == Counter(["0000.png", "0001.png", "0002.png", "b.png"])
        assert run.repeated == 3


def test_a_run_goes_on_with_new_pictures_of_its_folder(tmp_path: Path) -> None:
    make_pictures(tmp_path / "a", 25)
    place, of = Place(str(tmp_path / "out")), identity(tmp_path / "a")
    with open_run(place, of) as run:
        first = run.parts()[1]
        place.write(first[0].results, as_parquet([failed_row("x", "no", "b")]))
    make_pictures(tmp_path / "a" / "more", 2)
    for _ in range(2):
        with open_run(place, of) as run:
            done, pending = run.parts()
            assert (done, pending[:1], len(pending)) == (first[:1], first[1:], 2)
            assert len(set(names_of(run))) == 25
            assert (run.pictures, [part.pictures for part in pending]) == (27, [5, 2])
    assert len(list((tmp_path / "out" / "index").glob("generation-*"))) == 2


def test_a_run_that_was_ended_while_it_was_listed_is_listed_again(tmp_path: Path) -> None:
    make_pictures(tmp_path / "a", 3)
    place, of = Place(str(tmp_path / "out")), identity(tmp_path / "a")
    with open_run(place, of) as run:
        key = run.key
    (tmp_path / "out" / "index" / "generation-000.json").unlink()
    with open_run(place, of) as run:
        assert (run.key, names_of(run)) == (key, ["0000.png", "0001.png", "0002.png"])


def test_half_a_file_of_results_does_not_count(tmp_path: Path) -> None:
    make_pictures(tmp_path / "a", 41)
    with open_run(Place(str(tmp_path / "out")), identity(tmp_path / "a")) as run:
        parts = run.parts()[1]
        results = tmp_path / "out" / "results"
        results.mkdir()
        (results / Path(parts[0].results).name).touch()  # as a disk may leave it that loses its power
        (results / ".part-0000001.asag-12345678-12345678-12345678.parquet").write_bytes(b"PAR1 half")
        assert run.parts() == ([], parts)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bundle": "c" * 64}, r"another bundle \(checksum bbbbbbbbbbbb, now cccccccccccc\)"),
        ({"threshold": 0.5}, r"0.3 for --threshold, and now it is 0.5"),
    ],
)
def test_another_bundle_or_options_are_refused(tmp_path: Path, change: dict[str, str], said: str) -> None:
    make_pictures(tmp_path / "a", 1)
    place = Place(str(tmp_path / "out"))
    with open_run(place, identity(tmp_path / "a")):
        pass
    of = identity(tmp_path / "a", **change)  # type: ignore[arg-type]
    with pytest.raises(OutputError, match=f"was begun with {said}: go on with that"), open_run(place, of):
        pass


def test_other_sources_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_pictures(tmp_path / name, 1)
    (tmp_path / "list.txt").write_text("a/0000.png\n")
    place = Place(str(tmp_path / "out"))
    both = identity(tmp_path / "a", tmp_path / "list.txt")
    with open_run(place, both):
        pass
    for of, said in (
        (identity(tmp_path / "a"), "'.*/list.txt', which is not given now"),
        (identity(tmp_path / "a", tmp_path / "list.txt", tmp_path / "b"), "other sources than '.*/b'"),
        (identity(tmp_path / "list.txt", tmp_path / "a"), "in another order"),
    ):
        with pytest.raises(OutputError, match=said), open_run(place, of):
            pass
    (tmp_path / "list.txt").write_text("a/0000.png\nb/0000.png\n")
    with (
        pytest.raises(OutputError, match=r"list.txt' has other paths in it than when"),
        open_run(place, both),
    ):
        pass


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    make_pictures(tmp_path / "a", 1)
    of, out = identity(tmp_path / "a"), tmp_path / "out"

    def refused(said: str) -> None:
        with pytest.raises(OutputError, match=said), open_run(Place(str(out)), of) as run:
            run.parts()

    out.touch()
    refused("is a file; choose a folder")
    out.unlink()
    out.mkdir()
    (out / "thesis.tex").touch()
    refused("holds files, but no run of asag-batch")
    (out / "run.json").write_text("{}")
    refused("is no run of asag-batch")
    (out / "run.json").write_text(json.dumps({"format": 9, "producer": "asag-deploy 9.0"}))
    refused("is of a newer release")
    (out / "run.json").unlink()
    (out / "thesis.tex").unlink()
    with open_run(Place(str(out)), of):
        pass
    (out / "results").mkdir()
    (out / "results" / "part-0000007.parquet").write_bytes(b"PAR1" * 4)
    refused("has results of a part 7")
    (out / "results" / "part-0000007.parquet").rename(out / "results" / "mine.parquet")
    refused("mine.parquet' is no file of a run")


def test_no_pictures_and_two_at_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    place = Place(str(tmp_path / "out"))
    with (
        pytest.raises(SourceError, match="a' has no pictures in it"),
        open_run(place, identity(tmp_path / "a")),
    ):
        pass
    assert not (tmp_path / "out").exists()
    make_pictures(tmp_path / "a", 1)
    of = identity(tmp_path / "a")
    with (
        open_run(place, of),
        pytest.raises(OutputError, match="another asag-batch is at work"),
        open_run(place, of),
    ):
        pass


def test_the_errors_of_a_file_are_counted_by_its_footer(tmp_path: Path) -> None:
    good = {**failed_row("a", "", "b"), "error": None, "boxes": [[1.0, 2.0, 3.0, 4.0]], "names": ["x"]}
    for rows, failed in (
        ([good, failed_row("b", "no", "b"), good], 1),
        ([good], 0),
        ([failed_row("b", "no", "b")], 1),
    ):
        (tmp_path / "a.parquet").write_bytes(as_parquet(rows))
        with (tmp_path / "a.parquet").open("rb") as file:
            assert count_errors(file) == failed
    assert tuple(schema().names) == COLUMNS


def test_a_run_is_alone_while_it_is_listed(tmp_path: Path) -> None:
    make_pictures(tmp_path / "a", 2)
    place, of = Place(str(tmp_path / "new" / "out")), identity(tmp_path / "a")
    said = []

    def come_between(_: int) -> None:
        with (
            pytest.raises(OutputError, match="another asag-batch is at work") as refused,
            open_run(place, of),
        ):
            pass
        said.append(refused)

    with open_run(place, of, come_between) as run:
        assert run.pictures == 2
    assert said


def test_what_the_system_says_has_no_number(tmp_path: Path) -> None:
    make_pictures(tmp_path / "a", 1)
    with (
        pytest.raises(OutputError) as refused,
        open_run(Place("/proc/no-such-folder"), identity(tmp_path / "a")),
    ):
        pass
    assert str(refused.value) == "could not write '/proc/no-such-folder/.lock': no such file or directory"
    (tmp_path / "deep").mkdir()
    with pytest.raises(SourceError) as refused_too:
        Place(str(tmp_path)).open("deep/none.parquet")
    assert str(refused_too.value) == f"cannot read '{tmp_path}/deep/none.parquet': no such file or directory"
