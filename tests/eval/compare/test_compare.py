"""The compare command: laws of its table, what it keeps of an interrupted run, and what it refuses."""

import csv
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from dynamic_llava.eval import answering, tasks
from dynamic_llava.eval import run as runner
from dynamic_llava.eval.__main__ import main
from dynamic_llava.eval.compare import run as comparing
from dynamic_llava.eval.compare.table import COSTS, fronts, short_names
from dynamic_llava.files import EXIT_WRITE_FAILED, WriteError
from tests.builders import TOKENS_PER_IMAGE, dense_twin, shared_model
from tests.eval.compare.compare_builders import answers_of, compare, results, rows_of
from tests.eval.compare.conftest import Worded
from tests.eval.run_builders import lines_of
from tests.eval.task_data import TASK_DATA
from tests.sft_builders import tiny_processor

ROOT = Path(__file__).resolve().parents[3]
METHODS = "dense,fastv:keep=1,fastv,fastv:image_keep_rate=0.5,random"
"""fastv:keep=1 keeps everything, as dense; fastv is spelled twice; random draws."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory, checkpoint):
    """One finished comparison."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparing, "TIMED_TOKENS", 2)
        patch.setitem(tasks.TASKS, "toy", Worded)
        assert compare(checkpoint, METHODS, out) == 0
    return out


def metric(row):
    return row["metrics"]["accuracy"]


def test_a_method_under_two_names_differs_by_nothing(whole):
    """Each of the names has been answered by itself."""
    rows = rows_of(whole)
    assert len(answers_of(whole)) == 5
    assert metric(rows["fastv:keep=1"]) == metric(rows["dense"])
    assert [metric(rows["fastv:keep=1"])[name] for name in ("difference", "low", "high")] == [0, 0, 0]
    one, other = rows["fastv"], rows["fastv:image_keep_rate=0.5"]
    assert {**one, "method": ""} == {**other, "method": ""}
    assert metric(one)["difference"] != 0 and metric(one)["low"] < metric(one)["high"]


