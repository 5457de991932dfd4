"""Parts of the page as HTML: what stands at its top, the detections as a table, the times as bars."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from asag_deploy.detections import Detections
from asag_deploy.images.drawing import ANCHOR_COLOUR, PATCH_COLOUR, Colour, class_colour
from asag_deploy.images.level_pictures import ASKED_COLOUR, DROPPED_COLOUR, LEVEL_COLOURS

_TOTAL = "total"
_LEGEND: tuple[tuple[str, Colour, str], ...] = (
    ("went on", ANCHOR_COLOUR, "solid"),
    ("asked for a closer look", ASKED_COLOUR, "solid"),
    ("replaced", ASKED_COLOUR, "dashed"),
    ("dropped", DROPPED_COLOUR, "solid"),
    ("patch looked at", PATCH_COLOUR, "solid"),
    ("patch asked for", PATCH_COLOUR, "dashed"),
)
"""What the lines of the pictures of levels mean: words, colour, style."""
_LEGEND_OF_THE_DECODER = tuple((f"of {level}", colour, "solid") for level, colour in LEVEL_COLOURS.items())
"""What those of the last picture mean, where white is another thing than in the others."""


def heading(about: str, *, trained: bool) -> str:
    """Return the top of the page; about: what the bundle is, in a line."""
    warning = (
        ""
        if trained
        else '<p class="problem">The weights of this bundle are untrained: what it finds means nothing.</p>'
    )
    return f'<div class="top"><h1>ASAG playground</h1><span>{escape(about)}</span></div>{warning}'


def sentence(text: str, *, problem: bool = False) -> str:
    """Return a sentence for the page; problem: it says what is wrong."""
    return f'<p class="{"problem" if problem else "story"}">{escape(text)}</p>'


def legend() -> str:
    """Return what the lines of the pictures of levels mean."""
    levels, decoder = (
        "".join(
            f'<span><i style="border: 2px {style} {_css(colour)}"></i>{escape(text)}</span>'
            for text, colour, style in entries
        )
        for entries in (_LEGEND, _LEGEND_OF_THE_DECODER)
    )
    last = f"<span>in the last picture:</span>{decoder}"
    return f'<div class="legend"><b>Probing, level by level</b>{levels}{last}</div>'


def comparison() -> str:
    """Return what stands above the pictures of the comparison."""
    how = "<span>without a deadline, the shortest of a few times</span>"
    return f'<div class="legend"><b>The same picture, stopped at each level</b>{how}</div>'


def table(found: Detections) -> str:
    """Return the detections as a table, each with the colour of its box."""
    if not len(found):
        return sentence("Nothing is as sure as the threshold asks for.")
    rows = []
    for box, confidence, class_id, name in zip(
        found.xyxy.tolist(), found.confidence.tolist(), found.class_id.tolist(), found.names, strict=True
    ):
        corners = "".join(f"<td>{value:.0f}</td>" for value in box)
        chip = f'<i style="background: {_css(class_colour(class_id))}"></i>'
        rows.append(f"<tr><th>{chip}{escape(name)}</th><td>{confidence:.2f}</td>{corners}</tr>")
    head = "".join(f"<th>{name}</th>" for name in ("object", "score", "x1", "y1", "x2", "y2"))
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="found"><table>{body}</table></div>'


def bars(times_ms: Mapping[str, float]) -> str:
    """Return the time of each stage as a bar, in milliseconds, and the whole of the call."""
    total = times_ms.get(_TOTAL) or sum(times_ms.values())
    rows = []
    for name, time in times_ms.items():
        if name != _TOTAL:
            width = 100 * time / total if total > 0 else 0
            bar = f'<div><b style="width: {min(width, 100):.1f}%"></b></div>'
            rows.append(f"<tr><th>{escape(name)}</th><td>{bar}</td><td>{time:.1f}</td></tr>")
    rows.append(f"<tr><th>{_TOTAL}</th><td></td><td>{total:.1f} ms</td></tr>")
    return f'<table class="times">{"".join(rows)}</table>'


def _css(colour: Colour) -> str:
    red, green, blue = colour
    return f"rgb({red} {green} {blue})"
