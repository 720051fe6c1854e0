"""What a benchmark's file of results comes to: a page for people and the same as JSON, as often as wanted.

Standard library only. Built from the lines alone, so a benchmark that was killed at any second has a summary too: its
tables hold what was finished, and every part that is missing is named with the reason.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynamic_llava.files import replace_file
from dynamic_llava.profile.goals import GOALS, goals_report
from dynamic_llava.profile.report import Column, Report
from dynamic_llava.profile.results import RESULTS, read

NOMINAL_GPU = "NVIDIA H200"
"""The GPU that the goals are for; its page says "not measured" until it was."""
COMMAND = "bash scripts/benchmark.sh"
UNKNOWN = "unknown device"


@dataclass
class Found:
    """Everything that the lines of one benchmark say."""

    run: dict[str, Any] = field(default_factory=dict)
    """Set, seconds, parts planned and left out, time of the start."""
    about: dict[str, Any] = field(default_factory=dict)
    """Device, versions and commit."""
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """State, reason and seconds by the part's name, in the order of the plan; those left out too."""
    values: dict[str, float] = field(default_factory=dict)
    reports: list[Report] = field(default_factory=list)
    """Tables with the rows that were finished, the rows' part in each."""

    @property
    def device(self) -> str:
        """The device's name."""
        return self.about.get("device", UNKNOWN)


def found_in(folder: Path) -> Found:
    """Read the results in a benchmark's folder. FileNotFoundError where there are none."""
    found, tables = Found(), {}
    for entry in read(folder / RESULTS):
        part = entry.get("part")
        if "run" in entry:
            found.run = entry["run"]
            for name, seconds, about in found.run["parts"]:
                found.parts[name] = {"part": name, "about": about, "planned": seconds, "state": "not begun"}
        elif "state" in entry:
            found.parts.setdefault(part, {"part": part}).update(entry)
        elif "about" in entry:
            found.about = found.about or entry["about"]
        elif "values" in entry:
            found.values |= entry["values"]
        elif "columns" in entry:
            columns = [Column(*column) for column in entry["columns"]]
            table = Report(entry["report"], entry["title"], columns, [], list(entry["notes"]))
            tables.setdefault(entry["title"], table)
        elif "row" in entry and entry["title"] in tables:
            tables[entry["title"]].rows.append({**entry["row"], "part": part})  # type: ignore[attr-defined]
    for name, seconds, about in found.run.get("left_out", []):
        found.parts[name] = {"part": name, "about": about, "planned": seconds, "state": "left out"}
    for part in found.parts.values():
        if part["state"] == "running":  # the runner says so at the beginning and replaces it at the end
            part |= {"state": "cut off", "reason": "nothing was said after its last result"}
    found.reports = [table for table in tables.values() if table.rows]
    return found


def write_summary(folder: Path) -> list[Path]:
    """Write summary.md and summary.json beside the results, each as a whole or not at all; returns the paths."""
    found = found_in(folder)
    return [_write(folder / "summary.md", page(found)), _write(folder / "summary.json", content(found))]


def publish(folder: Path, target: Path) -> list[Path]:
    """Write the summary as benchmark_<device> into `target`, and the page of the GPU that was never measured.

    Returns the paths. Raises ValueError for a rehearsal, whose numbers mean nothing, and where no device is named.
    """
    found = found_in(folder)
    if found.run.get("set") == "rehearsal":
        raise ValueError(f"{folder} holds a rehearsal, whose numbers mean nothing; publish a run of another set")
    if found.device == UNKNOWN:
        raise ValueError(f"the results in {folder} name no device, so no part has run; run the benchmark again")
    stem = target / f"benchmark_{slug(found.device)}"
    target.mkdir(parents=True, exist_ok=True)
    paths = [_write(stem.with_suffix(".md"), page(found)), _write(stem.with_suffix(".json"), content(found))]
    unmeasured = target / f"benchmark_{slug(NOMINAL_GPU)}.md"
    if not unmeasured.with_suffix(".json").exists():
        paths.append(_write(unmeasured, unmeasured_page()))
    return paths


def unmeasured_page() -> str:
    """Return the page of a GPU that the set never ran on: every number "not measured"."""
    lines = [
        f"# Times and memory on {NOMINAL_GPU}",
        "",
        f"Not measured: no such device was at hand. `{COMMAND}` on one gives this page (docs/profiling.md).",
        "",
        "## Goals",
        "",
        goals_report(GOALS["gpu"], {}).markdown(),
    ]
    return "\n".join(lines) + "\n"


def page(found: Found) -> str:
    """Return the summary for people."""
    name = found.run.get("set")
    rehearsal = "A rehearsal at tiny sizes: that it runs is what counts, its numbers mean nothing.\n"
    lines = [f"# Times and memory on {found.device}", "", *([rehearsal] if name == "rehearsal" else [])]
    versions = ", ".join(f"{key} {value}" for key, value in found.about.items())
    seconds, begun = found.run.get("seconds", 0), found.run.get("begun")
    lines += [
        "Weights are random; times are medians with quartiles after a warm-up. Each part ran in a process of its own. "
        "On a CPU the ways of a table took turns, so that their ratios hold where times do not.",
        "",
        f"Command: `{COMMAND}`, set {name}, {seconds:g} seconds, begun {begun}. {versions}.",
        "",
        "## Parts",
        "",
        _parts_report(found.parts).markdown(),
    ]
    goals = GOALS.get(name or "", ())
    if goals:
        lines += ["", "## Goals", "", goals_report(goals, found.values).markdown()]
    for report in found.reports:
        lines += ["", f"## {report.title}", "", report.markdown()]
        unfinished = {row["part"] for row in report.rows if found.parts.get(row["part"], {}).get("state") != "done"}
        lines += [f"\nThe part {part} did not finish: rows may be missing here." for part in sorted(unfinished)]
    return "\n".join(lines) + "\n"


def content(found: Found) -> str:
    """Return the summary as JSON."""
    goals = goals_report(GOALS.get(found.run.get("set") or "", ()), found.values)
    whole = {
        "run": found.run,
        "about": found.about,
        "parts": list(found.parts.values()),
        "values": found.values,
        "rows": [{"report": report.name, **row} for report in (goals, *found.reports) for row in report.rows],
    }
    return json.dumps(whole, indent=1) + "\n"


def slug(device: str) -> str:
    """Return a device's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _parts_report(parts: Mapping[str, Mapping[str, Any]]) -> Report:
    columns = (
        Column("part", "part"),
        Column("about", "what"),
        Column("state", "state"),
        Column("seconds", "seconds", ".1f"),
        Column("planned", "planned", "g"),
        Column("reason", "reason"),
    )
    rows: Sequence[Mapping[str, Any]] = list(parts.values())
    return Report("parts", "Parts", columns, rows)


def _write(path: Path, text: str) -> Path:
    replace_file(path, text)
    return path
