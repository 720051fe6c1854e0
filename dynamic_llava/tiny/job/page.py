"""The tiny world's report: its targets, all tables of a job as text, and the page docs/results/tiny.md.

A target is a number with its bounds that the tiny world must show; the mean over seeds meets it or not.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamic_llava.config import SparsityConfig
from dynamic_llava.eval.metrics.seeds import mean_and_interval
from dynamic_llava.eval.writing import markdown
from dynamic_llava.files import replace_file, writing
from dynamic_llava.tiny.job.rivals import compared_in, rivals_section
from dynamic_llava.tiny.job.rows import other_rate
from dynamic_llava.tiny.job.tables import (
    COST_COLUMNS,
    DESCRIPTION_COLUMNS,
    OVERLAP_COLUMNS,
    README_COLUMNS,
    aggregate,
    answer_columns,
    notes,
    table,
)

ANALYSIS = "<!-- analysis: written by hand, kept when the page is generated again -->"
"""Line of a results page below which nothing is generated."""

README_START, README_END = "<!-- tiny-table:start -->", "<!-- tiny-table:end -->"
"""Lines of the README between which its table is generated."""

README_ROWS = (
    "control", "dynamic_image", "dynamic", "fastv", "random_image", "inside_random", "inside_alternate", "inside_sinks",
    "inside_recent",
)  # fmt: skip
"""Rows that the README shows."""

WINDOWS = {"sinks": "sinks + window", "recent": "random + window"}
"""Beginning of a row's key, behind "inside_" -> the rule that it drops output tokens by."""

DESCRIPTION_INTRO = (
    "Perplexity of the reference descriptions (teacher-forced); recall of objects stated with size, colour and shape "
    "in generated descriptions; their length; image and output tokens that stay from the sparse layer on (%), under "
    "teacher forcing and in generation. Slots: the share of past output tokens that output tokens see there, under "
    "teacher forcing (%)."
)

STATED = {"late counts, forced": "forced/count", "relations, forced": "forced/relation"}
"""What targets say of the long descriptions -> metric."""

STATED_INTRO = (
    " Relations and counts of the long descriptions, %: forced, the words that tell them and are the likeliest ones "
    "behind the reference text; else the statements that generated descriptions make."
)

Metrics = Mapping[str, Mapping[str, float]]
"""Row key -> metrics of one seed; "overlap/..." are the overlap rows, "training" the realised rates at its end."""


def report_text(
    results: Sequence[Mapping[str, Any]], settings: SparsityConfig, compared: Path | None = None, *, escape: bool = True
) -> str:
    """All tables of the given seeds' results, as markdown; `escape=False` for a terminal.

    `compared`: folder of the comparison with rivals, if any. Raises ValueError when no result is given.
    """
    rows, overlap = aggregate(results), aggregate(results, "overlap")
    parts = [
        f"## Short answers\n\n{_intro(results)}\n\n" + table(rows, answer_columns(rows), escape=escape),
        f"## Descriptions\n\n{_description_intro(rows)}\n\n" + table(rows, DESCRIPTION_COLUMNS, escape=escape),
        f"## Cost\n\n{_cost_intro(results)}\n\n" + table(rows, COST_COLUMNS, escape=escape),
        "## Kept patches and objects\n\nPercent; one question per image.\n\n"
        + table(overlap, OVERLAP_COLUMNS, escape=escape),
        rivals_section(compared, escape=escape),
        "## Cached = uncached\n\n" + _agreement(results),
        "## Targets\n\n" + target_table(results, settings, escape=escape),
        f"## Rows\n\nNumbers in these lines are those of seed {results[0]['seed']}.\n\n" + notes([*rows, *overlap]),
    ]
    return "\n\n".join(part for part in parts if part)


