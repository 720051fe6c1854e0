"""VTC-Bench's split: what dense and downsampling answer right, counted from answers, in every file, over seeds."""

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from dynamic_llava.eval import tasks
from dynamic_llava.eval.compare.split import Split, joined, said_of, share
from dynamic_llava.eval.metrics.tally import tally_of_means
from dynamic_llava.eval.tasks import GENERATION, TASKS, get_task
from tests.eval.compare.compare_builders import compare, results
from tests.eval.compare.conftest import Worded
from tests.eval.compare.test_seeds import comparison, write
from tests.eval.run_builders import lines_of
from tests.eval.task_data import TASK_DATA

JUDGED = {"llava_bench", "mmvet"}
GRADED = [name for name in sorted(set(TASKS) & set(TASK_DATA) - JUDGED) if GENERATION not in TASKS[name].groups]


def is_right(text):
    return sum(map(ord, text)) % 2 == 1


class Graded(Worded):
    """The toy benchmark, on which an answer is right if the sum of its letters is odd."""

    def score(self, answers, root, hub=None, *, part=False):
        """Return the mean of the answers' numbers."""
        found = super().score(answers, root, hub, part=part)
        tally = dataclasses.replace(found.tallies["accuracy"], right=tuple(is_right(one.text) for one in answers))
        return dataclasses.replace(found, tallies={"accuracy": tally})


def test_groups_are_what_dense_alone_and_what_both_answer_right():
    dense, small, other = (tally_of_means(dict(zip("abcdef", values, strict=True))) for values in (
        (1, 1, 1, 0, 0.6, 0.3), (1, 0, 0.4, 1, 0.5, 1), (0, 1, 0, 1, 1, 1),
    ))  # fmt: skip
    split = Split.of(dense, small)
    assert split.members == {"a": (1, 2), "b": (0, 4)}
    found = split.to_json("dense", "downsample")
    assert [found[name] for name in ("a", "b", "neither")] == [2, 2, 2]
    assert "A: 2 questions that dense answers right and downsample wrong; B: 2 that both" in said_of(found)
    assert split.right_of(dense) == {"a": 2, "b": 2} and split.right_of(small) == {"a": 0, "b": 2}
    assert split.right_of(other) == {"a": 1, "b": 1}
    assert share({"groups": split.right_of(other)}, found, "a") == 50
    assert share({"groups": {"a": 0, "b": 0}}, {"a": 0, "b": 3}, "a") is None, "an empty group has no share"
    fewer = tally_of_means({"a": 1, "b": 1})
    assert Split.of(dense, fewer) is None and split.right_of(fewer) == {}
    numbers = tally_of_means({name: 5 for name in "abcdef"}, graded=False)
    assert Split.of(numbers, numbers) is None and split.right_of(numbers) == {}


@pytest.mark.parametrize("name", GRADED)
def test_every_benchmark_says_which_answers_are_right(tmp_path, name):
    """All of the right texts, and of others as many as its score says, where that counts right answers."""
    made = TASK_DATA[name](tmp_path)
    task = get_task(made.task)
    right = task.score(made.answers(tmp_path, texts=list(made.right)), tmp_path)
    tally = right.tallies[task.table_metric]
    assert all(tally.right) and len(tally.right) == len(tally.names)
    wrong = task.score(made.answers(tmp_path, texts=["unreadable"] * len(made.right)), tmp_path)
    found = wrong.tallies[task.table_metric]
    if name == "pope":  # what does not say yes counts as no there
        assert sum(found.right) == len(found.right) / 2
    else:
        assert not any(found.right) and float(found.value(np.ones(len(found.names)))) == 0


def test_a_comparison_with_downsampling_is_split(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "toy", Graded)
    out = tmp_path / "out"
    assert compare(checkpoint, "dense,fastv,downsample", out) == 0
    task = results(out)["tasks"]["toy"]
    said = {row["method"]: [is_right(one["text"]) for one in lines_of(Path(row["answers"]))] for row in task["rows"]}
    groups = {
        "a": [at for at in range(6) if said["dense"][at] and not said["downsample"][at]],
        "b": [at for at in range(6) if said["dense"][at] and said["downsample"][at]],
    }
    assert groups["a"] or groups["b"]
    split = task["split"]
    assert {name: split[name] for name in groups} == {name: len(places) for name, places in groups.items()}
    assert split["neither"] == said["dense"].count(False)
    for row in task["rows"]:
        assert row["groups"] == {name: sum(said[row["method"]][at] for at in at_) for name, at_ in groups.items()}
    page = " ".join((out / "compare.md").read_text().split())
    assert "| A, % | B, % | front |" in page and f"A: {len(groups['a'])} questions that dense answers right" in page
    lines = list(csv.DictReader((out / "compare.csv").open()))
    for line, row in zip(lines, task["rows"], strict=True):
        assert int(line["group_a_right"]) == row["groups"]["a"] and int(line["group_b"]) == split["b"]


def test_without_downsampling_there_are_no_groups(checkpoint, tmp_path):
    assert compare(checkpoint, "dense", tmp_path / "out", "--limit", 2) == 0
    assert results(tmp_path / "out")["tasks"]["toy"]["split"] is None
    assert "A, %" not in (tmp_path / "out" / "compare.md").read_text()


def test_seeds_count_their_groups_together(tmp_path):
    """One without groups leaves them out of the table."""
    from dynamic_llava.eval.compare.seeds import join_seeds

    folders = []
    for seed in range(2):
        found = comparison(seed)
        task = found["tasks"]["toy"]
        task["split"] = {"dense": "dense", "downsampled": "downsample", "unit": "questions", "a": 2, "b": 3 + seed}
        task["split"]["neither"] = 1
        for row in task["rows"]:
            row["groups"] = {"a": 1 + seed, "b": 2}
        folders.append(write(tmp_path / str(seed), found))
    join_seeds(folders, tmp_path / "out")
    task = json.loads((tmp_path / "out" / "compare.json").read_text())["tasks"]["toy"]
    assert [task["split"][name] for name in ("a", "b", "neither")] == [4, 7, 2]
    assert task["rows"][0]["groups"] == {"a": 3, "b": 4}
    assert "| 75.0 | 57.1 |" in " ".join((tmp_path / "out" / "compare.md").read_text().split())
    join_seeds([folders[0], write(tmp_path / "old", comparison(2))], tmp_path / "mixed")
    assert json.loads((tmp_path / "mixed" / "compare.json").read_text())["tasks"]["toy"]["split"] is None
    assert joined([None]) is None
