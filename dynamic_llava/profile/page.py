"""The pages of docs/results that hold a set's results, and the lines of JSON beside them."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dynamic_llava.profile.curve import curve_report
from dynamic_llava.profile.flops import decoding_report, prefill_report
from dynamic_llava.profile.goals import GPU_GOALS, Goal, goals_report
from dynamic_llava.profile.inference_memory import memory_report
from dynamic_llava.profile.measurement_set import Found
from dynamic_llava.profile.paper import paper_report
from dynamic_llava.profile.presets import PRESETS, WAYS
from dynamic_llava.profile.report import Report, device_name, measured_on
from dynamic_llava.profile.tokens import tokens_report

NOMINAL_GPU = "NVIDIA H200"
"""The GPU that the goals are for; its page says "not measured" until it was."""


def write_benchmark(found: Found, goals: Sequence[Goal], folder: Path, command: str) -> Iterator[Path]:
    """Write the page and the JSON of a finished set; yields the paths."""
    about = measured_on(found.device)
    target = goals_report(goals, found.values)
    reports, calculated = [target, *found.reports], calculated_reports()
    name = device_name(found.device)
    limits = (
        None
        if found.limits is None
        else {"copy": found.limits.bytes_per_second, "matmul": found.limits.flops_per_second}
    )
    page = [f"# Times and memory on {name}", "", _about_text(about, command, found.dtype), ""]
    page += [f"Left out: {text}" for text in found.left_out]
    for report in reports:
        page += ["", f"## {report.title}", "", report.markdown()]
    page += ["", "# Calculated, for any device"]
    for report in calculated:
        page += ["", f"## {report.title}", "", report.markdown()]
    stem = folder / f"benchmark_{slug(name)}"
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "about": about,
        "dtype": str(found.dtype),
        "limits": limits,
        "values": found.values,
        "left_out": found.left_out,
        "rows": [{"report": report.name, **row} for report in [*reports, *calculated] for row in report.rows],
    }
    for path, text in (
        (stem.with_suffix(".md"), "\n".join(page) + "\n"),
        (stem.with_suffix(".json"), json.dumps(content, indent=1) + "\n"),
    ):
        path.write_text(text, encoding="utf-8")
        yield path


def write_unmeasured(folder: Path, device: str = NOMINAL_GPU) -> Path | None:
    """Write the page of a GPU that the set never ran on: every number "not measured". None where it did."""
    path = folder / f"benchmark_{slug(device)}.md"
    if path.with_suffix(".json").exists():
        return None
    lines = [
        f"# Times and memory on {device}",
        "",
        "Not measured: no such device was at hand. `bash scripts/benchmark.sh` on one replaces this page.",
        "",
        "## Goals",
        "",
        goals_report(GPU_GOALS, {}).markdown(),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def calculated_reports() -> list[Report]:
    """Return what needs no device: the paper's tables, recomputed, and the curves of Fig. 1."""
    table4 = PRESETS["table4"]
    memory = [memory_report(PRESETS[name], WAYS, 2) for name in ("table4", "7b-b8")]
    return [prefill_report(), decoding_report(), tokens_report(), paper_report(), *memory, curve_report(table4, 5120)]


def slug(device: str) -> str:
    """Return a device's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _about_text(about: dict[str, Any], command: str, dtype: torch.dtype) -> str:
    versions = ", ".join(f"{key} {value}" for key, value in about.items())
    return (
        f"Weights are random, {dtype}; times are medians with quartiles after a warm-up, ratios are of runs by turns "
        f"in one process.\n\nCommand: `{command}`. {versions}."
    )
