"""The report of a training, from its folder: settings, how loss and keep rates went, what it was made with."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dynamic_llava.config.run import RunConfig, flat, target_of
from dynamic_llava.viz import style
from dynamic_llava.viz.page import escaped, facts, paragraph
from dynamic_llava.viz.page_charts import ChartLine, finite_points, line_chart, lines_by_meaning, target_line
from dynamic_llava.viz.run_report import RunReport, flat_facts

METRICS, SETTINGS, ENVIRONMENT = "metrics.jsonl", "config.yaml", "environment.json"
BROKEN = "broken.jsonl"
"""That of data/prepare.py, which needs the package datasets."""
RATES = {
    "image_keep_rate": ("image tokens", style.IMAGE_TOKENS),
    "output_keep_rate": ("output tokens", style.OUTPUT_TOKENS),
    "prompt_keep_rate": ("prompt tokens", style.PROMPT_TOKENS),
}
"""Keep rates as they are logged -> the tokens that they are of, and their colour."""
SMALL_CHARTS = (
    ("tau", "Temperature of the relaxation (tau)"),
    ("learning_rate", "Learning rate"),
    ("distill_loss", "Distillation loss"),
    ("tokens_per_second", "Tokens per second"),
)
"""What is drawn of one training beside its loss and its keep rates, where it is logged -> the chart's title."""
END = 0.2
"""Share of the log, from its end, that means at the end are over."""


def training_report(folder: Path) -> RunReport:
    """Return the report of a training's folder, whether it has ended or not."""
    report = RunReport(folder, "Training")
    lines = report.lines(METRICS)
    steps = [line for line in lines if "lm_loss" in line]
    config, made = report.yaml(SETTINGS), report.object(ENVIRONMENT)
    report.about = _state(folder, lines)
    report.add("In short", SETTINGS, lambda: facts(_in_short(config, steps)))
    report.add(
        "Loss and keep rates", METRICS, lambda: training_charts({report.name: steps}, {report.name: targets_of(config)})
    )
    report.add("Beside them", METRICS, lambda: _small_charts(steps))
    report.add("Last line of the log", METRICS, lambda: facts(flat_facts(steps[-1] if steps else {})))
    report.add("Left out of training", BROKEN, lambda: _broken(report.lines(BROKEN)))
    report.add_pictures("Pictures", "pictures/*.png")
    report.add("Other than the defaults", SETTINGS, lambda: facts(flat_facts(_chosen(config))))
    report.add_settings(SETTINGS)
    report.add_environment(ENVIRONMENT, made)
    return report


def training_charts(
    histories: Mapping[str, Sequence[Mapping[str, Any]]], targets: Mapping[str, Mapping[str, float]]
) -> list[str]:
    """Return the loss of all trainings in one chart, and a chart of the keep rates of each that has some.

    `histories`: title -> logged lines; `targets`: title -> what is aimed at, by the names of keep rates.
    """
    losses = {title: finite_points(lines, "lm_loss") for title, lines in histories.items()}
    ends = ", ".join(f"{title} ends at {points[-1][1]:.4g}" for title, points in losses.items() if points)
    loss = line_chart(lines_by_meaning(losses), f"Language-model loss over steps; {ends}", "step")
    charts = [_chart("Language-model loss", loss)]
    for title, lines in histories.items():
        rates = _rate_lines(lines, targets.get(title, {}))
        said = "; ".join(f"{line.name} {line.note}" for line in rates)
        drawn = line_chart(rates, f"Keep rates of {title} in percent over steps; at the end: {said}", "step", top=100)
        charts.append(_chart(f"Kept, %, {title}" if len(histories) > 1 else "Kept, %", drawn))
    inside = "".join(charts)
    return [f'<div class="row">{inside}</div>'] if inside else []


def _chart(title: str, drawn: Sequence[str]) -> str:
    return f"<article><h3>{escaped(title)}</h3>{''.join(drawn)}</article>" if drawn else ""


def targets_of(config: Mapping[str, Any]) -> dict[str, float]:
    """Return the keep rates that a run's settings aim at, by their names; those that they do not say are left out."""
    method = config.get("method")
    place = method if isinstance(method, Mapping) else {} if method else config.get("sparsity", {})
    found = {name: place.get(name) for name in RATES}
    return {name: value for name, value in found.items() if isinstance(value, float)}


def _rate_lines(lines: Sequence[Mapping[str, Any]], targets: Mapping[str, float]) -> list[ChartLine]:
    """Return the keep rates of a training in percent, each with its target: what was logged, or else what is set."""
    found = []
    for name, (tokens, color) in RATES.items():
        points = finite_points(lines, name, 100)
        if not points:
            continue
        found.append(ChartLine(tokens, points, color, note=f"{_mean_at_end(points):.1f} % at the end"))
        aims = finite_points(lines, target_of(name), 100)
        if not aims and name in targets:
            aims = [(points[0][0], 100 * targets[name]), (points[-1][0], 100 * targets[name])]
        if aims:
            found.append(replace(target_line(f"target of {tokens}", aims, color), note=f"{aims[-1][1]:.4g} %"))
    return found


def _mean_at_end(points: Sequence[tuple[float, float]]) -> float:
    last = points[-max(1, round(END * len(points))) :]
    return sum(value for _, value in last) / len(last)


def _small_charts(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    charts = []
    for key, title in SMALL_CHARTS:
        points = finite_points(steps, key)
        line = [ChartLine(key, points, style.QUIET, note=f"{points[-1][1]:.4g} at the end")] if points else []
        charts.append(_chart(title, line_chart(line, f"{title} over steps", "step")))
    inside = "".join(charts)
    return [f'<div class="row">{inside}</div>'] if inside else []


def _state(folder: Path, lines: Sequence[Mapping[str, Any]]) -> str:
    """Say how far a training has come, as its files tell."""
    steps = [line["step"] for line in lines if isinstance(line.get("step"), int)]
    said = [f"{max(steps)} steps logged"] if steps else []
    seconds = [line["train_runtime"] for line in lines if isinstance(line.get("train_runtime"), (int, float))]
    if (folder / "model" / "config.json").is_file():
        said.append(f"finished in {seconds[-1]:.0f} s" if seconds else "finished")
    else:
        said.append("not finished: there is no model yet; the same command goes on")
    return ", ".join(said)


def _in_short(config: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return the settings that say most, and the keep rates at the end; what a run does not say is left out."""
    known = flat(config)
    names = {
        "base": "model.base", "data": "data.json", "sparsified": "train.sparsity_mode", "sparse layer":
        "sparsity.sparse_layer", "trained": "train.tune", "batch": "train.batch_size", "learning rate":
        "train.learning_rate", "seed": "train.seed",
    }  # fmt: skip
    found = [(name, str(known[key])) for name, key in names.items() if known.get(key) not in (None, "")]
    targets = targets_of(config)
    for name, (tokens, _) in RATES.items():
        points = finite_points(steps, name, 100)
        if points:
            goal = f", target {100 * targets[name]:g} %" if name in targets else ""
            found.append(
                (f"{tokens} kept", f"{_mean_at_end(points):.1f} % (mean over the last fifth of the log){goal}")
            )
    return found


def _chosen(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that are not the defaults."""
    default = flat(asdict(RunConfig()))
    return {name: value for name, value in flat(config).items() if name not in default or value != default[name]}


def _broken(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    if not samples:
        return []
    return [paragraph(f"{len(samples)} samples with a broken or missing image; {BROKEN} lists them.")]