def test_the_page_on_adding_a_method_ends_with_its_comparison(checkpoint, tmp_path, monkeypatch):
    """The page's last command, its own example among the methods, on another checkpoint and other questions."""
    page = (ROOT / "docs" / "adding-a-method.md").read_text("utf-8")
    (tmp_path / "norm.py").write_text(page.split("```python\n")[1].split("```")[0], "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(comparing, "TIMED_TOKENS", 2)
    command = shlex.split(page.split("```bash\n")[-1].split("```")[0].strip().splitlines()[-1])
    assert command[:4] == ["python", "-m", "dynamic_llava.eval", "compare"]
    here = {"--model": checkpoint, "--data-root": checkpoint, "--tasks": "toy", "--output-folder": tmp_path / "out"}
    for flag, value in here.items():
        command[command.index(flag) + 1] = str(value)
    try:
        assert main([*command[3:], "--limit", "3", "--repeats", "2"]) == 0
    finally:
        sys.modules.pop("norm", None)
    found = results(tmp_path / "out")
    assert len(found["methods"]) == len(found["tasks"]["toy"]["rows"]) == 6
    assert found["tasks"]["toy"]["rows"][-1]["method"] == "norm:Norm"
    assert found["methods"][-1]["set"] == "image_keep_rate 0.2 -> 0.75", "12 of 16 tokens"


def test_rows_hold_what_the_answers_say(whole):
    found = results(whole)
    for row, method in zip(found["tasks"]["toy"]["rows"], found["methods"], strict=True):
        lines = lines_of(Path(row["answers"]))
        assert metric(row)["value"] == pytest.approx(sum(sum(map(ord, line["text"])) % 97 for line in lines) / 6)
        assert metric(row)["difference"] == metric(row)["value"] - metric(found["tasks"]["toy"]["rows"][0])["value"]
        kept = {one for line in lines for one in line["metadata"]["image_kept"]}
        rate = method["settings"].get("image_keep_rate", 1)
        assert kept == {int(TOKENS_PER_IMAGE * rate)} and row["method"] == method["method"]
        assert row["times"]["prefill_ms_low"] <= row["times"]["prefill_ms"] <= row["times"]["prefill_ms_high"]
        assert row["reference"] == (row["method"] == "dense")


def test_page_cells_and_pictures_are_those_of_the_json(whole):
    found = results(whole)
    page = (whole / "compare.md").read_text()
    lines = list(csv.DictReader((whole / "compare.csv").open()))
    assert len(lines) == len(found["tasks"]["toy"]["rows"]) == 5
    for line, row in zip(lines, found["tasks"]["toy"]["rows"], strict=True):
        assert line["method"] == row["method"] and float(line["value"]) == metric(row)["value"]
        assert float(line["kv_bytes"]) == row["costs"]["kv_bytes"]
        assert f"| Toy | `{row['method']}` | accuracy, percent | {metric(row)['value']:.1f} |" in " ".join(page.split())
    assert "10,000 draws" in page and "(seed 0; percentiles)" in page and "intervals are over 6 questions" in page
    with Image.open(whole / "compare.png") as picture:
        assert picture.width > 600
    drawn = ElementTree.parse(whole / "compare.svg").getroot()
    assert drawn.tag.endswith("svg")


def test_the_order_of_methods_changes_nothing(checkpoint, whole, tmp_path):
    backwards = ",".join(reversed(METHODS.split(",")))
    assert compare(checkpoint, backwards, tmp_path / "out") == 0
    assert rows_of(tmp_path / "out") == rows_of(whole)
    assert list(rows_of(tmp_path / "out")) == list(reversed(rows_of(whole)))
    assert answers_of(tmp_path / "out") == answers_of(whole)


class Counter:
    """Counts the questions that reach the model, and may stop the run."""

    def __init__(self, monkeypatch, stop_after=None):
        self.asked, self.stop_after = [], stop_after
        monkeypatch.setattr(runner, "answer", self)

    def __call__(self, model_run, asked):
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked += [one.place for one in asked]
        return answering.answer(model_run, asked)


def test_an_interrupted_comparison_goes_on_where_it_was(checkpoint, whole, tmp_path, monkeypatch):
    """In the middle of the second method; nothing is asked twice, and a further command asks and times nothing."""
    out = tmp_path / "out"
    first = Counter(monkeypatch, stop_after=8)
    with pytest.raises(KeyboardInterrupt):
        compare(checkpoint, METHODS, out, "--batch-size", 2)
    again = Counter(monkeypatch)
    assert compare(checkpoint, METHODS, out, "--batch-size", 4) == 0
    assert len(first.asked) == 8 and sorted(first.asked + again.asked) == sorted(list(range(6)) * 5)
    assert answers_of(out) == answers_of(whole) and rows_of(out) == rows_of(whole)
    third = Counter(monkeypatch)
    monkeypatch.setattr(comparing, "interleaved_times", None)
    before = results(out)
    assert compare(checkpoint, METHODS, out, "--batch-size", 4) == 0
    assert not third.asked and results(out) == before


@pytest.mark.slow
def test_a_further_method_is_answered_alone_and_all_are_timed_anew(checkpoint, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert compare(checkpoint, "dense,fastv", out) == 0
    counter, timed = Counter(monkeypatch), []
    measure = comparing.interleaved_times
    monkeypatch.setattr(
        comparing, "interleaved_times", lambda clocks, **more: timed.append(len(clocks)) or measure(clocks, **more)
    )
    assert compare(checkpoint, "dense,fastv,random", out) == 0
    assert len(counter.asked) == 6 and timed == [3]
    rows = rows_of(out)
    assert {name: metric(row) for name, row in rows.items()} == {name: metric(rows_of(whole)[name]) for name in rows}


KILLER = """
import os, signal, sys
from dynamic_llava.eval import folder, tasks
from dynamic_llava.eval.__main__ import main
from tests.eval.compare.conftest import Worded
tasks.TASKS["toy"] = Worded
append, batches = folder.AnswerStore.append, []
def cut(self, answers):
    append(self, answers)
    batches.append(answers)
    if len(batches) == 5:
        self._file.write("{")
        self._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
folder.AnswerStore.append = cut
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_comparison_loses_nothing(checkpoint, whole, tmp_path, monkeypatch):
    """Killed in the middle of a line of the second method's answers."""
    out = tmp_path / "out"
    places = ["--model", checkpoint, "--data-root", checkpoint, "--output-folder", out, "--methods", METHODS]
    asked = ["--tasks", "toy", "--max-new-tokens", 8, "--batch-size", 2]
    command = [sys.executable, "-c", KILLER, "compare", *places, *asked]
    killed = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, timeout=300, env={**os.environ})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    counter = Counter(monkeypatch)
    assert compare(checkpoint, METHODS, out) == 0
    assert len(counter.asked) == 5 * 6 - 10
    assert answers_of(out) == answers_of(whole) and rows_of(out) == rows_of(whole)


@pytest.fixture(scope="module")
def dense_checkpoint(tmp_path_factory, checkpoint):
    folder = tmp_path_factory.mktemp("dense") / "model"
    model = dense_twin(shared_model())
    model.generation_config = runner.DynamicLlavaForConditionalGeneration.from_pretrained(checkpoint).generation_config
    model.save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def test_two_checkpoints_meet_the_same_reference(checkpoint, dense_checkpoint, tmp_path):
    """A method that one of them cannot run is left out there, and said."""
    out = tmp_path / "out"
    assert compare(dense_checkpoint, "dense,dynamic", out, "--model", checkpoint, root=checkpoint) == 0
    found = results(out)
    rows = [(row["model"], row["method"], row["reference"]) for row in found["tasks"]["toy"]["rows"]]
    first, second = str(dense_checkpoint), str(checkpoint)
    assert rows == [(first, "dense", True), (second, "dense", False), (second, "dynamic", False)]
    assert "is a dense checkpoint without predictors" in found["left_out"][0]
    base = metric(found["tasks"]["toy"]["rows"][0])["value"]
    for row in found["tasks"]["toy"]["rows"]:
        assert metric(row)["difference"] == metric(row)["value"] - base
    assert "left out" in (out / "compare.md").read_text()


def test_a_trained_checkpoint_may_run_what_it_was_trained_for_alone(checkpoint, dense_checkpoint, tmp_path):
    out = tmp_path / "out"
    more = ("--learned-only", checkpoint)
    assert compare(dense_checkpoint, "dense,dynamic,fastv", out, *more, root=checkpoint) == 0
    found = results(out)
    rows = [(row["model"], row["method"]) for row in found["tasks"]["toy"]["rows"]]
    assert rows == [(str(dense_checkpoint), "dense"), (str(dense_checkpoint), "fastv"), (str(checkpoint), "dynamic")]
    assert compare(dense_checkpoint, "dense", tmp_path / "twice", "--learned-only", dense_checkpoint) == 2


def test_answers_with_references_have_perplexity_and_meteor(checkpoint, tmp_path):
    """Both with an interval, also of a method that evicts; one that fails does so alone, and the exit code tells."""
    TASK_DATA["lvis_single"](tmp_path)
    out = tmp_path / "out"
    methods = "dense,divprune,tova,tests.eval.compare.compare_builders:Refusing"
    assert compare(checkpoint, methods, out, "--limit", 2, tasks="lvis_single", root=tmp_path) == 1
    rows = rows_of(out, "lvis_single")
    assert results(out)["tasks"]["lvis_single"]["shown"] == ["ppl", "meteor"]
    for method in ("divprune", "tova"):
        for name in ("ppl", "meteor"):
            found = rows[method]["metrics"][name]
            assert found["low"] <= found["difference"] <= found["high"]
            assert found["lower_is_better"] == (name == "ppl")
    assert 0 < rows["tova"]["costs"]["kv_bytes"] < rows["dense"]["costs"]["kv_bytes"]
    *others, refusing = rows.values()
    assert refusing["error"] == "this method takes no images" and not refusing["metrics"]
    assert {row["error"] for row in others} == {None}
    assert "failed: this method takes no images" in (out / "compare.md").read_text()


@pytest.mark.parametrize(
    ("methods", "more", "says"),
    [
        ("fastv,random", (), "the methods lack a dense one"),
        ("dense,fastvv", (), "did you mean 'fastv'"),
        ("dense,fastv:layer=9", (), "decides at the layers [9], and this language model has 6"),
        ("dense", ("--equal", "tokens=4"), "equal budget 'tokens=4' is not understood"),
        ("dense", ("--repeats", "1"), "repeats=1 have no quartiles"),
        ("dense,h2o", ("--equal", "image-tokens=4"), "h2o (heavy_rate 0.1, recent_rate 0.1, shares_of prompt"),
        ("dense,fastv", ("--equal", "image-tokens=17"), "can leave 1 to 16 here; choose an amount between them"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_answered(
    checkpoint, tmp_path, capsys, monkeypatch, methods, more, says
):
    counter = Counter(monkeypatch)
    assert compare(checkpoint, methods, tmp_path / "out", *more) == 2
    assert says in capsys.readouterr().err and not counter.asked and not (tmp_path / "out").exists()


def test_missing_files_and_models_named_twice_are_refused(checkpoint, tmp_path, capsys):
    assert compare(checkpoint, "dense", tmp_path / "out", tasks="pope,toy") == 2
    assert "pope: there is no " in capsys.readouterr().err
    assert compare(checkpoint, "dense", tmp_path / "out", "--model", checkpoint) == 2
    assert "are named twice" in capsys.readouterr().err


def test_a_table_that_cannot_be_written_is_printed(checkpoint, whole, tmp_path, capsys, monkeypatch):
    """The answers stay, so that the same command writes it once there is room."""

    def full(path, text):
        raise WriteError(f"{path} cannot be written: the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(comparing, "write_text", full)
        assert compare(checkpoint, "dense", tmp_path / "out") == EXIT_WRITE_FAILED
    printed = capsys.readouterr().err
    assert "the disk is full" in printed and "| Toy " in printed
    counter = Counter(monkeypatch)
    assert compare(checkpoint, "dense", tmp_path / "out") == 0
    assert not counter.asked and metric(rows_of(tmp_path / "out")["dense"]) == metric(rows_of(whole)["dense"])


def test_an_equal_budget_that_an_answer_does_not_hold_is_an_error(checkpoint, tmp_path, monkeypatch):
    """Whatever the probe has shown: it is counted on every answer."""
    monkeypatch.setattr(comparing, "_holds", lambda answer, tokens: answer.question_id != "q1")
    out = tmp_path / "out"
    assert compare(checkpoint, "dense,structure", out, "--equal", "image-tokens=4", "--limit", 3) == 1
    rows = rows_of(out)
    assert rows["structure"]["error"] == "image-tokens=4 is not held by the answers to 1 ('q1')"
    assert rows["dense"]["error"] is None


def test_a_front_is_what_nothing_beats():
    """By definition, on points with ties; a lower perplexity is the better one."""
    points = [(3, 5), (1, 1), (2, 5), (2, 4), (4, 6), (5, 6), (2, 5)]
    for unit, sign in (("percent", 1), ("perplexity", -1)):
        rows = [
            {"costs": dict.fromkeys(COSTS, cost), "metrics": {"m": {"value": sign * worth, "unit": unit}}}
            for cost, worth in points
        ]
        rows += [{"costs": {}, "metrics": {}}]
        assert fronts(rows, "m") == {cost: [1, 2, 4, 6] for cost in COSTS}


def test_models_are_called_by_what_tells_them_apart():
    assert short_names(["runs/seed0/both/model"]) == {"runs/seed0/both/model": "runs/seed0/both/model"}
    assert list(short_names(["runs/a/model", "runs/b/c/model"]).values()) == ["a", "b/c"]
    assert len(set(short_names(["a", "a/b", "a/b/c"]).values())) == 3
