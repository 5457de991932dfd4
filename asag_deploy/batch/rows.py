"""The rows of the results: one a picture, with what was found in it, or why nothing could be."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from asag_deploy.detections import Detections

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = (
    "path",
    "width",
    "height",
    "boxes",
    "scores",
    "labels",
    "names",
    "exit_level",
    "stop",
    "patches",
    "anchors",
    "preprocess_ms",
    "total_ms",
    "error",
    "bundle",
)


_LEAST_BYTES = 12
"""Of a Parquet file; a disk that loses its power may leave an empty one."""


def is_whole(size: int | None) -> bool:
    """Tell whether a file of results counts, by its size; None is no file."""
    return size is not None and size >= _LEAST_BYTES


def schema() -> pa.Schema:
    """Return the columns of the results, with their types.

    boxes: x1, y1, x2, y2 each in pixels of the original picture, best first; labels: indices of classes in
    the bundle, as `Detections.class_id`; patches: how many were predicted on; anchors: how many reached the
    decoder; error: None for a picture that was detected in, and then alone the rest is there.
    """
    import pyarrow as pa

    types = {
        "path": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "boxes": pa.list_(pa.list_(pa.float32())),
        "scores": pa.list_(pa.float32()),
        "labels": pa.list_(pa.int32()),
        "names": pa.list_(pa.string()),
        "exit_level": pa.string(),
        "stop": pa.string(),
        "patches": pa.int32(),
        "anchors": pa.int32(),
        "preprocess_ms": pa.float32(),
        "total_ms": pa.float32(),
        "error": pa.string(),
        "bundle": pa.string(),
    }
    return pa.schema([(name, types[name]) for name in COLUMNS])


def found_row(path: str, found: Detections, bundle: str) -> dict[str, Any]:
    """Return the row of a picture that was detected in; bundle: its fingerprint."""
    height, width = found.original_shape
    return {
        "path": path,
        "width": int(width),
        "height": int(height),
        "boxes": found.xyxy.tolist(),
        "scores": found.confidence.tolist(),
        "labels": found.class_id.tolist(),
        "names": found.names,
        "exit_level": str(found.trace.exit_level),
        "stop": found.trace.stop.value,
        "patches": sum(level.patches for level in found.trace.levels),
        "anchors": found.trace.anchor_count,
        "preprocess_ms": found.times_ms.get("preprocess"),
        "total_ms": found.times_ms.get("total"),
        "error": None,
        "bundle": bundle,
    }


def failed_row(path: str, error: str, bundle: str) -> dict[str, Any]:
    """Return the row of a picture that gave nothing, with the sentence that says why."""
    return {**dict.fromkeys(COLUMNS), "path": path, "error": error, "bundle": bundle}


def as_parquet(rows: Sequence[dict[str, Any]]) -> bytes:
    """Return rows as a Parquet file."""
    import pyarrow as pa
    from pyarrow.parquet import write_table

    file = io.BytesIO()
    write_table(pa.Table.from_pylist(list(rows), schema()), file, compression="zstd")
    return file.getvalue()


def count_errors(file: Any) -> int:
    """Count the pictures with an error in an open file of results, by its footer."""
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file) as table:
        metadata = table.metadata
        column = COLUMNS.index("error")
        # Lists have several leaves each, but every column's name begins its path.
        leaves = [metadata.schema.column(i).path.partition(".")[0] for i in range(metadata.num_columns)]
        leaf = leaves.index(COLUMNS[column])
        return sum(
            metadata.row_group(i).num_rows - metadata.row_group(i).column(leaf).statistics.null_count
            for i in range(metadata.num_row_groups)
        )
