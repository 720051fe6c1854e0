"""Tables from measured rows: aligned markdown, mean and 95 % interval over seeds (standard library only).

A *result* is what one seed writes to results.json: {"seed", "rows": [{"key", "title", "note", "metrics": {...}}],
"overlap": [...], ...}; metrics are plain numbers, a missing one is printed as "-".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dynamic_llava.eval.metrics.seeds import mean_and_interval
from dynamic_llava.eval.writing import MISSING, markdown


@dataclass(frozen=True)
class MetricColumn:
    """One column of a table."""

    key: str
    """Name of the metric."""
    header: str
    """Title of the column."""
    digits: int = 1
    """Digits after the point."""
    scale: float = 1.0
    """Factor from the stored unit to the printed one (100 for shares printed in percent)."""


@dataclass(frozen=True)
class Cell:
    """Mean over seeds and half-width of its 95 % interval (None for a single seed)."""

    mean: float
    half: float | None
    values: tuple[float, ...]


ANSWER_TAIL = (MetricColumn("accuracy/all", "all", 1, 100), MetricColumn("pope_f1", "F1 (POPE)", 1, 100))
DESCRIPTION_COLUMNS = (
    MetricColumn("ppl", "PPL", 3),
    MetricColumn("attribute_recall", "recall", 1, 100),
    MetricColumn("description_tokens", "tokens", 1),
    MetricColumn("keep_image", "image kept", 1, 100),
    MetricColumn("keep_output_forced", "output kept, forced", 1, 100),
    MetricColumn("keep_output_generated", "generating", 1, 100),
    MetricColumn("slots", "slots", 1, 100),
    MetricColumn("forced/relation", "relations, forced", 1, 100),
    MetricColumn("forced/count", "counts, forced", 1, 100),
    MetricColumn("said/relation", "relations", 1, 100),
    MetricColumn("said/count", "counts", 1, 100),
)
COST_COLUMNS = (
    MetricColumn("image_tokens_per_layer", "image tokens/layer"),
    MetricColumn("prefill_gflop_exact", "GFLOP, exact", 3),
    MetricColumn("prefill_gflop_paper", "Eq. 13", 3),
    MetricColumn("kv_kib", "KV KiB, filled"),
    MetricColumn("kv_allocated_kib", "allocated"),
    MetricColumn("prefill_ms", "prefill ms", 1),
    MetricColumn("decode_ms", "decode ms/token", 2),
)
README_COLUMNS = (
    MetricColumn("accuracy/all", "short answers, %", 1, 100),
    MetricColumn("ppl", "description PPL", 3),
    MetricColumn("attribute_recall", "recall, %", 1, 100),
    MetricColumn("image_tokens_per_layer", "image tokens/layer"),
    MetricColumn("slots", "slots, %", 1, 100),
    MetricColumn("forced/count", "late counts, %", 1, 100),
    MetricColumn("kv_kib", "KV KiB"),
)
OVERLAP_COLUMNS = (
    MetricColumn("precision", "precision", 1, 100),
    MetricColumn("recall", "recall", 1, 100),
    MetricColumn("iou", "IoU", 1, 100),
    MetricColumn("objects_hit", "objects hit", 1, 100),
    MetricColumn("kept_share", "patches kept", 1, 100),
    MetricColumn("object_share", "patches with an object", 1, 100),
)


def answer_columns(rows: Sequence[dict[str, Any]]) -> tuple[MetricColumn, ...]:
    """Columns of the short answers: one per kind of question found in the rows, then all kinds and F1."""
    kinds: list[str] = []
    for row in rows:
        for key in row["metrics"]:
            kind = key.removeprefix("accuracy/")
            if kind != key and kind != "all" and kind not in kinds:
                kinds.append(kind)
    heads = tuple(MetricColumn(f"accuracy/{kind}", kind.replace("_", " "), 1, 100) for kind in kinds)
    return heads + ANSWER_TAIL


def aggregate(results: Sequence[dict[str, Any]], part: str = "rows") -> list[dict[str, Any]]:
    """Rows of several seeds as one: the metrics become Cells over the seeds that have the value.

    Order, titles and notes are those of the first seed that has the row. ValueError when nothing is given.
    """
    if not results:
        raise ValueError("no results were given; give the results.json of at least one seed")
    merged: dict[str, dict[str, Any]] = {}
    for result in results:
        for row in result.get(part, []):
            entry = merged.setdefault(
                row["key"], {"key": row["key"], "title": row["title"], "note": row.get("note", ""), "metrics": {}}
            )
            for name, value in row["metrics"].items():
                if value is not None:
                    entry["metrics"].setdefault(name, []).append(float(value))
    for entry in merged.values():
        entry["metrics"] = {name: _cell(values) for name, values in entry["metrics"].items()}
    return list(merged.values())


def _cell(values: list[float]) -> Cell:
    mean, half = mean_and_interval(values)
    return Cell(mean, half, tuple(values))


def table(rows: Sequence[dict[str, Any]], columns: Sequence[MetricColumn], *, first: str = "row") -> str:
    """Markdown table of aggregated rows; columns that no row fills, and rows without any column, are left out."""
    filled = [column for column in columns if any(column.key in row["metrics"] for row in rows)]
    lines = [[first, *(column.header for column in filled)]]
    for row in rows:
        cells = [_text(row["metrics"].get(column.key), column) for column in filled]
        if any(cell != MISSING for cell in cells):
            lines.append([row["title"].replace("|", r"\|"), *cells])
    return markdown(lines)


def _text(cell: Cell | None, column: MetricColumn) -> str:
    if cell is None:
        return MISSING
    text = f"{cell.mean * column.scale:.{column.digits}f}"
    return text if cell.half is None else f"{text} ± {cell.half * column.scale:.{column.digits}f}"


def notes(rows: Sequence[dict[str, Any]]) -> str:
    """One line of explanation per row that has one, as a markdown list."""
    return "\n".join(f"- **{row['title']}**: {row['note']}" for row in rows if row["note"])
