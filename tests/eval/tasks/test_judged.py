"""MM-Vet and LLaVA-Bench: what the judge gets, and what its reviews are worth."""

import json

import pytest

from dynamic_llava.eval.__main__ import main
from dynamic_llava.eval.answers import AnswerLine, read_answers, write_answers
from dynamic_llava.eval.tasks import get_task
from dynamic_llava.eval.tasks.judged import read_review, scores_in
from tests.eval.task_data import TASK_DATA, save_hub, write_lines

BENCH, VET = get_task("llava_bench"), get_task("mmvet")


def review(question, content="8 6\nWell.", category="llava_bench_conv", **more):
    return {"id": 1, "question_id": question, "category": category, "content": content} | more


def scored(root, lines):
    write_lines(root / "reviews.jsonl", lines)
    return BENCH.score_file(root / "reviews.jsonl", root)


def values(score):
    return {name: metric.value for name, metric in score.metrics.items()}


def test_mmvets_file_has_its_own_ids_and_the_answers_order(tmp_path):
    answers = TASK_DATA["mmvet"](tmp_path).answers(tmp_path)
    written = VET.submission(answers, tmp_path, tmp_path / "out").files[0]
    assert written.read_text() == (
        '{\n  "v1_0": "A cat \\u00fc.",\n  "v1_1": "A dog.",\n  "v1_2": "Two lines.\\nHere."\n}'
    )


def test_dataset_rows_have_llavas_ids(tmp_path):
    made = TASK_DATA["mmvet"](tmp_path)
    hub = VET.hub_data(str(save_hub(made, tmp_path / "hub", "test")))
    assert [question.id for question in VET.questions(tmp_path, hub)] == [0, 1, 2]


@pytest.mark.parametrize("name", ["mmvet", "llava_bench"])
def test_a_judge_gets_every_answer_or_none(tmp_path, name):
    answers, task = TASK_DATA[name](tmp_path).answers(tmp_path), get_task(name)
    with pytest.raises(ValueError, match=r"no answer to questions 1 \('0'\)"):
        task.submission(answers[1:], tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match=r"no question for answers 1 \('9'\)"):
        task.submission([*answers, AnswerLine(9, "x")], tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="no score without a judge"):
        task.score(answers, tmp_path)
    # the judge's file needs no question file, only answers
    empty = tmp_path / "empty"
    assert task.submission(answers[1:], empty, tmp_path / "out").files
    with pytest.raises(ValueError, match="answered twice"):
        task.submission([*answers, answers[0]], empty, tmp_path / "out")


def test_llava_benchs_judge_reads_llavas_answer_file(tmp_path):
    answers = TASK_DATA["llava_bench"](tmp_path).answers(tmp_path)
    written = BENCH.submission(answers, tmp_path, tmp_path / "out").files[0]
    assert [(one.question_id, one.text) for one in read_answers(written)] == [
        (one.question_id, one.text) for one in answers
    ]


@pytest.mark.parametrize(
    ("content", "pair"),
    [
        ("7 9\nGood.", (7, 9)), ("7.5 9", (7.5, 9)), ("7,9", (7, 9)), ("7, 9", (-1, -1)), ("7  9", (-1, -1)),
        ("7 9 ", (-1, -1)), ("7", (-1, -1)), ("7 8 9", (-1, -1)), ("", (-1, -1)), ("seven 9", (-1, -1)),
        ("Scores:\n7 9", (-1, -1)), ("\n7 9", (-1, -1)),
    ],
)  # fmt: skip
def test_the_first_line_gives_exactly_two_numbers_or_minus_one(content, pair):
    assert scores_in(content) == pair
    assert read_review({"question_id": 0, "content": content}, "x") == pair


