"""summary.json and table.md: which of the paper's numbers stand beside ours, differences, units."""

import json
import re
from dataclasses import replace
from typing import ClassVar

import pytest

from dynamic_llava.costs import LLAVA_7B, LLAVA_13B, flops_paper
from dynamic_llava.eval.folder import write_tables
from dynamic_llava.eval.summary import PAPER_COSTS, SIZES, Summary, TaskRow, page
from dynamic_llava.eval.tasks import Submission, get_task
from dynamic_llava.eval.writing import markdown

POPE = get_task("pope")
SCORE = POPE.result(
    {"mean_f1": (86.0, "percent"), "f1/random": (0.86, "fraction")}, {"questions": 3}, [(7, "?")], ["odd"]
)
ROW = TaskRow("pope", POPE, SCORE, costs={"image_tokens_per_layer": 143.8, "prefill_flop_paper": 2.4881e12})
RUN = Summary("m", "both", "7b", {"dtype": "float16", "limit": None}, {"torch": "2.13"}, [ROW])


def cells(summary, start):
    line = next(line for line in page(summary.to_json()).splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.replace(r"\|", "/").strip("|").split("|")]


@pytest.mark.parametrize(
    ("size", "sparsity", "difference"),
    [
        ("7b", "both", 86.0 - 85.9), ("7b", "image", 86.0 - 85.0), ("7b", "none", 86.0 - 85.9),
        ("13b", "both", 86.0 - 86.5), ("13b", "image", 86.0 - 86.8), ("13b", "none", 86.0 - 85.9),
        ("7b", "output", None), (None, "both", None),
    ],
)  # fmt: skip
def test_the_papers_column_follows_from_size_and_sparsity(size, sparsity, difference):
    run = replace(RUN, size=size, sparsity=sparsity)
    row = run.to_json()["tasks"]["pope"]
    assert row["difference"] == (None if difference is None else pytest.approx(difference))
    assert row["paper"] == ({} if size is None else {"mean_f1": POPE.paper["mean_f1"][size]})
    shown = cells(run, "POPE")
    assert shown[2] == "86.0" and shown[6] == ("-" if difference is None else f"{difference:+.1f}")
    assert shown[3:6] == (["-"] * 3 if size is None else [str(POPE.paper["mean_f1"][size][name]) for name in
                          ("none", "image", "both")])  # fmt: skip


def test_another_split_or_a_part_of_the_questions_is_not_compared():
    vizwiz = get_task("vizwiz:val")
    score = vizwiz.result({"accuracy": (50.0, "percent")}, {}, [])
    row = replace(RUN, rows=[TaskRow("vizwiz:val", vizwiz, score)]).to_json()["tasks"]["vizwiz:val"]
    assert row["difference"] is None and row["paper"] == {}
    limited = replace(RUN, settings={"limit": 10}).to_json()["tasks"]["pope"]
    assert limited["difference"] is None and limited["paper"]


def test_the_json_has_what_readers_rely_on(tmp_path):
    paths = write_tables(RUN, tmp_path / "new")
    found = json.loads(paths[0].read_text())
    assert {"model", "sparsity", "environment", "tasks"} <= set(found)
    row = found["tasks"]["pope"]
    assert (row["metric"], row["value"], row["unit"]) == ("mean_f1", 86.0, "percent")
    assert row["metrics"]["f1/random"] == {"value": 0.86, "unit": "fraction"}
    assert row["counts"] == {"questions": 3, "unreadable": 1} and row["warnings"][0] == "odd" and row["error"] is None
    assert row["efficiency"]["image_tokens_per_layer"] == {"value": 143.8, "unit": "tokens"}
    assert row["efficiency"]["prefill_flop_paper"]["paper"] == {"none": 10.1e12, "image": 2.5e12, "both": 2.5e12}
    assert row["efficiency"]["image_tokens_kept"]["value"] is None
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["summary.json", "table.md"]


