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

README_ROWS = ("control", "dynamic_image", "dynamic", "fastv", "random_image", "inside_random", "inside_alternate")
"""Rows that the README shows."""

DESCRIPTION_INTRO = (
    "Perplexity of the reference descriptions (teacher-forced); recall of objects stated with size, colour and shape "
    "in generated descriptions; their length; image and output tokens that stay from the sparse layer on (%), under "
    "teacher forcing and in generation."
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
        f"## Descriptions\n\n{DESCRIPTION_INTRO}\n\n" + table(rows, DESCRIPTION_COLUMNS, escape=escape),
        f"## Cost\n\n{_cost_intro(results)}\n\n" + table(rows, COST_COLUMNS, escape=escape),
        "## Kept patches and objects\n\nPercent; one question per image.\n\n"
        + table(overlap, OVERLAP_COLUMNS, escape=escape),
        rivals_section(compared, escape=escape),
        "## Cached = uncached\n\n" + _agreement(results),
        "## Targets\n\n" + target_table(results, settings, escape=escape),
        "## Rows\n\n" + notes([*rows, *overlap]),
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
    head = f"# The tiny world, measured\n\nGenerated from results.json of `{command}`. {_environment(results)}"
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


def _lead(row: str, metric: str, scale: float = 1.0) -> Callable[[Metrics], float]:
    """Dynamic I|T minus another row."""
    return lambda m: scale * (m["dynamic"][metric] - m[row][metric])


def _lag(row: str, metric: str, scale: float = 1.0) -> Callable[[Metrics], float]:
    """Another row minus Dynamic I|T."""
    return lambda m: scale * (m[row][metric] - m["dynamic"][metric])


def _percent(row: str, metric: str) -> Callable[[Metrics], float]:
    return lambda m: 100 * m[row][metric]


def targets(settings: SparsityConfig) -> list[MeanTarget]:
    """The targets for the keep rates in `settings`."""
    image, output = 100 * settings.image_keep_rate, 100 * settings.output_keep_rate
    points = "accuracy/all", 100
    return [
        MeanTarget("accuracy, dense control minus Dynamic I|T (points)", _lag("control", *points), most=2),
        MeanTarget("accuracy, Dynamic I|T minus FastV-like (points)", _lead("fastv", *points), least=6),
        MeanTarget("accuracy, Dynamic I|T minus random image (points)", _lead("random_image", *points), least=20),
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
        MeanTarget("objects hit by the kept patches (%)", _percent("overlap/dynamic", "objects_hit"), least=97),
    ]  # fmt: skip


def metrics_of(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """One seed's results.json as row key -> metrics."""
    metrics = {row["key"]: row["metrics"] for row in result["rows"]}
    metrics |= {f"overlap/{row['key']}": row["metrics"] for row in result.get("overlap", [])}
    return metrics | {"training": result.get("training", {})}


def target_table(results: Sequence[Mapping[str, Any]], settings: SparsityConfig, *, escape: bool = True) -> str:
    """Markdown table of the targets over the given seeds; a target whose row was not run says so."""
    lines = [["target", "bound", "measured", "verdict"]]
    per_seed = [metrics_of(result) for result in results]
    for target in targets(settings):
        statement = target.statement.replace("|", r"\|") if escape else target.statement
        try:
            mean, half = mean_and_interval([target.value(metrics) for metrics in per_seed])
        except KeyError:
            lines.append([statement, target.bounds(), "-", "not run"])
            continue
        text = f"{mean:.{target.digits}f}" + ("" if half is None else f" ± {half:.{target.digits}f}")
        lines.append([statement, target.bounds(), text, "met" if target.met(mean) else "MISSED"])
    return markdown(lines)
