"""VQAv2, VizWiz, TextVQA and GQA: joins, normalisation, submissions, and what is refused."""

import json

import pytest

from dynamic_llava.eval.answers import AnswerLine
from dynamic_llava.eval.tasks import get_task
from dynamic_llava.eval.tasks.base import SHORT, UNANSWERABLE
from dynamic_llava.eval.tasks.gqa import read_gqa
from dynamic_llava.eval.tasks.textvqa import question_in
from tests.eval.task_data import gqa, people, textvqa, vizwiz, vqav2, write


def values(score):
    return {name: metric.value for name, metric in score.metrics.items()}


def test_vqav2_gives_the_servers_score_to_the_normalised_text(tmp_path):
    made = vqav2(tmp_path)
    task = get_task("vqav2:val")
    path = tmp_path / "vqav2" / "v2_mscoco_val2014_annotations.json"
    kinds = [("what is", "other"), ("is it", "yes/no"), ("how many", "number")]
    answers = [people("yes"), people("A dog"), people("2", "2", "3")]
    write(path, {"annotations": [
        {"question_id": name, "question_type": kind[0], "answer_type": kind[1], "answers": ten}
        for name, kind, ten in zip((1000, 1001, 2000), kinds, answers, strict=True)
    ]})  # fmt: skip
    said = made.answers(tmp_path, texts=["Yes.", "A dog", "two"])
    found = values(task.score(said, tmp_path))
    # "yes" equals ten times "yes"; "dog" is not the string "A dog"; "2" has one or two of the other nine
    two = (2 * 1 / 3 + 8 * 2 / 3) / 10
    assert found["accuracy"] == round(100 * (1 + 0 + two) / 3, 2)
    # as said: "Yes." is not the string "yes", "A dog" is
    assert found["accuracy_of_text"] == round(100 * (0 + 1 + two) / 3, 2)
    assert found["accuracy/answer_type/yes/no"] == 0.0 and found["accuracy/answer_type/other"] == 100.0
    assert found["accuracy/question_type/how many"] == 60.0
    assert task.score(said, tmp_path).metrics["accuracy"].unit == "percent"


def test_vqav2_counts_missing_answers_and_refuses_unknown_ones(tmp_path):
    answers = vqav2(tmp_path).answers(tmp_path)
    task = get_task("vqav2:val")
    score = task.score(answers[:2], tmp_path)
    assert score.value == 66.67 and score.counts == {"questions": 3, "answered": 2, "missing": 1, "unreadable": 0}
    assert "scored as \"\": 1 ('2000')" in score.warnings[0]
    with pytest.raises(ValueError, match=r"vqav2's val set has no question for answers 1 \('5'\)"):
        task.score([*answers, AnswerLine(5, "yes")], tmp_path)
    with pytest.raises(ValueError, match="answered twice"):
        task.score([*answers, answers[0]], tmp_path)


def test_vqav2_writes_every_question_of_test(tmp_path):
    vqav2(tmp_path)
    task = get_task("vqav2")
    questions = task.questions(tmp_path)
    assert len(questions) == 2
    written = task.submission([AnswerLine(q.id, "The Dog's.") for q in questions[:1]], tmp_path, tmp_path / "out")
    assert json.loads(written.files[0].read_text()) == [
        {"question_id": 262144000, "answer": "dog 's"},
        {"question_id": 262145000, "answer": ""},
        {"question_id": 262146000, "answer": ""},
    ]
    assert "eval.ai" in written.send_to and "830" in written.send_to
    with pytest.raises(ValueError, match=r"test2015 set has no question for answers 1 \('1000'\)"):
        task.submission([AnswerLine(1000, "yes")], tmp_path, tmp_path / "out")


def test_vqav2_knows_whose_answers_they_are(tmp_path):
    val = vqav2(tmp_path).answers(tmp_path)
    test = [AnswerLine(question.id, "yes") for question in get_task("vqav2").questions(tmp_path)]
    assert get_task("vqav2").can_score(val, tmp_path) and not get_task("vqav2").can_score(test, tmp_path)
    assert not get_task("vqav2:test-dev").can_score(val, tmp_path)
    (tmp_path / "vqav2" / "v2_mscoco_val2014_annotations.json").unlink()
    assert not get_task("vqav2").can_score(val, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"labels are missing.*visualqa\.org"):
        get_task("vqav2:val").score(val, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"questions": []}, "has no 'annotations'"),
        ({"annotations": []}, "'annotations' is .*; a list that is not empty is due"),
        ({"annotations": [{"question_id": 1}]}, "annotation 0 has no human answers"),
        ({"annotations": [{"question_id": 1, "answers": []}]}, "annotation 0: 'answers' is .*; a list that"),
        ({"annotations": [{"question_id": 1, "answers": [{"text": "a"}]}]}, "has no 'answer'"),
        ("{", "no valid JSON"), ([1], "holds a list"),
    ],
)  # fmt: skip
def test_vqav2_refuses_broken_labels(tmp_path, content, message):
    made = vqav2(tmp_path)
    write(tmp_path / "vqav2" / "v2_mscoco_val2014_annotations.json", content)
    with pytest.raises(ValueError, match=message):
        get_task(made.task).score(made.answers(tmp_path), tmp_path)


