"""The report of a comparison, from its folder: quality against cost, the table, what each method was set to."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynamic_llava.eval.compare.table import panels_of
from dynamic_llava.viz import style
from dynamic_llava.viz.page import escaped
from dynamic_llava.viz.page_charts import scatter_chart
from dynamic_llava.viz.run_report import RunReport

RESULT, PAGE = "compare.json", "compare.md"


def comparison_report(folder: Path) -> RunReport:
    """Return the report of a folder that `compare` or `compare-seeds` has written."""
    report = RunReport(folder, "Methods compared")
    found = report.object(RESULT)
    report.about = "the same questions through several methods; the better is higher, the cheaper further left"
    report.add("Quality against cost", RESULT, lambda: quality_charts(found))
    if not found:  # else they are drawn above
        report.add_pictures("Quality against cost", "compare.png")
    report.add_markdown("Table", PAGE)
    report.add_environment(RESULT, found.get("environment"))
    return report


def quality_charts(found: Mapping[str, Any]) -> list[str]:
    """Return a chart for each benchmark and cost of a compare.json; nothing without one."""
    panels = panels_of(found) if found else []
    looks = style.looks(point["name"] for panel in panels for point in panel["points"])
    charts = "".join(
        f'<article><h3>{escaped(panel["title"])}</h3><p class="quiet">{escaped(panel["quality"])}</p>'
        f"{''.join(scatter_chart(panel, looks))}</article>"
        for panel in panels
    )
    return [f'<div class="row">{charts}</div>'] if charts else []
