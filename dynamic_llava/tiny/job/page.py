"""All tables of the tiny world's job as text, what they say in five lines, and the page docs/results/tiny.md."""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dynamic_llava.config import SparsityConfig
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
from dynamic_llava.tiny.job.targets import judged, target_table

ANALYSIS = "<!-- analysis: written by hand, kept when the page is generated again -->"
"""Line of a results page below which nothing is generated."""

README_START, README_END = "<!-- tiny-table:start -->", "<!-- tiny-table:end -->"
"""Lines of the README between which its table is generated."""

README_ROWS = (
    "control", "dynamic_image", "dynamic", "fastv", "random_image", "inside_random", "inside_alternate", "inside_sinks",
    "inside_recent",
)  # fmt: skip
"""Rows that the README shows."""

DESCRIPTION_INTRO = (
    "Perplexity of the reference descriptions (teacher-forced); recall of objects stated with size, colour and shape "
    "in generated descriptions; their length; image and output tokens that stay from the sparse layer on (%), under "
    "teacher forcing and in generation. Slots: the share of past output tokens that output tokens see there, under "
    "teacher forcing (%)."
)

STATED_INTRO = (
    " Relations and counts of the long descriptions, %: forced, the words that tell them and are the likeliest ones "
    "behind the reference text; else the statements that generated descriptions make."
)

IN_SHORT = "## In short"
"""Heading of what the tables say in five lines."""

SHOWN_MISSES = 3
"""Missed targets that are named in short; it counts the others."""
SHORT_ROWS = {
    "control": "dense control",
    "dynamic": "Dynamic I|T",
    "fastv": "FastV-like",
    "random_image": "random image",
}
"""Rows that are compared in short -> what they are called there."""
LEARNED_ROWS = ("control", "dynamic")
"""Those whose recall and costs are compared in short."""


def in_short(results: Sequence[Mapping[str, Any]], settings: SparsityConfig) -> list[tuple[str, str]]:
    """Return what the given seeds' results say, in five lines: what each is about, and its text.

    What was not measured is left out. ValueError when no result is given.
    """
    rows = {row["key"]: row["metrics"] for row in aggregate(results)}
    goal = f"{100 * settings.image_keep_rate:g} and {100 * settings.output_keep_rate:g} %"
    lines = [
        ("short answers", _each(rows, SHORT_ROWS, "accuracy/all", "{:.1f} %", 100)),
        ("descriptions", "; ".join(filter(None, (
            _each(rows, SHORT_ROWS, "ppl", "{:.3f}", name="perplexity "),
            _each(rows, LEARNED_ROWS, "attribute_recall", "{:.1f} %", 100, "objects stated "),
        )))),
        ("kept", ", ".join(filter(None, (
            _one(rows, "keep_image", "{:.1f} % of image tokens", 100),
            _one(rows, "keep_output_generated", "{:.1f} % of output tokens", 100),
        )))),
        ("cost", "; ".join(filter(None, (
            _each(rows, LEARNED_ROWS, "prefill_gflop_exact", "{:.3f}", name="calculated GFLOP of a prefill "),
            _each(rows, LEARNED_ROWS, "kv_kib", "{:.1f}", name="KiB of keys and values "),
        )))),
        ("targets", _targets_in_short(results, settings)),
    ]  # fmt: skip
    return [(name, f"{text} (aimed at: {goal})" if name == "kept" else text) for name, text in lines if text]


def _each(
    rows: Mapping[str, Any], keys: Iterable[str], metric: str, form: str, scale: float = 1, name: str = ""
) -> str:
    """Return a metric's mean of each row that has it: "dense control 99.0 %, Dynamic I|T 97.7 %", behind its name."""
    said = ", ".join(
        f"{SHORT_ROWS[key]} {form.format(scale * rows[key][metric].mean)}"
        for key in keys
        if metric in rows.get(key, ())
    )
    return name + said if said else ""


def _one(rows: Mapping[str, Any], metric: str, form: str, scale: float = 1) -> str:
    """Return a metric's mean of the learned selection; empty where it has none."""
    found = rows.get("dynamic", {}).get(metric)
    return "" if found is None else form.format(scale * found.mean)


def _targets_in_short(results: Sequence[Mapping[str, Any]], settings: SparsityConfig) -> str:
    found = judged(results, settings)
    missed = [target.statement for target, _, verdict in found if verdict == "MISSED"]
    others = Counter(verdict for *_, verdict in found if verdict not in ("met", "MISSED"))
    met = f"{len(found) - len(missed) - others.total()} of {len(found)} met"
    said = [met, *(f"{count} {verdict}" for verdict, count in others.items())]
    more = [f"and {len(missed) - SHOWN_MISSES} more"] if len(missed) > SHOWN_MISSES else []
    return "; ".join([", ".join(said), *([f"MISSED: {'; '.join(missed[:SHOWN_MISSES])}"] if missed else []), *more])


def report_text(results: Sequence[Mapping[str, Any]], settings: SparsityConfig, compared: Path | None = None) -> str:
    """What the given seeds' results say in short, and all tables of them, as markdown.

    `compared`: folder of the comparison with rivals, if any. Raises ValueError when no result is given.
    """
    rows, overlap = aggregate(results), aggregate(results, "overlap")
    parts = [
        f"{IN_SHORT}\n\n" + "\n".join(f"- **{name}**: {text}" for name, text in in_short(results, settings)),
        f"## Short answers\n\n{_intro(results)}\n\n" + table(rows, answer_columns(rows)),
        f"## Descriptions\n\n{_description_intro(rows)}\n\n" + table(rows, DESCRIPTION_COLUMNS),
        f"## Cost\n\n{_cost_intro(results)}\n\n" + table(rows, COST_COLUMNS),
        "## Kept patches and objects\n\nPercent; one question per image.\n\n" + table(overlap, OVERLAP_COLUMNS),
        rivals_section(compared),
        "## Cached = uncached\n\n" + _agreement(results),
        "## Targets\n\n" + target_table(results, settings),
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
