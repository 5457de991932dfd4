"""What `asag-batch` is told to detect in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from asag_deploy.batch.places import read_picture
from asag_deploy.batch.sources import Picture, find_sources
from asag_deploy.errors import ConfigError, DataError, ImageError, SourceError
from support.batch_runs import make_pictures

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")


def listed(*arguments: str | Path, column: str | None = None) -> list[Picture]:
    sources = find_sources([str(argument) for argument in arguments], column)
    return [picture for source in sources for some in source.pictures() for picture in some]


def test_a_folder_is_walked_in_order_without_what_is_hidden_or_no_picture(tmp_path: Path) -> None:
    make_pictures(tmp_path / "b", 2)
    make_pictures(tmp_path / "a" / "deep", 1)
    make_pictures(tmp_path / ".hidden", 1)
    (tmp_path / "notes.md").touch()
    (tmp_path / ".x.png").touch()
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(tmp_path / "b")
    found = [picture.path.removeprefix(f"{tmp_path}/") for picture in listed(tmp_path)]
    assert found == ["a/deep/0000.png", "b/0000.png", "b/0001.png", "linked/0000.png", "linked/0001.png"]
    assert listed(tmp_path) == listed(tmp_path / "." / ".")


def test_a_name_that_is_no_utf8_is_read_all_the_same(tmp_path: Path) -> None:
    (picture,) = make_pictures(tmp_path / "a", 1)
    os.rename(picture, os.fsencode(tmp_path) + b"/a/\xff.png")  # noqa: PTH104 (a name in bytes)
    (found,) = listed(tmp_path / "a")
    assert found.path == f"{tmp_path}/a/\\udcff.png"
    assert read_picture(found.location, found.path).shape == (64, 64, 3)


def test_lists_of_all_kinds_are_the_same(tmp_path: Path) -> None:
    paths = ["a.png", "/b/c.png", "s3://bucket/d.png"]
    (tmp_path / "list.txt").write_text("\n".join(["", *paths, ""]))
    (tmp_path / "list.csv").write_text("n,path\n1,a.png\n2,/b/c.png\n3,s3://bucket/d.png\n")
    (tmp_path / "list.tsv").write_text("path\tn\na.png\t1\n/b/c.png\t2\ns3://bucket/d.png\t3\n")
    table = pa.table({"path": paths})
    parquet.write_table(table, tmp_path / "list.parquet")
    expected = [
        Picture("a.png", f"{tmp_path}/a.png"),
        Picture("/b/c.png", None),
        Picture("s3://bucket/d.png", None),
    ]
    for name in ("list.txt", "list.csv", "list.tsv", "list.parquet", f"file://{tmp_path}/list.txt"):
        assert listed(tmp_path / name if "://" not in name else name) == expected, name
    (tmp_path / "lists").mkdir()
    parquet.write_table(table[:2], tmp_path / "lists" / "1.parquet")
    parquet.write_table(table[2:], tmp_path / "lists" / "2.parquet")
    assert [picture.path for picture in listed(tmp_path / "lists")] == paths
    assert listed(tmp_path / "lists")[0].place == f"{tmp_path}/lists/a.png"


def test_another_column(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("url,path\na.png,no\n")
    assert [picture.path for picture in listed(tmp_path / "list.csv", column="url")] == ["a.png"]
    (tmp_path / "list.txt").write_text("a.png")
    with pytest.raises(ConfigError, match="--column is for lists in Parquet or CSV, and none is given"):
        listed(tmp_path / "list.txt", column="url")


@pytest.mark.parametrize(
    ("name", "content", "kind", "said"),
    [
        ("a.csv", b"file\nx\n", ConfigError, "has no column 'path', but 'file'"),
        ("a.csv", b"path,path\nx,y\n", ConfigError, "has 2 columns 'path': rename all but one, or give"),
        ("a.csv", b"path,n\nx,1\n,2\n", DataError, "entry 2 of '.*a.csv' is empty, and no path"),
        ("a.csv", b"path;n\nx;1\n", ConfigError, "parted by commas in .csv, .* and not by semicolons"),
        ("a.parquet", b"PAR1 nothing", DataError, "cannot read the list"),
        ("a.txt", b"a.png\n\xff\n", DataError, r"is no text in UTF-8 \(at byte 6\)"),
        ("a.txt", b"a\0.png\n", DataError, "entry 1 of '.*a.txt' holds a null byte"),
        ("a.png", b"", SourceError, r"is a picture: name its folder, or a list of paths \(.parquet"),
        (
            "a.doc",
            b"",
            SourceError,
            r"is no list of paths that is known: name a folder of pictures, or a list",
        ),
        ("a.txt", b"http://h/a.png\nHTTPS://h/b.png\n", SourceError, "holds addresses of the web alone"),
    ],
)
def test_what_is_no_list(tmp_path: Path, name: str, content: bytes, kind: type[Exception], said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(kind, match=said):
        listed(tmp_path / name)


def test_what_is_not_there_or_both(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="'nowhere' does not exist"):
        listed("nowhere")
    with pytest.raises(SourceError, match="an empty name"):
        listed("")
    with pytest.raises(ConfigError, match="is no address that can be read"):
        listed("nonsense://a/b")
    with pytest.raises(
        ConfigError, match=r"'https://h/a\.txt' is an address of the web, of which asag-batch"
    ):
        listed("https://h/a.txt")
    make_pictures(tmp_path, 1)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(ConfigError, match=r"holds Parquet files .* and pictures"):
        listed(tmp_path)


def test_a_column_that_holds_no_paths(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"path": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"entry 1 of .* is 1, and no path"):
        listed(tmp_path / "a.parquet")


def test_spellings_of_a_path_are_one_picture(tmp_path: Path) -> None:
    spellings = ["p/a.jpg", "./p/a.jpg", "p//a.jpg", "q/../p/a.jpg", f"{tmp_path}/./p/a.jpg"]
    spellings += [f"file://{tmp_path}/p/a.jpg", f"file://{tmp_path}/p/%61.jpg", f"/{tmp_path}/p/a.jpg"]
    (tmp_path / "list.txt").write_text("\n".join(spellings))
    found = listed(tmp_path / "list.txt")
    assert [picture.path for picture in found] == spellings
    assert {picture.location for picture in found} == {f"{tmp_path}/p/a.jpg"}


def test_other_columns_may_hold_anything(tmp_path: Path) -> None:
    rows = "".join(f"{i},{i}.png\n" for i in range(200_000))
    (tmp_path / "list.csv").write_text(f'id,path\n{rows}abc,last.png\n"two\nlines",more.png\n')
    found = listed(tmp_path / "list.csv")
    assert (len(found), found[-2].path, found[-1].path) == (200_002, "last.png", "more.png")


def test_a_text_is_cut_at_its_line_ends_only(tmp_path: Path) -> None:
    paths = ["a\u2028b.png", "c\x85.png", "d\x0b.png", "e\x0c.png"]
    (tmp_path / "list.txt").write_bytes("\r\n".join(paths).encode())
    assert [picture.path for picture in listed(tmp_path / "list.txt")] == paths


def test_a_picture_of_the_web_among_others_is_one_that_fails(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("http://h/a.png\na.png\n")
    found, _ = listed(tmp_path / "list.txt")
    with pytest.raises(ImageError, match=r"'http://h/a\.png' is on the web, of which asag-batch reads"):
        read_picture(found.location, found.path)


def test_an_empty_csv_lists_nothing(tmp_path: Path) -> None:
    (tmp_path / "list.csv").touch()
    assert listed(tmp_path / "list.csv") == []