def test_vizwiz_normalises_both_sides_and_capitalises_questions(tmp_path):
    made = vizwiz(tmp_path)
    task = get_task("vizwiz:val")
    assert task.questions(tmp_path)[1].text == "What colour is number 1?" + UNANSWERABLE + SHORT
    records = json.loads((tmp_path / "vizwiz" / "val.json").read_text())
    records[0]["answers"] = people("Grey suit.", "grey suit", "the grey suit", "blue")
    records[1]["answer_type"] = "unanswerable"
    write(tmp_path / "vizwiz" / "val.json", records)
    score = task.score(made.answers(tmp_path, texts=["A grey suit", "unanswerable", "one"]), tmp_path)
    grey = (3 * 2 / 3 + 7) / 10
    assert values(score) == pytest.approx(
        {"accuracy": 100 * (grey + 1) / 3, "accuracy/other": 100 * grey / 2, "accuracy/unanswerable": 100.0}
    )


def test_vizwiz_wants_every_answer(tmp_path):
    answers = vizwiz(tmp_path).answers(tmp_path)
    task = get_task("vizwiz:val")
    with pytest.raises(ValueError, match=r"no answer to questions 1 \(2\)"):
        task.score(answers[:2], tmp_path)
    with pytest.raises(ValueError, match=r"no question for answers 1 \('3'\)"):
        task.score([*answers, AnswerLine(3, "x")], tmp_path)
    with pytest.raises(ValueError, match="answered twice"):
        task.score([*answers, AnswerLine("VizWiz_val_00000001", "x")], tmp_path)
    named = [AnswerLine(f"VizWiz_val_{number:08d}", answer.text) for number, answer in enumerate(answers)]
    assert task.score(named[::-1], tmp_path).value == 100.0
    with pytest.raises(ValueError, match=r"no answer to questions 1 \(1\)"):
        get_task("vizwiz").submission([AnswerLine(0, "x")], tmp_path, tmp_path)


def test_vizwiz_writes_images_and_normalised_answers(tmp_path):
    vizwiz(tmp_path)
    written = get_task("vizwiz").submission(
        [AnswerLine(1, "Two."), AnswerLine(0, "A can, red")], tmp_path, tmp_path / "out"
    )
    assert written.files[0].read_text() == (
        '[{"image": "VizWiz_test_00000000.jpg", "answer": "can red"}, '
        '{"image": "VizWiz_test_00000001.jpg", "answer": "2"}]'
    )
    assert "2185" in written.send_to


def test_vizwiz_knows_whose_answers_they_are_by_their_prompts(tmp_path):
    val = vizwiz(tmp_path).answers(tmp_path)
    task = get_task("vizwiz")
    test = [AnswerLine(question.id, "x", question.text) for question in task.questions(tmp_path)]
    assert task.can_score(val, tmp_path) and not task.can_score(test, tmp_path)
    (tmp_path / "vizwiz" / "llava_test.jsonl").unlink()
    assert task.can_score(val, tmp_path)
    (tmp_path / "vizwiz" / "val.json").unlink()
    assert not task.can_score(val, tmp_path)


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("What Is it?\nReference OCR token: A, B\nAnswer shortly.", "what is it?"),
        ("What is it?\nReference OCR token: \nAnswer shortly.", "what is it?"),
        ("Reference OCR token: A\nWhat is it?\nAnswer shortly.", "what is it?"),
        ("What is it?\nAnswer shortly.", "what is it?"),
        ("OCR tokens: A, B\nQuestion: What\nis it? Short answer:", "what\nis it?"),
        ("What is it?\nReference OCR token: A", "what is it?"),
    ],
)
def test_textvqa_finds_the_question_in_the_prompt(prompt, question):
    assert question_in(prompt) == question


