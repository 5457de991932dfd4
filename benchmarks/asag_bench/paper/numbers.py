"""The paper's tables as data: what each row is of, and its numbers (arXiv 2308.09242, COCO val2017).

Shares are in percent; F are "GFLOPs", which are multiply-accumulates; FPS are of an RTX 3090.  `-` is what
the paper leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from asag_deploy.bundle.manifest import Level

APS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
PROBED = ("#An", "N_P4", "N_P3")
LOW, HIGH, IOU = "score_low", "score_high", "patch_nms_iou"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table."""

    labels: tuple[str, ...]
    """What stands at its left."""
    paper: Mapping[str, float]
    """The paper's numbers by column."""
    role: str | None = None
    """Which network it is of; None: of one that this project does not train."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the network in this row, where they are not its own."""
    max_level: Level | None = None
    """The manual stop."""
    compared: tuple[str, int] | None = None
    """What can be timed with random weights: a reference of `asag-bench run`, and its queries."""
    missing: str = ""
    """What it needs that this project has not."""
    instead: str = ""
    """The ablation whose settings, without its training, show something where there is no such network."""
    figure: str = ""
    """What all its columns hold, where that is not what their titles say."""
    gains: str = ""
    """What the paper's text says of a row whose numbers are not at hand."""
    gain: float | None = None
    """The same as a number: the row's AP less that of the first row."""
    roles: Mapping[str, str] = field(default_factory=dict)
    """The roles of its columns, where they are of several."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of the paper."""

    number: str
    about: str
    heads: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def _row(labels: str, columns: tuple[str, ...], numbers: str, role: str | None = None, **more: Any) -> Row:
    """Make a row of texts: labels between `|`, numbers between blanks in the order of the columns."""
    values = numbers.split() or ["-"] * len(columns)
    paper = {column: float(value) for column, value in zip(columns, values, strict=True) if value != "-"}
    return Row(labels=tuple(part.strip() for part in labels.split("|")), paper=paper, role=role, **more)


_STOPS: dict[str, Level | None] = {"P3-6": None, "P4-6": "P4", "P5-6": "P5"}


def _stops(name: str, columns: tuple[str, ...], role: str, numbers: tuple[str, str, str]) -> tuple[Row, ...]:
    """Make the rows of a network at its three stops."""
    return tuple(
        _row(f"{name} | {maps} | 1", columns, of_stop, role, max_level=level)
        for (maps, level), of_stop in zip(_STOPS.items(), numbers, strict=True)
    )


_BUILT_FOR_SPEED = "this project builds {} for speed only, and does not train it"
_DETR = _BUILT_FOR_SPEED.format("Deformable DETR (with learned queries, and none with dense ones)")


def _speed_only(name: str) -> str:
    return _BUILT_FOR_SPEED.format(name)


_T1 = ("AP", "APs", "APm", "APl")
_T2 = ("#An", *APS, "FPS")
_T3 = ("#An", *APS, "F", "FPS")
_T5 = (*APS, *PROBED)
_T6 = ("AP", "mMR", "R")
_A300, _A100 = "asag-a-300-3x", "asag-a-100-3x"

_TABLE_1 = Table(
    number="1",
    about="six layers and the first one of them, with learned and with dense queries",
    heads=("", "detector", "queries"),
    columns=_T1,
    rows=(
        _row("a | Deformable DETR+ | learned", _T1, "46.2 28.3 49.2 61.5", missing=_DETR),
        _row("b | its first layer | learned", _T1, "37.9 23.1 41.9 49.1", missing=_DETR),
        _row("c | Deformable DETR++ | dense", _T1, "46.9 29.4 50.1 61.6", missing=_DETR),
        _row("d | its first layer | dense", _T1, "33.7 23.1 38.4 41.1", missing=_DETR),
    ),
)

_TABLE_2 = Table(
    number="2",
    about="ASAG-A at each manual stop, and AdaMixer: 1x schedule, ResNet-50",
    heads=("detector", "maps", "layers"),
    columns=_T2,
    rows=(
        _row(
            "AdaMixer | - | 6",
            _T2,
            "100 42.7 61.5 45.9 24.7 45.4 59.2 23.8",
            "adamixer-6",
            compared=("adamixer-6", 100),
        ),
        _row(
            "AdaMixer | - | 6",
            _T2,
            "300 44.1 63.4 47.4 27.0 46.9 59.5 22.2",
            "adamixer-6-300",
            compared=("adamixer-6", 300),
        ),
        *_stops(
            "ASAG-A",
            _T2,
            "asag-a-100",
            (
                "107 42.6 60.5 45.8 25.9 45.8 56.9 28.9",
                "97 42.1 59.9 45.7 24.8 46.0 56.9 30.3",
                "87 40.3 57.5 43.3 21.2 44.4 57.1 31.3",
            ),
        ),
        *_stops(
            "ASAG-A",
            _T2,
            "asag-a-300",
            (
                "329 43.6 62.5 47.0 26.9 46.2 57.6 27.9",
                "313 43.4 62.1 46.8 26.4 46.4 57.7 29.0",
                "280 41.9 60.5 44.9 23.5 45.5 57.9 30.5",
            ),
        ),
    ),
)

