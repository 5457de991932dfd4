"""The picture of docs/monitor.md: what a server's metrics say while its pictures change.

    python tests/support/monitored_run.py demo-output/bundle docs/monitor-drift.png

starts `asag-serve` on the bundle of the demo's network, sends it generated scenes, of which the kind changes
twice, reads `/metrics` after every few of them, and draws what was read.
"""

from __future__ import annotations

import argparse
import http.client
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import cv2

from asag_evaluation.data.scenes import Kind, draw

PHASES: tuple[tuple[Kind, str], ...] = (
    ("large", "a few large objects"),
    ("tiny", "many tiny ones"),
    ("crowd", "crowds"),
)
IMAGES = 80
"""Of each kind."""
STEP = 5
"""After so many images the metrics are read."""
WINDOW = 20
"""Over so many images a figure is taken."""
SIZE, SEED = 320, 11
LEVELS = ("P5", "P4", "P3")
COLOURS = {"P5": "#2a9d8f", "P4": "#e9c46a", "P3": "#e76f51"}
Samples = dict[str, float]


@contextmanager
def served(bundle: Path) -> Iterator[http.client.HTTPConnection]:
    """Start a server on a bundle; end it with the block."""
    program = [sys.executable, "-m", "asag_deploy.serving.cli", str(bundle), "--port", "0", "--warm-up"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            said = re.search(r"http://([\d.]+):(\d+)", process.stdout.readline())
            assert said is not None
            with closing(http.client.HTTPConnection(said[1], int(said[2]), timeout=60)) as connection:
                yield connection
        finally:
            process.terminate()


def ask(
    connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None = None
) -> tuple[int, bytes]:
    """Send one request and return status and body."""
    connection.request(method, path, body=body)
    response = connection.getresponse()
    return response.status, response.read()


def scraped(connection: http.client.HTTPConnection) -> Samples:
    """Read the samples by which images are told, by name and labels as they are written."""
    lines = ask(connection, "GET", "/metrics")[1].decode().splitlines()
    return {
        name: float(value) for name, _, value in (line.rpartition(" ") for line in lines) if name[:1] != "#"
    }


def run(bundle: Path, images: int = IMAGES) -> list[Samples]:
    """Send so many scenes of each kind; return what was read before the first and after every `STEP`."""
    with served(bundle) as connection:
        read = [scraped(connection)]
        for kind, _ in PHASES:
            for index in range(images):
                picture = draw(SIZE, SIZE, SEED, index, (kind,)).image
                done, file = cv2.imencode(".png", picture[..., ::-1])
                assert done
                status, _ = ask(connection, "POST", "/detect", file.tobytes())
                assert status == 200
                if (index + 1) % STEP == 0:
                    read.append(scraped(connection))
    return read


def windows(read: Sequence[Samples]) -> list[tuple[int, Samples]]:
    """Return each window of `WINDOW` images: how many were sent by its end, and by how much samples rose."""
    back = WINDOW // STEP
    return [
        (at * STEP, {name: value - read[at - back].get(name, 0.0) for name, value in read[at].items()})
        for at in range(back, len(read))
    ]


def shares(rise: Samples) -> dict[str, float]:
    """Return which share of the images ended at each level."""
    counts = {level: rise[f'asag_exit_level_total{{level="{level}"}}'] for level in LEVELS}
    return {level: count / sum(counts.values()) for level, count in counts.items()}


def mean(rise: Samples, name: str) -> float:
    """Return the mean of a histogram."""
    return rise[f"{name}_sum"] / rise[f"{name}_count"]


def picture(read: Sequence[Samples], path: Path, images: int = IMAGES) -> None:
    """Draw exit levels, patches and anchors, and scores, over the number of images that were sent."""
    from matplotlib.figure import Figure

    rises = windows(read)
    sent = [at for at, _ in rises]
    figure = Figure(figsize=(8.4, 6.6), layout="constrained")
    levels, counts, scores = figure.subplots(3, 1, sharex=True, height_ratios=(1.3, 1, 0.8))
    parts = [[shares(rise)[level] for _, rise in rises] for level in LEVELS]
    levels.stackplot(sent, *parts, labels=LEVELS, colors=[COLOURS[level] for level in LEVELS])
    levels.set(ylabel="share of images", ylim=(0, 1), title="Exit levels")
    for name, colour in (("patches", "#e76f51"), ("anchors", "#264653")):
        counts.plot(sent, [mean(rise, f"asag_{name}") for _, rise in rises], color=colour, label=name)
    counts.set(ylabel="mean of an image", title="Patches and anchors")
    counts.set_ylim(bottom=0)
    best = [mean(rise, "asag_best_scores") for _, rise in rises]
    scores.plot(sent, best, color="#264653", label="of the best detection of an image")
    scores.plot(
        sent, [mean(rise, "asag_scores") for _, rise in rises], color="#8ab17d", label="of all detections"
    )
    scores.set(ylabel="mean confidence", ylim=(0, 1.02), title="Scores", xlim=(sent[0], sent[-1]))
    scores.set_xlabel(f"images sent; each figure is of the {WINDOW} before")
    for axes in (levels, counts, scores):
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        for number in range(1, len(PHASES)):
            axes.axvline(number * images, color="black", linestyle="--", linewidth=1)
    for number, (_, words) in enumerate(PHASES):
        middle = (max(number * images, sent[0]) + (number + 1) * images) / 2
        place = {
            "ha": "center",
            "va": "center",
            "fontsize": 9,
            "bbox": {"facecolor": "white", "alpha": 0.8, "lw": 0},
        }
        levels.text(middle, 0.5, words, **place)
    figure.savefig(path, dpi=100)


def table(read: Sequence[Samples], images: int = IMAGES) -> Iterator[str]:
    """Yield the lines of the page's table: a kind of scenes, and what the metrics say of its images."""
    for number, (_, words) in enumerate(PHASES):
        first, last = number * images // STEP, (number + 1) * images // STEP
        rise = {name: value - read[first].get(name, 0.0) for name, value in read[last].items()}
        parts = " | ".join(f"{100 * share:.0f}%" for share in shares(rise).values())
        figures = " | ".join(f"{mean(rise, f'asag_{name}'):.1f}" for name in ("patches", "anchors"))
        sure = " | ".join(f"{mean(rise, f'asag_{name}'):.2f}" for name in ("best_scores", "scores"))
        total = 1000 * rise['asag_stage_seconds_sum{stage="total"}'] / images
        yield f"| {words} | {parts} | {figures} | {sure} | {total:.0f} ms |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle", type=Path, help="of the demo's network")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    options = parser.parse_args()
    measured = run(options.bundle)
    picture(measured, options.picture)
    print(*table(measured), sep="\n")
