"""The `score` command: what it prints and writes, what it refuses, and that it starts without torch in two seconds."""

import json
import os
import subprocess
import sys

import pytest

from dynamic_llava.eval.__main__ import main
from dynamic_llava.eval.answers import write_answers
from dynamic_llava.eval.tasks import get_task
from tests.eval.task_data import TASK_DATA, save_hub
from tests.test_architecture import ROOT


def score(*arguments):
    return main(["score", *map(str, arguments)])


@pytest.fixture
def pope(tmp_path):
    made = TASK_DATA["pope"](tmp_path)
    return made, write_answers(tmp_path / "answers.jsonl", made.answers(tmp_path))


def test_prints_a_table_and_writes_every_metric(pope, tmp_path, capsys):
    _, answers = pope
    out = tmp_path / "deep" / "score.json"
    assert score("--task", "pope", "--answers", answers, "--data-root", tmp_path, "--json", out) == 0
    printed = capsys.readouterr().out
    assert "mean_f1" in printed and "100.00 percent  <- the paper's" in printed
    assert "paper, 7b: LLaVA-1.5 85.9, Dynamic-LLaVA I 85.0, Dynamic-LLaVA I|T 85.9" in printed
    found = json.loads(out.read_text())
    assert found["task"] == "pope" and found["table_metric"] == "mean_f1"
    assert found["metrics"]["mean_f1"] == {"value": 100.0, "unit": "percent"}
    assert found["metrics"]["recall/random"] == {"value": 1.0, "unit": "fraction"}
    assert found["counts"] == {"questions": 12, "answered": 12, "unreadable": 0} and found["warnings"] == []
    assert "submission" not in found


def test_private_labels_give_the_servers_file_beside_the_answers(tmp_path, capsys):
    TASK_DATA["vizwiz"](tmp_path)
    (tmp_path / "vizwiz" / "val.json").unlink()
    made = [(question.id, question.text) for question in get_task("vizwiz").questions(tmp_path)]
    answers = tmp_path / "out" / "answers.jsonl"
    answers.parent.mkdir()
    answers.write_text(
        "".join(json.dumps({"question_id": name, "prompt": text, "text": "A cat"}) + "\n" for name, text in made)
    )
    out = tmp_path / "score.json"
    assert score("--task", "vizwiz", "--answers", answers, "--data-root", tmp_path, "--json", out) == 0
    upload = tmp_path / "out" / "vizwiz_upload.json"
    assert [row["answer"] for row in json.loads(upload.read_text())] == ["cat", "cat"]
    assert f"written: {upload}\nsend to: https://eval.ai" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["metrics"] == {} and found["submission"]["files"] == [str(upload)]


def test_a_score_and_the_leaderboards_file_together(tmp_path):
    TASK_DATA["seed"](tmp_path)
    lines = [(101669, "A"), ("v1234", "B"), (101, "C")]
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps({"question_id": name, "text": text}) + "\n" for name, text in lines))
    out = tmp_path / "score.json"
    given = ("--task", "seed", "--answers", answers, "--data-root", tmp_path, "--json", out)
    assert score(*given, "--submission-dir", tmp_path / "up") == 0
    assert json.loads(out.read_text())["metrics"]["accuracy/all"]["value"] == 100.0
    assert (tmp_path / "up" / "seed_upload.jsonl").is_file()


def test_labels_of_a_dataset(tmp_path, capsys):
    made = TASK_DATA["gqa"](tmp_path)
    answers = write_answers(tmp_path / "answers.jsonl", made.answers(tmp_path))
    hub = save_hub(made, tmp_path / "hub", "testdev")
    given = ("--task", "gqa", "--answers", answers, "--data-root", tmp_path / "nowhere")
    assert score(*given, "--dataset", hub) == 0
    assert "100.00 percent" in capsys.readouterr().out
    assert score(*given) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--task": "pop"}, "task 'pop' is not known"),
        ({"--answers": "none.jsonl"}, "there is no file none.jsonl"),
        ({"--data-root": "nowhere"}, "get it from LLaVA's eval.zip"),
        ({"--submission-dir": "up"}, "no server or judge"),
    ],
)
def test_mistakes_are_told_in_one_line(pope, tmp_path, capsys, change, message):
    _, answers = pope
    given = {"--task": "pope", "--answers": answers, "--data-root": tmp_path} | change
    assert score(*(part for pair in given.items() for part in pair)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_part_of_the_questions_is_scored_when_it_is_asked_for(pope, tmp_path, capsys):
    """The way out that the error names works."""
    _, answers = pope
    answers.write_text("".join(answers.read_text().splitlines(keepends=True)[:2]))
    given = ("--task", "pope", "--answers", answers, "--data-root", tmp_path)
    assert score(*given) == 2
    assert "--part" in (error := capsys.readouterr().err) and str(answers) in error
    assert score(*given, "--part") == 0
    printed = capsys.readouterr().out
    assert "100.00 percent  <- the paper's" in printed and "2 of 12 are answered" in printed


def test_names_of_a_data_file_move_no_cursor(tmp_path, capsys):
    made = TASK_DATA["cvbench"](tmp_path)
    path = tmp_path / "cvbench" / "test_2d.jsonl"
    path.write_text(path.read_text().replace('"Count"', json.dumps("Co\x1b[2J\nunt")))
    answers = write_answers(tmp_path / "answers.jsonl", made.answers(tmp_path))
    assert score("--task", "cvbench", "--answers", answers, "--data-root", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "Co\\x1b[2J\\nunt" in printed


def test_a_broken_answer_line_is_named(pope, tmp_path, capsys):
    _, answers = pope
    with answers.open("a") as file:
        file.write('{"question_id": 3, "te')
    assert score("--task", "pope", "--answers", answers, "--data-root", tmp_path) == 2
    assert "answers.jsonl:13 is no valid JSON" in capsys.readouterr().err


def test_starts_without_torch_and_at_once(pope, tmp_path):
    _, answers = pope
    code = (
        "import sys; from dynamic_llava.eval.__main__ import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'datasets', 'pandas', 'numpy', 'PIL', 'nltk'} & set(sys.modules); "
        "assert not heavy, heavy; sys.exit(code)"
    )
    arguments = ["score", "--task", "pope", "--answers", str(answers), "--data-root", str(tmp_path)]
    # processor seconds of the fastest of three: what the command itself takes, on a busy machine too
    seconds = []
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, cwd=ROOT, capture_output=True)
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(seconds) < 2.0


def test_the_module_runs_as_a_command(pope, tmp_path):
    _, answers = pope
    given = ["score", "--task", "pope", "--answers", answers, "--data-root", tmp_path]
    done = subprocess.run(
        [sys.executable, "-m", "dynamic_llava.eval", *given], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "mean_f1" in done.stdout