_S100 = (
    "100 43.9 62.2 47.9 27.8 46.5 57.8 130 30.1",
    "89 43.6 61.7 47.5 26.7 46.7 57.8 130 31.2",
    "76 41.5 58.9 45.2 23.2 45.4 57.8 130 33.0",
)
_S300 = (
    "312 45.0 64.1 49.1 29.5 47.4 57.8 136 29.2",
    "292 44.8 63.9 48.8 28.9 47.5 57.8 136 30.5",
    "256 43.2 61.9 47.1 25.8 46.7 57.8 136 31.7",
)
_OURS_D = _row("ASAG-D | P3-6 | 1", _T3, "253 45.8 64.1 49.4 27.3 49.6 61.0 182 19.7", "asag-d-300")
_OURS_A = (
    _row("ASAG-A | P3-6 | 1", _T3, "102 45.3 63.3 48.9 27.3 48.5 59.7 131 28.9", _A100),
    _row("ASAG-A | P3-6 | 1", _T3, "312 46.3 65.1 50.3 29.9 49.2 59.6 139 27.9", _A300),
)

_TABLE_3 = Table(
    number="3",
    about="detectors of one decoder layer: 36 epochs, ResNet-50",
    heads=("detector", "maps", "layers"),
    columns=_T3,
    rows=(
        _row(
            "F-QRCNN | - | 1",
            _T3,
            "100 41.3 59.4 44.9 26.7 44.2 52.4 140 38.2",
            compared=("f-qrcnn", 100),
            missing=_speed_only("F-QRCNN"),
        ),
        _row(
            "F-QRCNN | - | 1",
            _T3,
            "300 41.7 60.2 45.4 27.7 44.3 52.0 143 37.1",
            compared=("f-qrcnn", 300),
            missing=_speed_only("F-QRCNN"),
        ),
        *_stops("ASAG-S", _T3, "asag-s-100", _S100),
        *_stops("ASAG-S", _T3, "asag-s-300", _S300),
        _row(
            "Efficient DETR | - | 1",
            _T3,
            "300 45.1 63.1 49.1 28.3 48.4 59.0 210 -",
            compared=("efficient-detr", 300),
            missing=_speed_only("Efficient DETR"),
        ),
        _OURS_D,
        *_OURS_A,
    ),
)

_TABLE_4 = Table(
    number="4",
    about="detectors of six decoder layers: 36 epochs, ResNet-50",
    heads=("detector", "maps", "layers"),
    columns=_T3,
    rows=(
        _row(
            "Sparse R-CNN | - | 6",
            _T3,
            "100 42.8 61.2 45.7 26.7 44.6 57.6 134 26.0",
            compared=("sparse-rcnn-6", 100),
            missing=_speed_only("Sparse R-CNN"),
        ),
        _row(
            "Sparse R-CNN | - | 6",
            _T3,
            "300 45.0 63.4 48.2 26.9 47.2 59.5 152 25.4",
            compared=("sparse-rcnn-6", 300),
            missing=_speed_only("Sparse R-CNN"),
        ),
        _row(
            "CF-QRCNN | - | 2",
            _T3,
            "100 43.0 61.3 46.8 28.3 45.7 55.5 142 34.1",
            compared=("cf-qrcnn", 100),
            missing=_speed_only("CF-QRCNN"),
        ),
        _row(
            "CF-QRCNN | - | 2",
            _T3,
            "300 44.6 63.1 48.9 29.5 47.4 57.5 148 33.6",
            compared=("cf-qrcnn", 300),
            missing=_speed_only("CF-QRCNN"),
        ),
        _row("ASAG-S | P3-6 | 1", _T3, _S100[0], "asag-s-100"),
        _row("ASAG-S | P3-6 | 1", _T3, _S300[0], "asag-s-300"),
        _row(
            "Deformable DETR, 50 epochs | - | 6",
            _T3,
            "300 44.5 63.6 48.7 27.1 47.6 59.6 173 19.0",
            compared=("deformable-detr-6", 300),
            missing=_speed_only("Deformable DETR"),
        ),
        _row(
            "Deformable DETR+, 50 epochs | - | 6",
            _T3,
            "300 46.2 64.7 49.0 28.3 49.2 61.5 173 19.0",
            compared=("deformable-detr-6", 300),
            missing=_speed_only("Deformable DETR"),
        ),
        _OURS_D,
        _row(
            "AdaMixer | - | 6",
            _T3,
            "100 45.6 64.8 49.3 28.8 48.5 60.9 103 23.8",
            "adamixer-6",
            compared=("adamixer-6", 100),
        ),
        _row(
            "AdaMixer | - | 6",
            _T3,
            "300 47.0 66.0 51.1 30.1 50.2 61.8 125 22.2",
            "adamixer-6-300",
            compared=("adamixer-6", 300),
        ),
        _row(
            "AdaMixer, ResNet-101 | - | 6",
            _T3,
            "300 48.0 67.0 52.4 30.0 51.2 63.7 201 17.6",
            missing="no recipe of this project trains AdaMixer on ResNet-101",
        ),
        *_OURS_A,
        _row(
            "ASAG-A, ResNet-101 | P3-6 | 1",
            _T3,
            "296 47.5 66.1 51.2 30.4 50.6 62.6 206 21.3",
            "asag-a-r101-300",
        ),
    ),
)

