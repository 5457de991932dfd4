"""The model card of a bundle: `README.md` beside `manifest.json`, as model hubs and people read it.

It is written from the manifest alone.  Nothing reads it again, so it may be edited, or be missing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from asag_deploy.bundle.manifest import Level, Manifest, distinct_names

MODEL_CARD = "README.md"

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~&$!])")
"""What Markdown takes for more than a letter."""
_MODES = {
    "exact": "exact: it probes as far as anchors ask for a closer look",
    "fast": "fast: it probes fewer patches, and stops earlier",
}


def model_card(manifest: Manifest) -> str:
    """Write the model card of a bundle as Markdown, beginning with the front matter of Hugging Face in YAML.

    Whatever the manifest says of its parity is taken as far as it is understood.  No licence is named, since
    a bundle does not know that of its weights.
    """
    parts = [
        _front_matter(manifest),
        f"# {_text(manifest.variant)}\n\n" + "\n\n".join(_introduction(manifest)),
        "## Run it\n\n" + _usage(),
        f"## Classes\n\n{_classes(manifest)}",
        "## What it takes and gives\n\n" + "\n".join(f"- {line}" for line in _interface(manifest)),
        *_reports(manifest.parity),
        "## Limits\n\n" + "\n".join(f"- {line}" for line in _limits(manifest)),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(manifest: Manifest) -> str:
    tags = ["asag", "onnx", "adaptive-probing", manifest.precision]
    if not manifest.trained:
        tags.append("untrained")
    fields = {
        "library_name": "asag-deploy",
        "pipeline_tag": "object-detection",
        "tags": tags,
        "model_name": manifest.variant,
    }
    # JSON is YAML, and quotes whatever a name may hold.
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in fields.items()]
    return "\n".join(["---", *lines, "---"])


def _introduction(manifest: Manifest) -> Iterator[str]:
    if not manifest.trained:
        yield (
            "**This network is untrained: its weights are random.** Everything runs, and takes the time "
            "that a trained one takes, but the detections mean nothing."
        )
    if manifest.parity.get("passed") is False:
        yield (
            "**This bundle failed its gate:** it does not compute what the network computes, or quantising "
            "it cost too much. It was kept to be looked at, not to be used."
        )
    yield (
        f"An ASAG object detector ([Fu et al., ICCV 2023](https://arxiv.org/abs/2308.09242)), exported to "
        f"static ONNX graphs by {_text(manifest.producer)}. ASAG has one decoder layer and *adaptive "
        "probing*: it predicts a few anchors on the coarse feature maps, and looks at the finer ones only "
        "where those anchors ask for it. The runtime decides image by image how far to go."
    )


def _usage() -> str:
    return (
        "Install a wheel of asag-deploy, or asag-deploy from a clone (`pip install .` there). Then\n\n"
        "```\nasag-detect . photos/ --output-dir out/ --json "
        "out/results.json\n```\n\n"
        "```python\nfrom asag_deploy import Detector\n\n"
        'with Detector.load(".") as detector:\n    found = detector("street.jpg")\n'
        "    print(found.xyxy, found.confidence, found.names)\n```\n\n"
        "`.` stands for this folder."
    )


def _classes(manifest: Manifest) -> str:
    names = distinct_names(manifest.categories)
    said = (f"{_text(name)} ({c.id})" for name, c in zip(names, manifest.categories, strict=True))
    counted = "one class" if len(names) == 1 else f"{len(names)} classes"
    return f"{counted}, each with its id in the data set: {', '.join(said)}."


def _interface(manifest: Manifest) -> Iterator[str]:
    before, probing, after = manifest.preprocessing, manifest.probing, manifest.postprocessing
    yield (
        f"Pictures, RGB: the shorter side is resized to {before.shorter_side} pixels, or less where the "
        f"longer would exceed {before.longer_side}; values 0 to 255 are normalised by mean "
        f"{_numbers(before.mean)} and standard deviation {_numbers(before.std)}; zeros fill the right and "
        f"the bottom up to a multiple of {before.size_divisor}. The runtime does all this."
    )
    levels: Sequence[Level] = [level.level for level in probing.levels]
    yield f"Levels that can be probed: {', '.join(levels) or 'none'}, {_MODES[probing.mode]}."
    yield (
        f"Anchors that reach the decoder: {probing.anchor_cap} at most, and {probing.anchor_floor} at least "
        "where there are so many."
    )
    nms = "no NMS" if after.nms_iou is None else f"NMS within a class over an IoU of {after.nms_iou:g}"
    yield (
        f"Detections: the best {after.max_detections} of each picture, boxes x1, y1, x2, y2 in its pixels, "
        f"{nms}."
    )
    yield f"Precision: {_text(manifest.precision_in_words)}; ONNX opset {manifest.opset}."
    if manifest.head != "main":
        yield f"Decoder: the parallel head {_text(manifest.head)}."


def _reports(parity: Mapping[str, Any]) -> Iterator[str]:
    """Yield a section for each report that the manifest holds."""
    quantization = parity.get("quantization")
    if isinstance(quantization, Mapping):
        yield "## What INT8 costs\n\n" + "\n\n".join(_quantization(quantization))
        of_float32 = parity.get("float32")
        if isinstance(of_float32, Mapping) and of_float32.get("stages"):
            said = "The float32 bundle that this was made of, compared with the network in PyTorch."
            yield f"## Parity of the float32 bundle\n\n{said}\n\n{_parity(of_float32)}"
    elif parity.get("stages"):
        backend, precision = (_text(str(parity.get(name, "?"))) for name in ("backend", "precision"))
        said = f"Compared with the network in PyTorch, with {backend} in {precision}, before it was kept."
        yield f"## Parity\n\n{said}\n\n{_parity(parity)}"


def _parity(report: Mapping[str, Any]) -> str:
    rows = (
        (
            row.get("stage"),
            row.get("output"),
            _measure(row.get("difference"), ".2g"),
            _measure(row.get("tolerance"), ".2g"),
            row.get("cases"),
            _verdict(row),
        )
        for row in _rows(report, "stages")
    )
    table = _table(("graph", "output", "largest difference", "allowed", "cases", ""), rows)
    checks = [f"{_text(str(row.get('name')))}: {_verdict(row)}" for row in _rows(report, "checks")]
    runs = _rows(report, "runs")
    if runs:
        same = sum(row.get("same_stops") is True for row in runs)
        agreements = [row["agreement"] for row in runs if isinstance(row.get("agreement"), (int, float))]
        least = f", and at least {min(agreements):.1%} of the detections are the same" if agreements else ""
        checks.append(f"end to end: {same} of {len(runs)} runs stop where PyTorch does{least}")
    return "\n\n".join([table, *(["\n".join(f"- {check}" for check in checks)] if checks else [])])


def _quantization(report: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"{report.get('convolutions')} convolutions and {report.get('products')} matrix products are in "
        f"INT8, calibrated on {report.get('pictures')} pictures, with activations in "
        f"{_text(str(report.get('activations')))}."
    )
    ratios = report.get("signal_to_noise")
    if isinstance(ratios, Mapping) and ratios:
        ratios_shown = ((name, _measure(value, ".1f")) for name, value in ratios.items())
        least = report.get("least_signal_to_noise")
        yield _table(("result", f"signal to noise in dB (at least {least})"), ratios_shown)
    pairs = _rows(report, "accuracy")
    if pairs:
        most = report.get("most_loss")
        rows = (
            (
                row.get("backend"),
                row.get("images"),
                *(_measure(row.get(name), ".4f") for name in ("float32", "int8", "loss")),
            )
            for row in pairs
        )
        yield _table(("backend", "images", "AP before", "AP in INT8", f"loss (at most {most})"), rows)
    else:
        yield "What it costs in AP was not measured."


def _limits(manifest: Manifest) -> Iterator[str]:
    yield (
        "It finds only the classes above, in pictures like those that it was trained on; a confidence is a "
        "score, not a probability."
    )
    if manifest.probing.levels:
        yield (
            "The time that a picture takes depends on what is in it: many small objects make it probe more. "
            "`--max-level` and `--deadline-ms` bound that, at some cost in recall."
        )
    else:
        yield "It cannot probe, so small objects are found less often."
    yield (
        "A bundle does not know the licence of its weights, nor the data they were trained on: whoever "
        "publishes it adds them to this card, `license:` to the lines at its top."
    )
    yield "Graphs are programs: run bundles from those you trust."


def _rows(report: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    rows = report.get(name)
    return [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, (list, tuple)) else []


def _verdict(row: Mapping[str, Any]) -> str:
    return "holds" if row.get("passed") is True else "**failed**"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head)]
    shown = [[cell if cell == "**failed**" else _text(str(cell)) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [*lines, *shown])


def _measure(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, (int, float)) else "?"


def _numbers(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


def _text(text: str) -> str:
    """Return text that Markdown shows as it is, in one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))