def test_reviews_are_averaged_and_rounded_twice(tmp_path):
    lines = [
        review(0, tuple=[8.0, 6.0]), review(1, tuple=[9.0, 7.0]), review(2, tuple=[8.0, 8.0]),
        review(3, category="llava_bench_detail", tuple=[7.0, 3.0]),
    ]  # fmt: skip
    score = scored(tmp_path, lines)
    assert values(score) == {
        # means of conv: 8.333 and 7.0; of all: 8.0 and 6.0
        "relative_score": 75.0, "reference_score": 80.0, "model_score": 60.0,
        "relative_score/conv": 84.0, "reference_score/conv": 83.3, "model_score/conv": 70.0,
        "relative_score/detail": 42.9, "reference_score/detail": 70.0, "model_score/detail": 30.0,
    }  # fmt: skip
    assert score.metrics["relative_score"].unit == "percent" and score.metrics["model_score"].unit == "points"
    assert score.counts == {"questions": 4, "reviews": 4, "unreadable": 0} and score.warnings == ()


def test_means_are_rounded_to_three_places_before_they_are_divided(tmp_path):
    # 1/3 and 1.0005/3 become 0.333 and 0.334 (0.3335): the ratio is 100.3, unrounded it is 100.1
    score = scored(tmp_path, [review(0, tuple=[1, 1.0008]), review(1, tuple=[0, 0]), review(2, tuple=[0, 0])])
    assert score.value == round(100 * 0.334 / 0.333, 1) == 100.3


def test_failed_reviews_are_averaged_in_and_reported(tmp_path):
    score = scored(tmp_path, [review(0, "9 6\nx"), review(1, "no scores")])
    assert score.value == round(100 * 2.5 / 4.0, 1) == 62.5
    assert score.counts["unreadable"] == 1 and "counted as -1 each: 1" in score.warnings[0]


def test_a_tuple_goes_before_the_text(tmp_path):
    assert scored(tmp_path, [review(0, "1 1", tuple=[10, 5])]).value == 50.0


def test_further_reviews_of_a_question_are_averaged_in_and_reported(tmp_path):
    score = scored(tmp_path, [review(0, "8 8"), review(0, "8 4")])
    assert score.value == 75.0 and score.counts["questions"] == 1 and score.counts["reviews"] == 2
    assert "averaged in: 1" in score.warnings[0]


def test_reviews_without_a_category_count_for_all(tmp_path):
    line = review(0)
    del line["category"]
    assert values(scored(tmp_path, [line])) == {"relative_score": 75.0, "reference_score": 80.0, "model_score": 60.0}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([review(0), {"question_id": 1}], "jsonl:2 has no 'content'"),
        ([review(0), {"content": "8 6"}], "jsonl:2 has no 'question_id'"),
        ([review(0, tuple=[8])], r"jsonl:1: 'tuple' is \[8\]; a review holds two numbers"),
        ([review(0, tuple="8 6")], "'tuple' is '8 6'; a list of numbers"),
        ([review(0, "0 6")], "the mean of the reference's scores is 0"),
        ([review(0, "0 6"), review(1, "8 6", "x")], "the mean of the reference's scores of conv is 0"),
        ([], "holds neither answers nor reviews"),
    ],
)
def test_broken_reviews(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        scored(tmp_path, lines)


def test_the_command_takes_answers_or_reviews(tmp_path, capsys):
    answers = TASK_DATA["llava_bench"](tmp_path).answers(tmp_path)
    path = write_answers(tmp_path / "a" / "answers.jsonl", answers)
    given = ["score", "--task", "llava_bench", "--data-root", str(tmp_path), "--json", str(tmp_path / "s.json")]
    assert main([*given, "--answers", str(path)]) == 0
    assert "score --task llava_bench --answers REVIEWS" in capsys.readouterr().out
    write_lines(tmp_path / "reviews.jsonl", [review(number) for number in range(3)])
    assert main([*given, "--answers", str(tmp_path / "reviews.jsonl")]) == 0
    assert json.loads((tmp_path / "s.json").read_text())["metrics"]["relative_score"]["value"] == 75.0