def write_results_page(folder: Path, page: Path, settings: SparsityConfig, command: str) -> Path:
    """Write the results page of a finished job's folder; hand-written analysis on an existing page is kept.

    The pictures of the job's first seed are copied beside the page and shown in it. `command` is what made the run.
    Raises FileNotFoundError when the folder holds no results.json.
    """
    results = read_results(folder, command)
    analysis = ""
    if page.is_file() and ANALYSIS in page.read_text(encoding="utf-8"):
        analysis = page.read_text(encoding="utf-8").split(ANALYSIS, 1)[1].strip()
    named = "The tiny world" if results[0].get("world", "default") == "default" else "The long tiny world"
    head = f"# {named}, measured\n\nGenerated from results.json of `{command}`. {_environment(results)}"
    with writing(page.parent):
        page.parent.mkdir(parents=True, exist_ok=True)
        compared = compared_in(folder, [result["seed"] for result in results])
        pictures = _copy_pictures(folder / f"seed{results[0]['seed']}" / "pictures", compared, page)
    parts = [head, report_text(results, settings, compared), pictures, ANALYSIS, analysis]
    text = "\n\n".join(part for part in parts if part).rstrip() + "\n"
    replace_file(page, text)
    return page


def write_readme_table(folder: Path, readme: Path, command: str) -> Path:
    """Put the main rows of a finished job's folder between the README's two marker lines.

    Raises FileNotFoundError without results.json, and ValueError when the README has no markers.
    """
    results = read_results(folder, command)
    text = readme.read_text(encoding="utf-8")
    if README_START not in text or README_END not in text:
        raise ValueError(f"{readme} has no lines {README_START!r} and {README_END!r}; put them where the table goes")
    rows = [row for row in aggregate(results) if row["key"] in README_ROWS]
    seeds = f"mean over {len(results)} seeds ± 95 % interval" if len(results) > 1 else "one seed"
    caption = (
        f"Measured by `{command}` on unseen images ({results[0]['questions']} questions, {results[0]['descriptions']} "
        f"descriptions, {seeds}). {_environment(results)}"
    )
    before, after = text.split(README_START, 1)[0], text.split(README_END, 1)[1]
    shown = f"{README_START}\n{table(rows, README_COLUMNS)}\n\n{caption}\n{README_END}"
    replace_file(readme, before + shown + after)
    return readme


def read_results(folder: Path, command: str) -> list[dict[str, Any]]:
    """Return the seeds' results of a finished job's folder; FileNotFoundError when it holds no results.json."""
    source = folder / "results.json"
    if not source.is_file():
        raise FileNotFoundError(f"{folder} holds no results.json; run `{command}` first")
    seeds: list[dict[str, Any]] = json.loads(source.read_text(encoding="utf-8"))["seeds"]
    return seeds


def _copy_pictures(source: Path, compared: Path | None, page: Path) -> str:
    """Copy pictures beside the page, as <page>_<picture>.png; returns the section that shows them."""
    shown = []
    for picture in [*sorted(source.glob("*.png")), *(() if compared is None else compared.glob("*.png"))]:
        target = page.with_name(f"{page.stem}_{picture.name}")
        shutil.copyfile(picture, target)
        shown.append(f"![{picture.stem.replace('_', ' ')}]({target.name})")
    return "## Pictures\n\n" + "\n\n".join(shown) if shown else ""


def _intro(results: Sequence[Mapping[str, Any]]) -> str:
    seeds = ", ".join(str(result["seed"]) for result in results)
    first = results[0]
    text = (
        f"Exact-match accuracy by kind, %; {first['questions']} questions and {first['descriptions']} descriptions of "
        f"unseen images per row; seed {seeds}."
    )
    if len(results) > 1:
        text += f" Mean over {len(results)} seeds ± half-width of the 95 % t-interval."
    return text


def _description_intro(rows: Sequence[Mapping[str, Any]]) -> str:
    stated = any("forced/count" in row["metrics"] for row in rows)
    return DESCRIPTION_INTRO + (STATED_INTRO if stated else "")


def _cost_intro(results: Sequence[Mapping[str, Any]]) -> str:
    environments = [result["environment"] for result in results]
    threads = sorted({str(one["threads"]) for one in environments})
    return (
        "FLOPs of the prefill of one description's prompt in the language model, image predictor included (exact: "
        "module shapes, causal; Eq. 13: image tokens only). Key-value bytes per description at its end. Milliseconds "
        f"are of a whole batch of {results[0]['timing_batch']}, on {'/'.join(threads)} CPU thread(s); at this size "
        "they measure overhead more than arithmetic."
    )