@pytest.mark.parametrize(
    "prompt", ["What is it?", "a\nb\nc", "OCR tokens: A\nWhat is it?", "a\nReference OCR token: \nb\nc", ""]
)
def test_textvqa_refuses_other_prompts(prompt):
    with pytest.raises(ValueError, match="none of LLaVA's forms"):
        question_in(prompt)


def test_textvqa_scores_what_was_answered(tmp_path):
    answers = textvqa(tmp_path).answers(tmp_path)
    task = get_task("textvqa")
    data = json.loads((tmp_path / "textvqa" / "TextVQA_0.5.1_val.json").read_text())
    data["data"][0]["answers"] = ["Dakota."] * 3 + ["pire"] * 7
    write(tmp_path / "textvqa" / "TextVQA_0.5.1_val.json", data)
    score = task.score(answers[:2], tmp_path)
    assert score.value == pytest.approx(100 * (0.9 + 1) / 2)
    assert score.counts == {"questions": 3, "answered": 2, "missing": 1, "unreadable": 0}
    assert score.warnings == ("1 questions have no answer; the accuracy is over the others",)
    # the same image, another question
    with pytest.raises(ValueError, match="answered more than once"):
        task.score([answers[0], answers[0]], tmp_path)
    with pytest.raises(ValueError, match=r"no questions 1.*is this a dog"):
        task.score([AnswerLine(answers[0].question_id, "x", "Is this a dog?" + SHORT)], tmp_path)
    with pytest.raises(ValueError, match=r"line 4, question 'a'.*none of LLaVA's forms"):
        task.score([AnswerLine("a", "x", "one line", line=4)], tmp_path)
    data["data"][1]["answers"] = ["yes"] * 9
    write(tmp_path / "textvqa" / "TextVQA_0.5.1_val.json", data)
    with pytest.raises(ValueError, match="record 1: 9 human answers; 10 are due"):
        task.score(answers, tmp_path)


def test_textvqa_uses_the_reference_tokens_of_the_dataset_rows(tmp_path):
    made = textvqa(tmp_path)
    assert made.rows[""][0]["ocr_tokens"] == ["DAKOTA", "Pire"]
    texts = [question.text for question in get_task("textvqa").questions(tmp_path)]
    assert texts[0] == "What is the brand of this camera?\nReference OCR token: DAKOTA, Pire" + SHORT
    assert texts[1] == "Is this a camera?\nReference OCR token: " + SHORT


@pytest.mark.parametrize(
    ("text", "read"),
    [("No.", "no"), ("No...", "no"), (" Yes", " yes"), ("A dog", "a dog"), ("red, blue.", "red, blue"), (".", "")],
)
def test_gqa_takes_away_trailing_stops_and_case_alone(text, read):
    assert read_gqa(text) == read


def test_gqa_counts_balanced_questions_by_type(tmp_path):
    made = gqa(tmp_path)
    task = get_task("gqa")
    answers = made.answers(tmp_path, texts=["no", "the woman", "light brown"])
    found = values(task.score(answers, tmp_path))
    assert found == pytest.approx({
        "accuracy": 200 / 3, "binary": 100.0, "open": 0.0, "structural/verify": 100.0, "structural/query": 0.0,
        "structural/choose": 100.0, "semantic/global": 100.0, "semantic/rel": 0.0, "semantic/attr": 100.0,
    })  # fmt: skip
    with pytest.raises(ValueError, match=r"without an answer: 1 \('201640614'\)"):
        task.score([answers[0], answers[2]], tmp_path)
    with pytest.raises(ValueError, match="answered twice"):
        task.score([*answers, answers[0]], tmp_path)
    score = task.score([*answers, AnswerLine("1", "no"), AnswerLine(7, "x")], tmp_path)
    assert (
        score.counts == {"questions": 3, "answered": 3, "unknown": 2, "unreadable": 0}
        and "2 ('1', '7')" in score.warnings[0]
    )
    # an id written as a number is the same id
    assert task.score([AnswerLine(int(a.question_id), a.text) for a in answers], tmp_path).value == score.value


def test_gqa_refuses_broken_labels(tmp_path):
    answers = gqa(tmp_path).answers(tmp_path)
    labels = tmp_path / "gqa" / "data" / "testdev_balanced_questions.json"
    write(labels, {"1": {"question": "x"}})
    with pytest.raises(ValueError, match="question 1 has no 'answer'"):
        get_task("gqa").score(answers, tmp_path)
    write(labels, [])
    with pytest.raises(ValueError, match="an object that is not empty is due"):
        get_task("gqa").score(answers, tmp_path)