_FULL = "42.6 60.5 45.8 25.9 45.8 56.9 107 4.9 4.5"
_TABLE_5A = Table(
    number="5a",
    about="the components of ASAG-A: what is left out of it",
    heads=("without",),
    columns=_T5,
    rows=(
        _row("- (all of it)", _T5, _FULL, "asag-a-100"),
        _row(
            "dynamic queries",
            _T5,
            "",
            "5a.fixed-queries",
            instead="fixed-queries",
            gains="dynamic queries add 2.0 AP",
            gain=-2.0,
        ),
        _row(
            "Query Weighting",
            _T5,
            "",
            "5a.no-query-weighting",
            gains="Query Weighting adds 2.7 AP",
            gain=-2.7,
        ),
        _row(
            "auxiliary heads",
            _T5,
            "",
            "5a.no-auxiliary-heads",
            gains="auxiliary heads add 1.0 AP",
            gain=-1.0,
        ),
        _row(
            "replaced anchors",
            _T5,
            "",
            "5a.keep-anchors",
            instead="keep-anchors",
            gains="kept anchors bring no AP, and more anchors",
            gain=0.0,
        ),
    ),
)


def _thresholds(
    number: tuple[tuple[float, float, str], ...], columns: tuple[str, ...], role: str
) -> tuple[Row, ...]:
    return tuple(
        _row(f"{high:g} | {low:g}", columns, of_row, role, changes={HIGH: high, LOW: low})
        for high, low, of_row in number
    )


_TABLE_5B = Table(
    number="5b",
    about="the confidence thresholds of adaptive probing",
    heads=("eta_h", "eta_l"),
    columns=_T5,
    rows=_thresholds(
        (
            (0.7, 0.3, "41.4 58.9 44.7 22.9 45.0 57.0 99 1.3 0.6"),
            (0.7, 0.2, "41.9 59.7 45.3 24.8 45.2 56.9 104 2.2 1.6"),
            (0.7, 0.1, _FULL),
            (0.7, 0.05, "42.6 60.6 46.1 25.9 45.8 56.8 124 9.9 10.9"),
            (0.8, 0.1, "42.5 60.4 45.8 25.9 45.7 56.9 107 4.9 4.5"),
            (0.7, 0.1, _FULL),
            (0.6, 0.1, "42.5 60.4 45.8 25.9 45.7 56.9 107 4.9 4.5"),
            (0.4, 0.1, "42.5 60.3 45.7 25.2 45.8 56.9 108 4.9 4.5"),
        ),
        _T5,
        "asag-a-100",
    ),
)

_TABLE_5C = Table(
    number="5c",
    about="the side of a patch in cells",
    heads=("size",),
    columns=_T5,
    rows=(
        _row("10", _T5, "42.1 59.8 45.6 24.8 44.7 56.6 106 4.4 3.6", "5c.patch-10"),
        _row("12", _T5, "42.3 60.1 45.9 25.3 45.2 56.8 108 4.9 4.3", "5c.patch-12"),
        _row("its own (15)", _T5, _FULL, "asag-a-100"),
        _row("18", _T5, "42.2 60.1 45.7 24.6 45.3 56.5 105 4.8 4.6", "5c.patch-18"),
    ),
)

_TABLE_5D = Table(
    number="5d",
    about="the NMS threshold of patches",
    heads=("eta_iou",),
    columns=_T5,
    rows=tuple(
        _row(f"{iou:g}", _T5, numbers, "asag-a-100", changes={IOU: iou})
        for iou, numbers in (
            (0.4, "42.5 60.9 45.5 25.3 45.4 57.2 117 7.4 7.3"),
            (0.25, _FULL),
            (0.2, "42.4 60.3 45.6 25.3 45.7 56.8 104 4.3 3.9"),
            (0.1, "42.2 59.9 45.7 24.7 45.8 56.9 98 3.3 2.9"),
        )
    ),
)