def _agreement(results: Sequence[Mapping[str, Any]]) -> str:
    """How many outputs of the cached and the uncached path are token for token the same."""
    found = [result["agreement"] for result in results if result["agreement"]]
    if not found:
        return "Not run."
    parts = []
    for name in ("answers", "descriptions"):
        count = sum(one[name] for one in found)
        same, decided = (
            100 * sum(one[name] * one[f"{name}_{what}"] for one in found) / count
            for what in ("equal", "decisions_equal")
        )
        parts.append(f"{same:.1f} % of {count:.0f} {name} have the same tokens, {decided:.1f} % the same decisions")
    return "Decoding without a cache against decoding with one: " + "; ".join(parts) + "."


def _environment(results: Sequence[Mapping[str, Any]]) -> str:
    kinds = {
        f"torch {one['torch']}, transformers {one['transformers']}, Python {one['python']}, {one['machine']}, "
        f"{one['cores']} cores, commit {one['commit']}"
        for one in (result["environment"] for result in results)
    }
    seconds = [result["seconds"] for result in results]
    return f"{'; '.join(sorted(kinds))}. {sum(seconds) / len(seconds):.0f} s per seed."


@dataclass(frozen=True)
class MeanTarget:
    """One target: a statement about the mean over seeds, and its bounds."""

    statement: str
    value: Callable[[Metrics], float]
    """Reads the number from one seed's metrics; a KeyError means that a row is missing."""
    least: float | None = None
    most: float | None = None
    strict: bool = False
    """Whether a mean that equals a bound misses the target."""
    digits: int = 1
    by_interval: bool = False
    """Whether the interval over seeds decides: a mean whose interval holds a bound is undecided."""

    def verdict(self, mean: float, half: float | None) -> str:
        """Return met, MISSED, or undecided; of one seed, which has no interval, the mean decides."""
        if not self.by_interval or half is None:
            return "met" if self.met(mean) else "MISSED"
        ends = {self.met(mean - half), self.met(mean + half)}
        return "undecided" if len(ends) > 1 else "met" if ends == {True} else "MISSED"

    def met(self, mean: float) -> bool:
        """Whether `mean` lies within the bounds."""
        if self.strict and mean in (self.least, self.most):
            return False
        return (self.least is None or mean >= self.least) and (self.most is None or mean <= self.most)

    def bounds(self) -> str:
        """The bounds in words."""
        low, high = (None if v is None else f"{v:g}" for v in (self.least, self.most))
        if low is not None and high is not None:
            return f"{low} to {high}"
        if low is not None:
            return f"above {low}" if self.strict else f"at least {low}"
        return f"below {high}" if self.strict else f"at most {high}"


def _lead(row: str, metric: str, scale: float = 1.0, learned: str = "dynamic") -> Callable[[Metrics], float]:
    """Dynamic I|T minus another row."""
    return lambda m: scale * (m[learned][metric] - m[row][metric])


def _lag(row: str, metric: str, scale: float = 1.0, learned: str = "dynamic") -> Callable[[Metrics], float]:
    """Another row minus Dynamic I|T."""
    return lambda m: scale * (m[row][metric] - m[learned][metric])


def _percent(row: str, metric: str) -> Callable[[Metrics], float]:
    return lambda m: 100 * m[row][metric]


def targets(settings: SparsityConfig, rates: Sequence[float] = (), *, long: bool = False) -> list[MeanTarget]:
    """The targets for the keep rates in `settings` and Dynamic I|T at the further r_OT `rates`.

    The bounds on short answers are those of the default world; the long one has some on its statements instead.
    """
    points = "accuracy/all", 100
    short = [
        MeanTarget("accuracy, dense control minus Dynamic I|T (points)", _lag("control", *points), most=2),
        MeanTarget("accuracy, Dynamic I|T minus FastV-like (points)", _lead("fastv", *points), least=6),
        MeanTarget("accuracy, Dynamic I|T minus random image (points)", _lead("random_image", *points), least=20),
        MeanTarget("objects hit by the kept patches (%)", _percent("overlap/dynamic", "objects_hit"), least=97),
    ]
    blind = [
        MeanTarget(
            "description PPL, Dynamic I|T / dense control",
            lambda m: m["dynamic"]["ppl"] / m["control"]["ppl"], most=1.06, digits=3,
        ),
        *(
            MeanTarget(
                f"PPL, {name} output minus learned, equal keep", _lag(row, "ppl"), least=0, strict=True, digits=4
            )
            for name, row in (("random", "inside_random"), ("alternate", "inside_alternate"))
        ),
        *(
            MeanTarget(
                f"attribute recall, learned minus {name} output, equal keep (points)",
                _lead(row, "attribute_recall", 100), least=0, strict=True,
            )
            for name, row in (("random", "inside_random"), ("alternate", "inside_alternate"))
        ),
    ]  # fmt: skip
    windows = _window_targets(settings.output_keep_rate, "", long)
    windows += [target for rate in rates for target in _window_targets(rate, other_rate(rate), long)]
    return [*(() if long else short), *blind, *windows, *_keep_targets(settings, rates)]