def test_the_page_shows_costs_failures_and_submissions(tmp_path):
    vizwiz = get_task("vizwiz")
    rows = [
        ROW,
        TaskRow("vizwiz", vizwiz, submission=Submission((tmp_path / "up.json",), vizwiz.send_to)),
        TaskRow("mme", get_task("mme"), error="there is no file", notes=("only the first 2 questions",)),
    ]
    run = replace(RUN, rows=rows, size="13b")
    text = page(run.to_json())
    assert cells(run, "POPE")[7:] == ["143.8", "-", "2.49", "-", "-", "-", "1"]
    assert cells(run, "MME")[2] == "-" and "- **mme**: failed: `there is no file`" in text
    assert f"no score here; send `{tmp_path / 'up.json'}` to {vizwiz.send_to}" in text
    assert "- **pope**: `odd`" in text and "only the first 2 questions" in text
    assert cells(run, "LLaVA-1.5, 13B")[1:] == ["576", "19.6", "124.52", "28.42"]
    assert cells(run, "Dynamic-LLaVA I, 13B")[1:] == ["115", "4.7", "-", "-"]
    assert "limit" not in text and "dtype `float16`" in text


HOSTILE = (
    "<script>alert(1)</script>", "[click](http://evil.example)", "![](http://evil.example/a.png)", "a | b",
    "two\nlines", "`code`", "``", "http://evil.example", "\x1b[2J", "\ud800", "# head", "- [ ] x",
    "a`b``c", "\u202e", "|\n|:-|",
)  # fmt: skip
"""What a model's name, an answer, an image's name or a data file may hold."""


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_text_of_others_is_neither_link_nor_html_nor_a_line_on_the_page(tmp_path, text):
    """In the model's name, settings, warnings, errors and names of files: within code spans of one line each."""
    plain = replace(RUN, rows=[replace(ROW, notes=("x",)), TaskRow("mme", get_task("mme"), error="x")])
    vizwiz = get_task("vizwiz")
    sent = TaskRow("vizwiz", vizwiz, submission=Submission((tmp_path / "x",), vizwiz.send_to))
    hostile = replace(
        plain,
        model=text,
        settings={"datasets": {"pope": text}},
        environment={"machine": text},
        rows=[replace(ROW, notes=(text,)), TaskRow("mme", get_task("mme"), error=text), sent],
    )
    plain = replace(plain, settings={"datasets": "x"}, environment={"machine": "x"}, rows=[*plain.rows, sent])
    pages = [page(json.loads(json.dumps(run.to_json()))) for run in (plain, hostile)]
    assert len(pages[0].splitlines()) == len(pages[1].splitlines()) and pages[1].encode()
    for line in pages[1].splitlines():
        # What stands outside code spans is ours. A span ends with as many backticks as it began with.
        outside = re.sub(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", "", line)
        assert not re.search(r"<|\[|evil|\x1b|`|\u202e", outside.replace("<- the", "")), line
        assert line.isprintable()
    write_tables(hostile, tmp_path)
    assert (tmp_path / "table.md").read_text() == pages[1]


def test_several_metrics_of_the_paper_are_a_line_each():
    class Two(type(POPE)):
        paper: ClassVar = {**type(POPE).paper, "accuracy": type(POPE).paper["mean_f1"]}

    score = Two().result({"mean_f1": (86.0, "percent"), "accuracy": (0.5, "fraction")}, {}, [])
    lines = replace(RUN, rows=[TaskRow("pope", Two(), score)])
    lines = page(lines.to_json()).splitlines()
    second = next(line for line in lines if "accuracy, fraction" in line)
    assert "0.5000" in second and lines.index(second) == next(i for i, one in enumerate(lines) if "mean_f1" in one) + 1


def test_the_papers_costs_are_those_of_its_formula():
    """Tables print rounded what Eq. 13 gives; the sizes are those of LLaVA-1.5."""
    for shape, kept in ((LLAVA_7B, 115), (LLAVA_13B, 115)):
        costs = PAPER_COSTS[SIZES[shape.hidden, shape.layers]]["prefill_flop_paper"]
        assert costs["none"] == pytest.approx(flops_paper(576, shape.hidden, shape.layers), abs=0.05e12)
        sparse = flops_paper(576, shape.hidden, shape.layers, kept=kept, sparse_layer=2)
        assert costs["image"] == costs["both"] == pytest.approx(sparse, abs=0.05e12)


def test_a_markdown_table_is_aligned():
    text = markdown([["row", "x"], ["long name", "1.0"], ["b", "12.5"]])
    assert text.splitlines() == [
        "| row       |    x |",
        "|:----------|-----:|",
        "| long name |  1.0 |",
        "| b         | 12.5 |",
    ]