_RECALLS = ("AR, 100 queries", "AR, 300 queries")


def _recall_row(label: str, numbers: str, figure: str) -> Row:
    return _row(
        label, _RECALLS, numbers, _A100, figure=figure, roles=dict(zip(_RECALLS, (_A100, _A300), strict=True))
    )


_TABLE_5E = Table(
    number="5e",
    about="average recall of up to 1000 boxes, whatever their class: 3x schedule",
    heads=("boxes",),
    columns=_RECALLS,
    rows=(
        _row("RPN", _RECALLS, "- 61.93", missing="this project has no RPN"),
        _row("CF-QRCNN", _RECALLS, "57.31 63.42", missing=_speed_only("CF-QRCNN")),
        _recall_row("anchors", "45.22 50.21", "AR anchors"),
        _recall_row("proposals", "59.28 64.90", "AR proposals"),
    ),
)

_OF_CROWDS = "asag-s-crowdhuman"
_TABLE_6 = Table(
    number="6",
    about="the thresholds of adaptive probing on persons in crowds (CrowdHuman), ASAG-S",
    heads=("eta_h", "eta_l", "eta_iou"),
    columns=_T6,
    rows=(
        *(
            _row(f"{high:g} | {low:g} | -", _T6, numbers, _OF_CROWDS, changes={HIGH: high, LOW: low})
            for high, low, numbers in (
                (0.7, 0.3, "90.8 44.0 96.4"),
                (0.7, 0.2, "91.2 43.7 96.7"),
                (0.7, 0.1, "91.3 43.5 96.9"),
                (0.7, 0.05, "91.4 43.5 96.9"),
                (0.8, 0.1, "91.3 43.5 96.9"),
                (0.7, 0.1, "91.3 43.5 96.9"),
                (0.6, 0.1, "91.3 43.5 96.9"),
                (0.5, 0.1, "91.2 43.6 96.7"),
            )
        ),
        *(
            _row(f"- | - | {iou:g}", _T6, numbers, _OF_CROWDS, changes={IOU: iou})
            for iou, numbers in (
                (0.4, "90.6 43.7 96.0"),
                (0.25, "91.3 43.5 96.9"),
                (0.2, "91.2 43.8 96.8"),
                (0.1, "90.2 44.4 95.6"),
            )
        ),
        _row("Sparse R-CNN | - | -", _T6, "89.2 48.3 95.9", missing=_speed_only("Sparse R-CNN")),
        _row("Deformable DETR | - | -", _T6, "86.7 54.0 92.5", missing=_speed_only("Deformable DETR")),
    ),
)

_TABLE_7 = Table(
    number="7",
    about="six layers of AdaMixer with Query Weighting and without",
    heads=("detector", "Query Weighting"),
    columns=APS,
    rows=(
        _row("AdaMixer | yes", APS, "39.2 47.7 42.1 21.5 42.2 55.3", "adamixer-6-query-weighting"),
        _row("AdaMixer | no", APS, "42.7 61.5 45.9 24.7 45.4 59.2", "adamixer-6"),
    ),
)

_TABLE_8 = Table(
    number="8",
    about="decoders of several layers",
    heads=("detector", "layers"),
    columns=APS,
    rows=(
        _row("ASAG-A | 1", APS, "42.6 60.5 45.8 25.9 45.8 56.9", "asag-a-100"),
        _row("ASAG-A | 2", APS, "43.2 61.6 46.9 25.6 46.4 59.0", "8.two-layers"),
        _row("AdaMixer | 6", APS, "42.7 61.5 45.9 24.7 45.4 59.2", "adamixer-6"),
    ),
)

_TABLE_A1 = Table(
    number="A-1",
    about="ASAG-A with denoising training",
    heads=("denoising",),
    columns=APS,
    rows=(
        _row("no", APS, "42.6 60.5 45.8 25.9 45.8 56.9", "asag-a-100"),
        _row("yes", APS, "43.1 60.2 46.7 25.1 45.8 58.4", "a-1.denoising"),
    ),
)

TABLES: dict[str, Table] = {
    table.number: table
    for table in (
        *(_TABLE_1, _TABLE_2, _TABLE_3, _TABLE_4),
        *(_TABLE_5A, _TABLE_5B, _TABLE_5C, _TABLE_5D, _TABLE_5E),
        *(_TABLE_6, _TABLE_7, _TABLE_8, _TABLE_A1),
    )
}
"""The tables by their numbers."""
