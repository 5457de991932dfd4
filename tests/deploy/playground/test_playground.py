"""What the playground says and shows of a picture, its examples, its command line: all but the page."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from asag_deploy import Detections, Detector
from asag_deploy.bundle.manifest import Category, Manifest
from asag_deploy.detector_options import DetectorOptions
from asag_deploy.errors import ConfigError, ImageError
from asag_deploy.examples import PHOTOGRAPHS_CLASSES, photographs
from asag_deploy.loop.trace import ProbingTrace, StopReason
from asag_deploy.playground import cli, html
from asag_deploy.playground.examples import MOST, OWN, list_examples, own_examples, prepare
from asag_deploy.playground.looking import Choices, Ranges, Sight, browsers_show, compare, look, read
from asag_deploy.playground.page import Visit
from asag_deploy.playground.shelf import KEPT_SECONDS, Shelf
from asag_deploy.playground.words import about, decoder_caption, level_caption, story
from support.detection_samples import explained_trace, make_detections, make_trace
from support.playground_examples import SCENES
from support.playground_examples import drawn as drawn_example
from support.tiny_bundle import make_bundle, picture, tiny_manifest

PROBED_TWICE = picture(4, 2)


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Detector]:
    bundle = make_bundle(tmp_path_factory.mktemp("playground") / "bundle")
    with Detector.load(bundle) as loaded:
        yield loaded


def choices(detector: Detector, **changed: Any) -> Choices:
    first = Ranges.of(detector.manifest).first_choices(DetectorOptions(), 0.0)
    return dataclasses.replace(first, **changed)


def seen(detector: Detector, image: Any = PROBED_TWICE, **changed: Any) -> Sight:
    return look(detector, image, choices(detector, **changed))


def stopped(reason: StopReason, selected: int, *, levels: int = 2) -> ProbingTrace:
    trace = explained_trace()
    last = dataclasses.replace(trace.levels[levels - 1], selected=selected)
    return dataclasses.replace(trace, levels=(*trace.levels[: levels - 1], last), stop=reason)


# --- sentences


def told(trace: ProbingTrace) -> str:
    return story(trace, deepest="P3", deadline_ms=None)


@pytest.mark.parametrize(
    ("reason", "selected", "said"),
    [
        (StopReason.NOTHING_SELECTED, 0, "after P4: no anchor there asked for a closer look."),
        (
            StopReason.FEW_SELECTED,
            2,
            "after P4: only 2 anchors asked for a closer look, and fast mode goes on for 3 or more.",
        ),
        (
            StopReason.MAX_LEVEL,
            1,
            "after P4: deeper levels are not allowed, although 1 anchor asked for a closer look.",
        ),
        (StopReason.MAX_LEVEL, 0, "after P4: deeper levels are not allowed."),
        (StopReason.DEADLINE, 0, "after P4: the deadline of 20 ms had passed."),
        (
            StopReason.DEADLINE,
            3,
            "after P4: the deadline of 20 ms had passed; 3 anchors asked for a closer look.",
        ),
        (StopReason.LAST_LEVEL, 0, "after P4: there is no level below it."),
    ],
)
def test_every_reason_is_a_sentence(reason: StopReason, selected: int, said: str) -> None:
    text = story(stopped(reason, selected), deepest="P3", deadline_ms=20)
    assert text == (
        "1 anchor on P5 asked for a closer look, so 1 patch of P4 was probed. "
        f"Probing stopped {said} 2 anchors were given to the decoder."
    )


def test_a_story_that_ends_at_once() -> None:
    text = told(stopped(StopReason.NOTHING_SELECTED, 0, levels=1))
    assert text.startswith("Probing stopped after P5: no anchor there asked for a closer look.")


def test_lost_patches_are_told() -> None:
    assert "2 patches were left out for want of room." in told(make_trace(dropped=2))
    assert "1 patch was left out for want of room." in told(make_trace(dropped=1))


def test_captions_count_what_became_of_the_anchors() -> None:
    trace = explained_trace()
    assert level_caption(trace, 0) == "P5: 3 anchors on 5 patches; 1 went on, 1 asked and was replaced on P4"
    assert level_caption(trace, 1) == "P4: 2 anchors on 1 patch; 1 went on, none asked for a closer look"
    assert decoder_caption(trace) == "Decoder: 2 anchors, 1 of P5, 1 of P4"
    alone = stopped(StopReason.MAX_LEVEL, 1, levels=1)
    assert level_caption(alone, 0).endswith("1 went on, 1 asked for a closer look in vain")


def test_what_the_bundle_is() -> None:
    manifest = tiny_manifest()
    assert about(manifest, "openvino") == "tiny · 3 classes · P5, P4, P3 · fp32 · openvino"
    one = dataclasses.replace(
        manifest,
        categories=manifest.categories[:1],
        probing=dataclasses.replace(manifest.probing, levels=()),
    )
    assert about(one, "onnxruntime") == "tiny · 1 class · P5 · fp32 · onnxruntime"


# --- looking


def test_a_picture_of_each_level_and_of_the_decoder(detector: Detector) -> None:
    sight = seen(detector)
    assert [caption.split(":")[0] for _, caption in sight.levels] == ["P5", "P4", "P3", "Decoder"]
    assert "4 asked and were replaced on P4" in sight.levels[0][1]
    assert "Probing stopped after P3" in sight.story
    for drawn in (sight.picture, *(drawn for drawn, _ in sight.levels)):
        assert drawn.shape[1] == 640
        assert drawn.dtype == np.uint8


def test_choices_reach_the_detector(detector: Detector) -> None:
    assert [level.level for level in seen(detector, max_level="P4").found.trace.levels] == ["P5", "P4"]
    assert seen(detector, picture(2), mode="fast").found.trace.stop == StopReason.FEW_SELECTED
    assert len(seen(detector, max_detections=2).found) == 2
    everything = seen(detector).found
    half = float(np.median(everything.confidence))
    assert 0 < len(seen(detector, threshold=half).found) < len(everything)
    late = seen(detector, deadline_ms=1e-9)
    assert late.found.trace.stop == StopReason.DEADLINE
    assert "the deadline of 1e-09 ms had passed" in late.story


@pytest.mark.parametrize("none", [None, 0, -1])
def test_no_deadline_is_none_also_where_the_detector_has_one(detector: Detector, none: float | None) -> None:
    assert choices(detector, deadline_ms=none).options()["deadline_ms"] == math.inf


def test_what_the_bundle_cannot_do_is_a_sentence(detector: Detector) -> None:
    with pytest.raises(ConfigError, match="max_detections is 1000"):
        seen(detector, max_detections=1000)


def test_the_trace_as_json(detector: Detector) -> None:
    content = json.loads(seen(detector).trace_json)
    assert content["trace"]["exit_level"] == "P3"
    candidates = content["trace"]["levels"][0]["candidates"]
    assert sum(candidates["asked"]) == 4
    assert len(candidates["boxes"]) == len(candidates["scores"])


def test_comparison_of_the_levels(detector: Detector) -> None:
    stops = compare(detector, PROBED_TWICE, choices(detector, max_level="P5", deadline_ms=0.001))
    assert [caption.split(":")[0] for _, caption in stops] == ["P5", "P4", "P3"]
    assert all(" objects in " in caption and caption.endswith(" ms") for _, caption in stops)
    early = [caption for _, caption in compare(detector, picture(0), choices(detector))]
    assert early[0].endswith(" ms")
    assert early[1].endswith("it stopped after P5, where none asked for a closer look")
    fast = [caption for _, caption in compare(detector, picture(2), choices(detector, mode="fast"))]
    assert fast[2].endswith("it stopped after P5, where too few asked for a closer look")


def test_the_time_of_a_comparison_is_the_shortest(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([90.0, 80.0, 70.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 90.0, 90.0, 90.0])

    class Slow:
        manifest: Manifest = tiny_manifest()

        def __call__(self, images: Any, **options: Any) -> Detections:
            return dataclasses.replace(make_detections((64, 64)), times_ms={"total": next(times)})

    chosen = Ranges.of(Slow.manifest).first_choices(DetectorOptions(), 0.3)
    captions = [caption for _, caption in compare(Slow(), picture(0), chosen)]
    assert [caption.partition(" in ")[2].split(";")[0] for caption in captions] == ["10 ms", "20 ms", "30 ms"]


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (3000, 4000)])
def test_pictures_of_every_size(detector: Detector, size: tuple[int, int]) -> None:
    sight = seen(detector, picture(4, 2, size=size))
    assert max(sight.picture.shape) <= 1280
    assert sight.found.original_shape == size


def test_a_bundle_of_one_level(tmp_path: Path) -> None:
    with Detector.load(make_bundle(tmp_path / "bundle", levels=())) as single:
        ranges = Ranges.of(single.manifest)
        assert ranges.levels == ("P5",)
        sight = look(single, PROBED_TWICE, ranges.first_choices(DetectorOptions(), 0.3))
        assert [caption.split(":")[0] for _, caption in sight.levels] == ["P5", "Decoder"]
        assert "Probing stopped after P5: this bundle has no deeper level" in sight.story
        assert len(compare(single, PROBED_TWICE, ranges.first_choices(DetectorOptions(), 0.3))) == 1


def test_ranges_are_the_bundles() -> None:
    manifest = tiny_manifest()
    of_earlier_releases = dataclasses.replace(manifest.probing, cap_can_be_lowered=False)
    fixed = Ranges.of(dataclasses.replace(manifest, probing=of_earlier_releases))
    assert fixed.modes == ("exact", "fast")
    assert fixed.anchor_cap == (24, 24)
    assert fixed.first_choices(DetectorOptions(), 0.3).anchor_cap is None
    probing = dataclasses.replace(manifest.probing, cap_can_be_lowered=True, mode="fast")
    ranges = Ranges.of(dataclasses.replace(manifest, probing=probing))
    assert ranges.modes == ("fast",)
    assert ranges.anchor_cap == (5, 24)
    loaded = DetectorOptions(max_level="P4", mode="fast", deadline_ms=9, anchor_cap=7, max_detections=3)
    assert ranges.first_choices(loaded, 0.25) == Choices(
        threshold=0.25, max_level="P4", mode="fast", deadline_ms=9, anchor_cap=7, max_detections=3
    )


@pytest.mark.parametrize("kind", ["grey", "16 bits", "transparent"])
def test_pictures_of_every_kind_are_read(kind: str, tmp_path: Path) -> None:
    images: dict[str, NDArray[Any]] = {
        "grey": np.full((20, 30), 7, np.uint8),
        "16 bits": np.full((20, 30), 7 * 257, np.uint16),
        "transparent": np.zeros((20, 30, 4), np.uint8),
    }
    cv2.imwrite(str(tmp_path / "a.png"), images[kind])
    rgb = read(tmp_path / "a.png")
    assert rgb.shape == (20, 30, 3)
    assert np.unique(rgb).tolist() == [255 if kind == "transparent" else 7]


# --- what the page calls


def values(detector: Detector, **changed: Any) -> tuple[Any, ...]:
    chosen = choices(detector, **changed)
    return (chosen.threshold, chosen.max_level, chosen.mode, 0, 24, chosen.max_detections)


@pytest.fixture
def visit(detector: Detector, tmp_path: Path) -> Visit:
    return Visit(detector, choices(detector), Shelf(tmp_path / "shelf"))


@pytest.fixture
def file(tmp_path: Path) -> str:
    cv2.imwrite(str(tmp_path / "a.png"), PROBED_TWICE[..., ::-1])
    return str(tmp_path / "a.png")


def test_a_visit(visit: Visit, detector: Detector, file: str) -> None:
    said, drawn, table, times, levels, trace = visit.look(file, *values(detector))
    assert "Probing stopped after P3" in said
    assert read(Path(drawn)).shape[1] == 640
    assert "round" in table
    assert "probe_p4" in times
    assert [caption[:2] for _, caption in levels] == ["P5", "P4", "P3", "De"]
    assert all(Path(shown).is_file() for shown, _ in levels)
    assert json.loads(Path(trace).read_text())["trace"]["exit_level"] == "P3"
    assert len(visit.compare(file, *values(detector))) == 3


@pytest.mark.parametrize(
    ("typed", "threshold", "anchors", "detections"),
    [
        ((None, None, None, None), 0.25, 20, 4),  # as at the beginning; a field is empty while one types
        ((5, -5, 700, 1e308), 1, 24, 10),
        ((-1, 1e308, 0, 0), 0, 5, 1),
        ((0.5, 0, 7.9, 3.9), 0.5, 7, 3),
    ],
)
def test_what_is_typed_is_the_nearest_that_is_possible(
    detector: Detector,
    tmp_path: Path,
    file: str,
    typed: tuple[float | None, ...],
    threshold: float,
    anchors: int,
    detections: int,
) -> None:
    asked: list[dict[str, Any]] = []

    class Asked:
        manifest: Manifest = detector.manifest

        def __call__(self, images: Any, **options: Any) -> Detections:
            asked.append(options)
            found: Detections = detector(images, **options)
            return found

    begun = choices(detector, threshold=0.25, anchor_cap=20, max_detections=4)
    confidence, deadline, cap, most = typed
    said, *_ = Visit(Asked(), begun, Shelf(tmp_path / "shelf")).look(
        file, confidence, "P3", "exact", deadline, cap, most
    )
    assert "problem" not in said
    (options,) = asked
    assert options["threshold"] == threshold
    assert options["anchor_cap"] == anchors
    assert options["max_detections"] == detections
    assert options["deadline_ms"] == (1e308 if deadline == 1e308 else math.inf)


def test_what_browsers_do_not_show_is_said(visit: Visit, detector: Detector, tmp_path: Path) -> None:
    for suffix, said in ((".png", False), (".tif", True), (".ppm", True)):
        cv2.imwrite(str(tmp_path / f"a{suffix}"), PROBED_TWICE[..., ::-1])
        (tmp_path / f"a{suffix}").rename(tmp_path / "a.jpg")  # what a file holds counts, not its name
        story_told, drawn, *_ = visit.look(str(tmp_path / "a.jpg"), *values(detector))
        assert ("may be unable to show" in story_told) == said
        assert Path(drawn).is_file()


def test_without_a_picture_the_page_says_what_to_do(visit: Visit, detector: Detector) -> None:
    said, *rest = visit.look(None, *values(detector))
    assert "Choose a picture" in said
    assert rest == [None, "", "", [], None]
    assert visit.compare(None, *values(detector)) == []


@pytest.mark.parametrize(
    ("content", "said"), [(b"no image", "is damaged or is not an image"), (b"", "is empty")]
)
def test_a_bad_file_is_a_sentence_on_the_page(
    visit: Visit, detector: Detector, tmp_path: Path, content: bytes, said: str
) -> None:
    bad = tmp_path / "<b>.jpg"
    bad.write_bytes(content)
    shown, *rest = visit.look(str(bad), *values(detector))
    assert said in shown
    assert "problem" in shown
    assert "<b>" not in shown  # names are text
    assert rest == [None, "", "", [], None]
    assert visit.compare(str(bad), *values(detector)) == []


def test_a_file_that_is_gone_is_a_sentence_too(visit: Visit, detector: Detector, tmp_path: Path) -> None:
    assert "does not exist" in visit.look(str(tmp_path / "gone.png"), *values(detector))[0]


def test_too_many_pixels_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asag_deploy.playground.looking.MOST_PIXELS", 100)
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((20, 20, 3), np.uint8))
    with pytest.raises(ImageError, match="20 x 20 pixels, and at most 100"):
        read(tmp_path / "a.png")


# --- parts of the page


def test_names_in_the_table_are_text() -> None:
    found = make_detections()
    odd = dataclasses.replace(found.categories[0], name="<script>")
    text = html.table(dataclasses.replace(found, categories=(odd, *found.categories[1:])))
    assert "&lt;script&gt;" in text
    assert "<script>" not in text
    assert "<td>0.90</td><td>10</td><td>20</td><td>40</td><td>60</td>" in text
    assert "Nothing" in html.table(found.filter(1))


def test_the_lines_of_the_last_picture_are_told_apart() -> None:
    levels, last = html.legend().split("in the last picture:")
    assert "went on" in levels
    assert "P5" not in levels
    assert [f"of {level}<" in last for level in ("P5", "P4", "P3")] == [True] * 3


def test_bars_are_parts_of_the_whole() -> None:
    text = html.bars({"backbone": 30.0, "decoder": 10.0, "total": 40.0})
    assert 'width: 75.0%"' in text
    assert 'width: 25.0%"' in text
    assert text.endswith("<td>40.0 ms</td></tr></table>")
    assert "4.0 ms" in html.bars({"backbone": 4.0})
    assert "0.0 ms" in html.bars({"total": 0.0, "decoder": 0.0})


def test_untrained_weights_are_said() -> None:
    assert "untrained" in html.heading("tiny", trained=False)
    assert "untrained" not in html.heading("tiny", trained=True)
    assert "&lt;i&gt;" in html.heading("<i>", trained=True)


# --- the shelf


def test_the_shelf_forgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf(tmp_path / "shelf")
    old, young = Path(shelf.put(b"a", "a")), Path(shelf.put(b"b", "b"))
    assert old.parent != young.parent
    past = time.time() - KEPT_SECONDS - 10
    os.utime(old.parent, (past, past))
    monkeypatch.setattr("asag_deploy.playground.shelf._SWEPT_SECONDS", 0)
    newest = Path(shelf.put(b"c", "c"))
    assert not old.parent.exists()
    assert young.read_bytes() == b"b"
    assert newest.read_bytes() == b"c"


# --- examples


def test_the_packages_own_examples_are_the_generated_scenes() -> None:
    assert [file.name for file in list_examples(OWN)] == sorted(SCENES)
    for name in SCENES:
        difference = np.abs(read(OWN / name).astype(int) - drawn_example(name).astype(int))
        assert difference.mean() < 4, name  # what JPEG makes of it


def test_photographs_for_a_network_of_their_classes(tmp_path: Path) -> None:
    manifest = make_bundle(tmp_path / "bundle").manifest
    assert own_examples(manifest) == list_examples(OWN)
    cells = tuple(Category(id=i, name=name) for i, name in enumerate(PHOTOGRAPHS_CLASSES, start=1))
    assert own_examples(dataclasses.replace(manifest, categories=cells)) == photographs()
    assert len(photographs()) == 6


def test_examples_are_copied_as_browsers_show_them(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    cv2.imwrite(str(folder / "a.JPG"), np.zeros((300, 600, 3), np.uint8))
    cv2.imwrite(str(folder / "b.tiff"), np.zeros((30, 60), np.uint8))
    (folder / "c.png").write_bytes((folder / "b.tiff").read_bytes())
    (folder / "notes.txt").write_text("no image")
    (folder / "d.jpg").mkdir()
    made = prepare(list_examples(folder), tmp_path / "copies")
    assert [example.file.name for example in made] == ["a.JPG", "b.png", "c.png"]
    assert made[0].file.read_bytes() == (folder / "a.JPG").read_bytes()
    assert [browsers_show(example.file) for example in made] == [True] * 3
    assert [read(example.thumbnail).shape[:2] for example in made] == [(80, 160), (30, 60), (30, 60)]


def test_an_example_that_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    whole = re.escape(str(tmp_path / "broken.png"))
    with pytest.raises(ImageError, match=f"'{whole}' is damaged or is not an image"):
        prepare(list_examples(tmp_path), tmp_path / "copies")


def test_a_dozen_examples_at_most(tmp_path: Path) -> None:
    for number in range(MOST + 3):
        (tmp_path / f"{number:02d}.png").write_bytes(b"")
    assert [file.stem for file in list_examples(tmp_path)] == [f"{n:02d}" for n in range(MOST)]


# --- the command line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--examples", "nowhere"], "--examples: there is no folder 'nowhere'"),
        (["--examples", "empty"], "--examples: the folder 'empty' holds no images"),
        (["--examples", "folders"], "--examples: the folder 'folders' holds no images"),
        (["--port", "70000"], "--port is 70000"),
        (["--threshold", "2"], "--threshold is 2"),
    ],
)
def test_a_bad_command_line_is_one_sentence(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "check_gradio", lambda: None)  # nor is it needed for this
    (tmp_path / "empty").mkdir()
    (tmp_path / "folders" / "x.jpg").mkdir(parents=True)
    assert cli.main(["bundle", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"asag-playground: error: {said}")
    assert len(err.splitlines()) == 1


def program(bundle: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "asag_deploy.playground.cli", str(bundle), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_it_and_nothing_is_left(
    number: signal.Signals, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gradio", reason="needs Gradio: pip install 'asag-deploy[playground]'")
    make_bundle(tmp_path / "bundle")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    with program(tmp_path / "bundle", "--port", "0") as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("asag-playground: tiny at http://127.0.0.1:")
        assert list(scratch.iterdir())
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, "")
    assert err == "asag-playground: warning: the bundle's weights are untrained\n"
    assert list(scratch.iterdir()) == []


@pytest.mark.slow
def test_a_port_in_use_is_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="needs Gradio: pip install 'asag-deploy[playground]'")
    make_bundle(tmp_path / "bundle")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with program(tmp_path / "bundle", "--port", str(port)) as process:
            out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert f"could not listen on 127.0.0.1, port {port}" in err.splitlines()[-1]
