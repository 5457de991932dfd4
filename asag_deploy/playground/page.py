"""The page: what a visitor gives and chooses, and where what was seen is shown.

Gradio is imported when the page is made, so that this module costs nothing where nobody opens one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from asag_deploy.bundle.manifest import Level, Mode
from asag_deploy.errors import AsagError
from asag_deploy.playground import html
from asag_deploy.playground.examples import Example
from asag_deploy.playground.looking import (
    Choices,
    LookingDetector,
    Ranges,
    browsers_show,
    compare,
    look,
    read,
)
from asag_deploy.playground.shelf import KEPT_SECONDS, Shelf
from asag_deploy.playground.turns import Turns
from asag_deploy.playground.words import about

TITLE = "ASAG playground"
CSS = Path(__file__).with_name("page.css")
_NO_PICTURE = "Choose a picture: upload one, take one with the camera, or begin with an example."
_TOO_MANY = "Too many visitors wait for the detector: change something again in a moment."
_NOT_SHOWN = "Your browser may be unable to show a file of this kind as “Picture”: see “Detections”."
_SWEPT_SECONDS = 600


def make_page(
    detector: LookingDetector,
    first: Choices,
    *,
    turns: Turns,
    backend: str,
    examples: Sequence[Example],
    shelf: Shelf,
) -> Any:
    """Make the page, a `gradio.Blocks`, on which a detector is tried.

    first: where its choices begin.  turns: at the detector.  backend: what the page says runs the
    network.  shelf: keeps what it shows, in Gradio's own folder.  Raises ImportError without Gradio.
    """
    import gradio as gr

    visit = Visit(detector, first, shelf)
    manifest = detector.manifest
    with gr.Blocks(
        title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=(_SWEPT_SECONDS, KEPT_SECONDS)
    ) as page:
        gr.HTML(html.heading(about(manifest, backend), trained=manifest.trained))
        with gr.Row(equal_height=False):
            with gr.Column(scale=10, min_width=280):
                given = gr.Image(
                    value=str(examples[0].file) if examples else None,
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "webcam", "clipboard"],
                    label="Picture",
                    buttons=[],
                    height=256,
                    elem_id="given",
                )
                # Our own reader takes the file as it is, and refuses it in a sentence.
                given.preprocess = _path_of
                offered = gr.Gallery(
                    value=[str(example.thumbnail) for example in examples],
                    label="Examples",
                    columns=4,
                    height=118 if len(examples) <= 4 else 192,
                    object_fit="cover",
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                    visible=bool(examples),
                    elem_id="examples",
                )
            with gr.Column(scale=11, min_width=270):
                choosers = _choosers(gr, Ranges.of(manifest), first)
            with gr.Column(scale=16, min_width=360):
                drawn = gr.Image(
                    label="Detections",
                    interactive=False,
                    buttons=["download", "fullscreen"],
                    height=404,
                    elem_id="drawn",
                )
            with gr.Column(scale=13, min_width=300):
                with gr.Group():
                    table = gr.HTML(label="Detections", elem_id="found", padding=True)
                with gr.Group():
                    times = gr.HTML(elem_id="times", padding=True)
                download = gr.DownloadButton("Trace as JSON", size="sm", elem_id="download")
        story = gr.HTML(elem_id="story")
        gr.HTML(html.legend())
        levels = gr.Gallery(
            show_label=False,
            columns=4,
            fit_columns=False,
            height="auto",
            object_fit="contain",
            interactive=False,
            buttons=["fullscreen"],
            elem_id="levels",
            elem_classes="levels",
        )
        gr.HTML(html.comparison())
        stopped = gr.Gallery(
            show_label=False,
            columns=3,
            fit_columns=False,
            height="auto",
            object_fit="contain",
            interactive=False,
            buttons=["fullscreen"],
            elem_id="stopped",
            elem_classes="levels",
        )
        inputs = [given, *choosers]
        common = {
            "inputs": inputs,
            "trigger_mode": "always_last",  # of a slider's changes meanwhile the last one counts
            "queue": False,  # a result can get lost in Gradio's: see `turns`
            "show_progress": "minimal",
            "api_visibility": "private",
        }
        changes = [page.load, *(component.change for component in inputs)]
        looking = _in_turn(gr, turns, visit.look, lambda: _nothing(html.sentence(_TOO_MANY, problem=True)))
        gr.on(changes, looking, outputs=[story, drawn, table, times, levels, download], **common)
        threshold, _, mode, _, cap, most = choosers  # the comparison is of all levels, without a deadline
        compared = (given, threshold, mode, cap, most)
        of_comparison = [page.load, *(component.change for component in compared)]
        gr.on(of_comparison, _in_turn(gr, turns, visit.compare, list), outputs=[stopped], **common)

        def take(event: Any) -> str:
            return str(examples[event.index].file)

        take.__annotations__ = {"event": gr.SelectData}  # by which Gradio knows what to pass
        offered.select(take, outputs=given, queue=False, show_progress="hidden", api_visibility="private")
    return page


def _in_turn(gr: Any, turns: Turns, work: Callable[..., Any], otherwise: Callable[[], Any]) -> Any:
    """Make what Gradio calls to do `work` when it is its turn; it returns `otherwise()` if it gets none."""

    async def wait(visitor: Any, *values: Any) -> Any:
        result = await turns.take(lambda: work(*values), visitor.request.is_disconnected)
        return otherwise() if result is None else result

    wait.__name__ = work.__name__
    wait.__annotations__ = {"visitor": gr.Request}  # by which Gradio knows what to pass
    return wait


def look_of_the_page() -> dict[str, Any]:
    """Return how the page looks, for `gradio.mount_gradio_app`: fonts are those that the visitor has."""
    import gradio as gr

    theme = gr.themes.Default(
        primary_hue="red",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
        spacing_size="sm",
        text_size="sm",
    )
    return {"theme": theme, "css_paths": [CSS], "footer_links": []}


def _choosers(gr: Any, ranges: Ranges, first: Choices) -> list[Any]:
    """Make the components a visitor chooses with, in the order in which `_choices` takes their values."""
    least, most = ranges.anchor_cap
    fixed = least == most
    threshold = gr.Slider(0, 1, value=first.threshold, step=0.01, label="Threshold", elem_id="threshold")
    level = gr.Radio(list(ranges.levels), value=first.max_level, label="Deepest level", elem_id="level")
    with gr.Row():
        mode = gr.Radio(
            list(ranges.modes), value=first.mode, label="Mode", scale=2, min_width=170, elem_id="mode"
        )
        deadline = gr.Number(
            first.deadline_ms or 0, minimum=0, label="Deadline, ms", min_width=80, elem_id="deadline"
        )
    cap = gr.Slider(
        min(least, most - 1),
        most,
        value=first.anchor_cap or most,
        step=1,
        label="Anchors, at most",
        interactive=not fixed,
        info="fixed in this bundle" if fixed else None,
        elem_id="cap",
    )
    detections = gr.Slider(
        min(1, ranges.max_detections - 1),
        ranges.max_detections,
        value=first.max_detections,
        step=1,
        label="Detections, at most",
        elem_id="most",
    )
    for number in (threshold, deadline, cap, detections):
        # Gradio answers what is beyond the range with "Error", and an emptied slider with a traceback.
        number.preprocess = _as_it_is
    return [threshold, level, mode, deadline, cap, detections]


class Visit:
    """What the page calls; nothing of a visitor is kept but on the shelf."""

    def __init__(self, detector: LookingDetector, first: Choices, shelf: Shelf) -> None:
        """Take what fields begin with in `first`, and keep what is shown on the shelf."""
        self._detector = detector
        self._first = first
        self._ranges = Ranges.of(detector.manifest)
        self._shelf = shelf

    def look(self, file: str | None, *values: Any) -> tuple[Any, ...]:
        """Return story, picture, table, times, levels and the trace's file; a sentence if it cannot be."""
        if file is None:
            return _nothing(html.sentence(_NO_PICTURE))
        try:
            sight = look(self._detector, read(Path(file)), self._choices(*values))
            not_shown = "" if browsers_show(Path(file)) else f" {_NOT_SHOWN}"
        except AsagError as error:
            return _nothing(html.sentence(str(error), problem=True))
        return (
            html.sentence(sight.story + not_shown),
            self._shelf.picture(sight.picture, "detections"),
            html.table(sight.found),
            html.bars(sight.found.times_ms),
            self._pictures(sight.levels, "level"),
            self._shelf.put(sight.trace_json.encode(), "trace.json"),
        )

    def compare(self, file: str | None, *values: Any) -> list[tuple[str, str]]:
        """Return a picture for each level as the deepest; nothing where `look` says why."""
        if file is None:
            return []
        try:
            return self._pictures(
                compare(self._detector, read(Path(file)), self._choices(*values)), "stopped"
            )
        except AsagError:
            return []

    def _choices(
        self,
        threshold: float | None,
        level: Level,
        mode: Mode,
        deadline: float | None,
        cap: float | None,
        most: float | None,
    ) -> Choices:
        """Return what the components hold, or the nearest that is possible.

        None is a field that a visitor has emptied, as one does to type another number.  It counts as what it
        began with, and a deadline as none.
        """
        first, caps, counts = self._first, self._ranges.anchor_cap, (1, self._ranges.max_detections)
        fixed = caps[0] == caps[1]
        return Choices(
            threshold=_within(first.threshold if threshold is None else threshold, (0, 1)),
            max_level=level,
            mode=mode,
            deadline_ms=deadline,
            anchor_cap=first.anchor_cap if cap is None or fixed else int(_within(cap, caps)),
            max_detections=first.max_detections if most is None else int(_within(most, counts)),
        )

    def _pictures(self, captioned: Sequence[tuple[Any, str]], name: str) -> list[tuple[str, str]]:
        return [
            (self._shelf.picture(picture, f"{name}-{number}"), caption)
            for number, (picture, caption) in enumerate(captioned, start=1)
        ]


def _nothing(said: str) -> tuple[Any, ...]:
    return said, None, "", "", [], None


def _within(value: float, bounds: tuple[float, float]) -> float:
    """Return the nearest number to a value between two bounds, both possible."""
    least, most = bounds
    return min(max(value, least), most)


def _as_it_is(payload: float | None) -> float | None:
    """Return what a visitor has typed, whatever it is; None for nothing."""
    return payload


def _path_of(payload: Any) -> str | None:
    """Return where an uploaded picture lies, untouched."""
    path = getattr(payload, "path", None)
    return None if path is None else str(path)
