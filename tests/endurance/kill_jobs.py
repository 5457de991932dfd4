"""The commands that `kill.py` ends, what they need, and what must hold of whatever they leave."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from asag_deploy.bundle.bundle import Bundle

ROOT = Path(__file__).resolve().parents[2]
_PROGRAMS = {
    "asag-bench": "asag_bench.cli",
    "asag-data": "asag_evaluation.data.cli",
    "asag-detect": "asag_deploy.detect.cli",
    "asag-eval": "asag_training.evaluation.cli",
    "asag-export": "asag_export.cli",
    "asag-paper": "asag_bench.paper.cli",
    "asag-quantize": "asag_export.quantize.cli",
    "asag-train": "asag_training.cli",
}
_SCENES, _SIDE = 24, 160
_CHECKPOINT = ROOT / "export" / "asag_export" / "asag-a-scenes.safetensors"
_COMBINATIONS = 12
"""Of a sweep: more than are measured together."""
_WITHOUT_BUNDLE = {"train", "train-peer", "paper", "sweep"}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where everything lies."""

    folder: Path

    @property
    def scratch(self) -> Path:
        """The folder for temporary files, and the home."""
        return self.folder / "scratch"

    @property
    def bundle(self) -> Path:
        """What detects, and is quantised."""
        return self.folder / "bundle"

    @property
    def data(self) -> Path:
        """Scenes in COCO layout."""
        return self.folder / "data"

    @property
    def images(self) -> Path:
        """The scenes' pictures."""
        return self.data / "val2017"

    def of(self, job: str) -> Path:
        """Where a job writes."""
        return self.folder / f"out-{job}"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A command that writes."""

    name: str
    arguments: Callable[[Place], Sequence[str | Path]]
    look: Callable[[Path], str]
    """Says what there is where it writes; raises something if it is not whole."""
    start_anew: Callable[[Path], object] = lambda place: None
    """Called when a run has come to its end."""

    def command(self, place: Place) -> list[str]:
        """Return what to start."""
        return program(*self.arguments(place))


def program(name: str | Path, *arguments: str | Path) -> list[str]:
    """Return the command that starts one of the project's programs.

    Its warnings are errors, but for one that Python shows nobody: where an interruption comes while a module
    is imported, the file of that module stays open until it is collected.
    """
    warnings = ("-W", "error", "-W", "ignore::ResourceWarning")
    return [sys.executable, *warnings, "-m", _PROGRAMS[str(name)], *map(str, arguments)]


def prepare(folder: Path, jobs: Sequence[str], *, bundle: Path | None) -> Place:
    """Make what the jobs need: scenes, a video, a bundle to detect with, and something to train on."""
    place = Place(folder=folder)
    for path in (place.scratch, *(place.of(job) for job in jobs)):
        path.mkdir()
    for split in ("train2017", "val2017"):
        scenes = ("scenes", "--output-dir", place.data, "--split", split)
        _do("asag-data", *scenes, "--count", str(_SCENES), "--size", str(_SIDE))
    if bundle is not None:
        shutil.copytree(bundle, place.bundle)
    elif not set(jobs) <= _WITHOUT_BUNDLE:
        _do("asag-export", "--checkpoint", _CHECKPOINT, "--output-dir", place.bundle, "--quiet")
    _write_video(place.folder / "scenes.avi", sorted(place.images.iterdir()))
    return place


def _do(*command: str | Path) -> None:
    subprocess.run(program(*command), check=True, stdout=subprocess.DEVNULL)


def _write_video(path: Path, pictures: Sequence[Path]) -> None:
    import cv2

    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (_SIDE, _SIDE))
    for picture in pictures:
        frame = cv2.imread(str(picture))
        assert frame is not None
        writer.write(frame)
    writer.release()


def _json(place: Path) -> str:
    file = place / "found.json"
    if not file.exists():
        return "absent"
    return "all" if len(json.loads(file.read_text())) >= _SCENES else "part"


def _video(place: Path) -> str:
    import av

    file = place / "scenes.mp4"
    if not file.exists():
        return "absent"
    with av.open(file) as container:
        frames = sum(1 for _ in container.decode(video=0))
    assert frames > 0, "a video without a frame"
    return "all" if frames == _SCENES else "part"


def _bundle(place: Path) -> str:
    folder = place / "bundle"
    if not folder.exists():
        return "absent"
    Bundle.open(folder)
    return "bundle"


def _run(place: Path) -> str:
    import safetensors.numpy
    import torch

    run = place / "run"
    if not (run / "state.pt").exists():
        return "absent"
    step = torch.load(run / "state.pt", weights_only=True)["position"]["step"]
    for file in run.glob("[!.]*.safetensors"):
        safetensors.numpy.load_file(file)
    for file in run.glob("[!.]*.csv"):
        with file.open(newline="") as lines:
            list(csv.reader(lines))
    return "begun" if step else "at the start"


def _tables(place: Path) -> str:
    file = place / "paper.json"
    if not file.exists():
        return "absent"
    content = json.loads(file.read_text())
    assert content["measured"] or "tables" not in content, "tables of nothing"
    return "all" if "tables" in content else "part"


def _swept(place: Path) -> str:
    file = place / "sweep.json"
    if not file.exists():
        return "absent"
    return "all" if len(json.loads(file.read_text())["rows"]) == _COMBINATIONS else "part"


def _remove(what: str) -> Callable[[Path], None]:
    return lambda place: shutil.rmtree(place / what, ignore_errors=True)


def _unlink_all(place: Path) -> None:
    for file in place.iterdir():
        file.unlink()


def _unlink(what: str) -> Callable[[Path], None]:
    return lambda place: (place / what).unlink(missing_ok=True)


def _detect(job: str, *options: str) -> Callable[[Place], list[str | Path]]:
    def arguments(place: Place) -> list[str | Path]:
        out = [place.of(job) / "found.json"] if job != "video" else [place.of(job)]
        source = place.folder / "scenes.avi" if job == "video" else place.images
        return ["asag-detect", place.bundle, source, "--threshold", "0.01", "--quiet", *options, *out]

    return arguments


def _export(place: Place) -> Sequence[str | Path]:
    out = place.of("export") / "bundle"
    return [
        "asag-export",
        "--checkpoint",
        _CHECKPOINT,
        "--levels",
        "p5-p6",
        "--output-dir",
        out,
        "--overwrite",
    ]


def _quantize(place: Place) -> Sequence[str | Path]:
    out = place.of("quantize") / "bundle"
    pictures: list[str | Path] = ["--images", place.images, "--count", "8", "--keep-failed"]
    return ["asag-quantize", place.bundle, *pictures, "--output-dir", out, "--overwrite"]


def _train(place: Place) -> Sequence[str | Path]:
    from support.training_runs import TINY

    changes = [change for change in TINY if not change.startswith(("network.num_classes", "schedule.epochs"))]
    options = [f"--set={change}" for change in (*changes, "schedule.epochs=4")]
    where: list[str | Path] = ["--data", place.data, "--output-dir", place.of("train") / "run", "--resume"]
    return ["asag-train", *where, *options, "--workers", "1", "--pictures", "1", "--device", "cpu"]


def _train_peer(place: Place) -> Sequence[str | Path]:
    where: list[str | Path] = ["--data", place.data, "--output-dir", place.of("train-peer") / "run"]
    return ["asag-bench", "train-peer", "yolox-lite", *where, "--epochs", "3"]


def _paper(place: Place) -> Sequence[str | Path]:
    given: list[str | Path] = ["--data", place.data, "--network", f"asag-a-100={_CHECKPOINT}", "--limit", "4"]
    out: list[str | Path] = ["--output-dir", place.of("paper"), "--only", "2,5b", "--time-images", "1"]
    return ["asag-paper", "tables", *given, *out, "--threads", "1"]


def _sweep(place: Place) -> Sequence[str | Path]:
    values = ",".join(f"{0.01 * i:.2f}" for i in range(1, _COMBINATIONS + 1))
    where: list[str | Path] = ["--data", place.data, "--limit", "4", "--output-dir", place.of("sweep")]
    return ["asag-eval", _CHECKPOINT, *where, "--set", f"score_low={values}"]


JOBS = {
    job.name: job
    for job in (
        Job(name="json", arguments=_detect("json", "--json"), look=_json, start_anew=_unlink("found.json")),
        Job(name="coco", arguments=_detect("coco", "--coco"), look=_json, start_anew=_unlink("found.json")),
        Job(name="video", arguments=_detect("video", "--output-dir"), look=_video),
        Job(name="export", arguments=_export, look=_bundle),
        Job(name="quantize", arguments=_quantize, look=_bundle),
        Job(name="train", arguments=_train, look=_run, start_anew=_remove("run")),
        Job(name="train-peer", arguments=_train_peer, look=_run, start_anew=_remove("run")),
        Job(name="paper", arguments=_paper, look=_tables, start_anew=_unlink_all),
        Job(name="sweep", arguments=_sweep, look=_swept, start_anew=_unlink_all),
    )
}
