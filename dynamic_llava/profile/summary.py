"""What a benchmark's file of results comes to: a page for people and the same as JSON, as often as wanted; its goals.

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
from dynamic_llava.profile.results import RESULTS, Column, Report, read


@dataclass(frozen=True)
class Goal:
    """A bound on one measured number."""

    key: str
    """Name of the number among those that were measured."""
    text: str
    bound: float
    at_most: bool = True
    form: str = ".3f"

    def met(self, value: float) -> bool:
        """Return whether a measured value keeps the bound."""
        return value <= self.bound if self.at_most else value >= self.bound


_PREDICTORS = (
    Goal("image_predictor_share", "image predictor and selection / prefill, one 7B layer scaled", 0.01, form=".3%"),
    Goal("output_predictor_share", "output predictor / step, 7B layers scaled", 0.005, form=".3%"),
)
CPU_GOALS = (
    Goal("cache_bytes_256", "allocated cache / (batch x longest row in blocks), 256 generated tokens", 1.02),
    Goal("cache_bytes_1024", "the same, 1,024 tokens", 1.02),
    Goal("cache_bytes_4096", "the same, 4,096 tokens", 1.02),
    Goal(
        "step_cpu_512_both_over_dense",
        "cached step of I|T / of the dense model, the faster engine of each, 512 tokens, batch 8",
        0.6,
    ),
    Goal("step_cpu_512_both_over_image", "cached step of I|T / of image-only, both eager", 1.0),
    Goal("step_more_dropped", "step with 256 kept of 1,024 tokens / of 512, divided by the ratio of bytes", 1.1),
    Goal("prefill_cpu-prefill_over_flops", "sparse / dense prefill time, divided by the ratio of their FLOPs", 1.15),
    Goal("chunked_over_plain", "chunked MaskedSoftmax / plain attention, both passes, 2,048 tokens, 8 heads", 4.0),
    Goal("reference_over_chunked", "Eq. 7 as written / chunked, the same", 2.5, at_most=False),
    Goal("compiled_graphs", "graphs of the compiled step", 1.0, form=".0f"),
    Goal("compiled_breaks", "breaks in it", 0.0, form=".0f"),
    Goal("compiled_same_tokens", "same tokens as eager (1 = yes)", 1.0, at_most=False, form=".0f"),
    Goal("compiled_speedup", "eager / compiled step, hidden 256", 2.0, at_most=False, form=".2f"),
    *_PREDICTORS,
    Goal("output_predictor_bytes", "output predictor / step, by bytes", 0.005, form=".3%"),
)
"""Goals of the set that runs on two CPU cores."""
GPU_GOALS = (
    Goal(
        "step_7b-b1_512_bandwidth",
        "7B, batch 1: compiled I|T step, share of the data sheet's bandwidth, 512 tokens",
        0.75,
        False,
        ".0%",
    ),
    Goal("step_7b-b1_512_ms", "the same in ms a token, on an H200", 3.9, form=".2f"),
    Goal(
        "step_7b-b8_1024_bandwidth",
        "7B, batch 8: compiled I|T step, share of the data sheet's bandwidth, 1,024 tokens",
        0.7,
        False,
        ".0%",
    ),
    Goal(
        "step_7b-b8_1024_speedup",
        "7B, batch 8: compiled I|T step against the faster dense engine, speed-up over the roofline's",
        0.9,
        False,
        ".0%",
    ),
    Goal("prefill_7b-b8_dense_mfu", "7B, batch 8: dense prefill, MFU", 0.6, False, ".0%"),
    Goal("prefill_7b-b8_both_mfu", "7B, batch 8: sparse prefill, MFU", 0.5, False, ".0%"),
    *(
        Goal(
            f"attention_{tokens}_{percent}",
            f"MaskedSoftmax / FlashAttention-2, both passes, {tokens:,} tokens, {percent} % kept, bfloat16",
            1.6,
            form=".2f",
        )
        for tokens in (2048, 4096)
        for percent in (30, 50, 100)
    ),
    Goal("training_mfu", "7B: training step, MFU", 0.4, False, ".0%"),
    *_PREDICTORS,
)
"""Goals of the set that runs on one GPU; the paper's own device reached 46 % of its bandwidth and 51 % of its peak."""
GOALS: dict[str, tuple[Goal, ...]] = {"gpu": GPU_GOALS, "cpu": CPU_GOALS}
"""Goals by the set that measures them; a rehearsal has none."""


def goals_report(goals: Sequence[Goal], values: Mapping[str, float]) -> Report:
    """Return the goals as a table; a number that is not among `values` was not measured."""
    rows: list[dict[str, Any]] = []
    for goal in goals:
        value = values.get(goal.key)
        row: dict[str, Any] = {
            "goal": goal.text,
            "key": goal.key,
            "bound": f"{'at most' if goal.at_most else 'at least'} {format(goal.bound, goal.form)}",
        }
        if value is None:
            row |= {"measured": "not measured", "met": None}
        else:
            row |= {"measured": format(value, goal.form), "value": value, "met": "yes" if goal.met(value) else "no"}
        rows.append(row)
    columns = (Column("goal", "goal"), Column("bound", "bound"), Column("measured", "measured"), Column("met", "met"))
    return Report("goals", "Goals", columns, rows)


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