def _keep_targets(settings: SparsityConfig, rates: Sequence[float]) -> list[MeanTarget]:
    image, output = 100 * settings.image_keep_rate, 100 * settings.output_keep_rate
    others = [
        MeanTarget(
            f"output keep rate, teacher-forced, r_OT {rate:g} (%)",
            _percent(f"dynamic{other_rate(rate)}", "keep_output_forced"), 100 * rate - 8, 100 * rate + 8,
        )
        for rate in rates
    ]  # fmt: skip
    return [
        MeanTarget("image keep rate, end of training (%)", _percent("training", "image"), image - 5, image + 5),
        MeanTarget("output keep rate, end of training (%)", _percent("training", "output"), output - 5, output + 5),
        MeanTarget("image keep rate, inference (%)", _percent("dynamic", "keep_image"), image - 8, image + 8),
        MeanTarget(
            "output keep rate, teacher-forced (%)",
            _percent("dynamic", "keep_output_forced"), output - 8, output + 8,
        ),
        MeanTarget(
            "output keep rate, generating (%)",
            _percent("dynamic", "keep_output_generated"), output - 8, output + 8,
        ),
        *others,
    ]  # fmt: skip


def _window_targets(rate: float, suffix: str, long: bool) -> list[MeanTarget]:
    """What learned admission must show to be worth having: more than simple rules show at equal slots, with certainty.

    `suffix`: of the keys of the rows at this r_OT. What is teacher-forced and what is generated may disagree, so both
    are judged.
    """
    above: dict[str, Any] = {"least": 0, "strict": True, "by_interval": True}
    told = STATED if long else {"attribute recall": "attribute_recall"}
    found = []
    for key, rule in WINDOWS.items():
        row, learned, at = f"inside_{key}{suffix}", f"dynamic{suffix}", f"equal slots, r_OT {rate:g}"
        found.append(MeanTarget(f"PPL, {rule} minus learned, {at}", _lag(row, "ppl", 1, learned), digits=4, **above))
        found += [
            MeanTarget(f"{name}, learned minus {rule}, {at} (points)", _lead(row, metric, 100, learned), **above)
            for name, metric in told.items()
        ]
    return found


def rates_of(result: Mapping[str, Any]) -> list[float]:
    """The further r_OT of a seed's results, from the keys of its rows."""
    keys = [row["key"].removeprefix("dynamic_") for row in result["rows"] if row["key"].startswith("dynamic_")]
    return [float(key) / 100 for key in keys if key.replace(".", "").isdigit()]


def metrics_of(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """One seed's results.json as row key -> metrics."""
    metrics = {row["key"]: row["metrics"] for row in result["rows"]}
    metrics |= {f"overlap/{row['key']}": row["metrics"] for row in result.get("overlap", [])}
    return metrics | {"training": result.get("training", {})}


def target_table(results: Sequence[Mapping[str, Any]], settings: SparsityConfig, *, escape: bool = True) -> str:
    """Markdown table of the targets over the given seeds; a target whose row was not run says so."""
    lines = [["target", "bound", "measured", "verdict"]]
    per_seed = [metrics_of(result) for result in results]
    for target in targets(settings, rates_of(results[0]), long=results[0].get("world") == "long"):
        statement = target.statement.replace("|", r"\|") if escape else target.statement
        try:
            mean, half = mean_and_interval([target.value(metrics) for metrics in per_seed])
        except KeyError:
            lines.append([statement, target.bounds(), "-", "not run"])
            continue
        text = f"{mean:.{target.digits}f}" + ("" if half is None else f" ± {half:.{target.digits}f}")
        lines.append([statement, target.bounds(), text, target.verdict(mean, half)])
    return markdown(lines)
