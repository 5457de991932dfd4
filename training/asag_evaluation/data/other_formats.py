"""What a file is that is no COCO annotation file: other tools' formats, by their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asag_deploy.downloads import LFS_POINTER, is_web_page

_EXPORT = "export it as COCO from the tool that wrote it"

_KEYS = (
    ({"shapes", "imagePath"}, "LabelMe's JSON of one image", _EXPORT),
    ({"_via_img_metadata"}, "a project of the VGG Image Annotator", _EXPORT),
    ({"samples", "media_type"}, "FiftyOne's JSON", _EXPORT),
    ({"type", "features"}, "GeoJSON", "cut it up into pictures and convert it"),
    ({"size", "objects", "tags"}, "Supervisely's JSON of one image", _EXPORT),
    ({"labels", "samples"}, "FiftyOne's JSON", _EXPORT),
    ({"database", "version"}, "ActivityNet's JSON", "convert it to COCO"),
)

_PANOPTIC = "it is COCO's panoptic form, without objects: take the file of instances of the same images"


def other_object(content: Mapping[str, Any]) -> str | None:
    """Return what a JSON object is, and what to do, if it is known and not COCO's."""
    annotations = content.get("annotations")
    if isinstance(annotations, list):
        first = annotations[0] if annotations and isinstance(annotations[0], dict) else {}
        return _PANOPTIC if "segments_info" in first and "bbox" not in first else None
    return next((f"it is {name}: {remedy}" for keys, name, remedy in _KEYS if keys <= content.keys()), None)


def other_list(content: list[Any]) -> str:
    """Return what a JSON list is, and what to do."""
    first = content[0] if content and isinstance(content[0], dict) else {}
    if {"image_id", "score"} <= first.keys():
        return "it is a list of detections (COCO results): give the annotations that they are compared with"
    if {"image_id", "bbox"} <= first.keys():
        return "it is the list of annotations alone: put it into an object with images and categories"
    if "completions" in first or {"data", "annotations"} <= first.keys():
        return f"it is Label Studio's JSON: {_EXPORT}"
    if "Label" in first or "data_row" in first:
        return f"it is Labelbox's JSON: {_EXPORT}"
    return "it holds a list, where COCO has an object with images, annotations and categories"


def other_text(text: str) -> str | None:
    """Return what a text is that is no JSON, and what to do, if it is known."""
    start = text.lstrip("\ufeff \t\r\n")[:4096]
    if not start:
        return "it is empty: write it again"
    if start.startswith(LFS_POINTER.decode()):
        return "it is a Git LFS pointer, not the file itself: get that with `git lfs pull`"
    if is_web_page(start.encode(errors="replace")):
        return "it is a web page: download the file itself"
    if start.startswith("<"):
        if "<annotation>" in start:
            return "it is Pascal VOC's XML of one image: convert the whole data set with `asag-data voc`"
        return f"it is XML, perhaps CVAT's: {_EXPORT}"
    lines = start.splitlines()
    if [line[:1] for line in lines[:2]] == ["{", "{"] and lines[0].rstrip().endswith("}"):
        if '"gtboxes"' in lines[0]:
            return "it is CrowdHuman's .odgt: convert it with `asag-data crowdhuman`"
        return "it holds one JSON object a line, where COCO has one object in all: convert it"
    parts = lines[0].split()
    if len(parts) >= 5 and all(_is_number(part) for part in parts):
        return "it is YOLO's text of one image: convert the whole data set with `asag-data yolo`"
    if lines[0].count(",") >= 4 and not set(lines[0]) & set("{["):
        return f"it is a table with commas (CSV): {_EXPORT}"
    return None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
