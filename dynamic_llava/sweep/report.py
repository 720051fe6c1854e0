"""The report of a sweep, from its folder: the table beside the paper's, where each model lies, versions and machine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynamic_llava.viz.page import folded, table
from dynamic_llava.viz.run_report import RunReport

RESULTS, TABLE = "results.json", "table.md"


def sweep_report(folder: Path) -> RunReport:
    """Return the report of a sweep's folder."""
    report = RunReport(folder, "Sweep")
    found = report.object(RESULTS)
    report.about = " - ".join(str(found[name]) for name in ("title", "made_by", "date") if found.get(name))
    report.add_markdown("Table", TABLE)
    report.add("Models", RESULTS, lambda: _models(found))
    report.add_environment(RESULTS, found.get("environment"))
    return report


def _models(found: Mapping[str, Any]) -> list[str]:
    rows = [(row["title"], row["model"]) for row in found.get("rows", ())]
    return folded("where the model of each row lies", [table(("row", "model"), rows, texts=True)]) if rows else []
