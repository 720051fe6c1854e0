"""ScienceQA: both ways to tell which questions have an image, what is counted as wrong, and broken files."""

import json
from dataclasses import replace

import pytest

from dynamic_llava.eval.answers import AnswerLine
from dynamic_llava.eval.tasks import get_task
from dynamic_llava.eval.tasks.base import LETTER
from tests.eval.task_data import save_hub, scienceqa, write

TASK = get_task("scienceqa")


def values(score):
    return {name: metric.value for name, metric in score.metrics.items()}


def test_the_image_comes_first_and_is_logged(tmp_path):
    scienceqa(tmp_path)
    first, second, _ = TASK.questions(tmp_path)
    text = "Context: A map is shown.\nWhich is it?\nA. here\nB. there\nC. nowhere" + LETTER
    assert (first.id, first.text, first.logged_prompt) == ("5", text, f"<image>\n{text}")
    assert first.image.name == "5/image.png"
    assert second.image is None and second.logged_prompt == second.text == "Is it so?\nA. yes\nB. no" + LETTER


def test_img_accuracy_is_that_of_problems_with_an_image(tmp_path):
    made = scienceqa(tmp_path)
    score = TASK.score(made.answers(tmp_path, texts=["B", "B", "D"]), tmp_path)
    found = values(score)
    assert found["img_accuracy"] == found["img_accuracy_by_prompt"] == score.value == 50.0
    assert found["accuracy"] == pytest.approx(100 / 3) and found["accuracy/no_image"] == 0.0
    assert score.counts["correct"] == 1 and score.counts["unreadable"] == 0 and score.warnings == ()
    assert score.to_json()["details"] == {"results": {"5": 1, "7": 1, "11": 3}}


def test_a_missing_answer_is_wrong_but_has_no_prompt(tmp_path):
    made = scienceqa(tmp_path)
    score = TASK.score(made.answers(tmp_path)[:2], tmp_path)
    found = values(score)
    assert found["accuracy"] == pytest.approx(200 / 3) and found["img_accuracy"] == 50.0
    assert found["img_accuracy_by_prompt"] == 100.0
    assert score.counts["missing"] == 1 and score.details["results"]["11"] == -1
    assert "counted as wrong: 1 ('11')" in score.warnings[0]
    assert "2 problems have an image, <image> stands in the prompt of 1 answers" in score.warnings[1]


def test_prompts_alone_decide_the_scripts_number(tmp_path):
    made = scienceqa(tmp_path)
    bare = [replace(answer, prompt="") for answer in made.answers(tmp_path)]
    assert "img_accuracy_by_prompt" not in values(TASK.score(bare, tmp_path))
    marked = [*bare[:1], replace(bare[1], prompt="see <image>", text="B"), bare[2]]
    score = TASK.score(marked, tmp_path)
    assert values(score)["img_accuracy_by_prompt"] == 0.0 and score.value == 100.0


def test_what_is_not_read_or_beyond_the_choices_is_wrong(tmp_path):
    made = scienceqa(tmp_path)
    score = TASK.score(made.answers(tmp_path, texts=["B.", "C", "The answer is E"]), tmp_path)
    assert score.counts["correct"] == 0 and score.counts["unreadable"] == 2
    assert score.details["results"] == {"5": -1, "7": -1, "11": -1}


def test_answers_of_other_splits_are_left_out(tmp_path):
    made = scienceqa(tmp_path)
    score = TASK.score([*made.answers(tmp_path), AnswerLine("1", "A")], tmp_path)
    assert score.value == 100.0 and score.counts["unknown"] == 1 and "1 ('1')" in score.warnings[0]
    with pytest.raises(ValueError, match="no question for answers"):
        TASK.score([AnswerLine("1", "A")], tmp_path)


def test_problems_without_any_image_are_told(tmp_path):
    made = scienceqa(tmp_path)
    path = tmp_path / "scienceqa" / "problems.json"
    problems = {name: problem | {"image": None} for name, problem in json.loads(path.read_text()).items()}
    write(path, problems)
    score = TASK.score(made.answers(tmp_path), tmp_path)
    assert score.value == 0.0 and "no question has an image" in score.warnings[0]


def test_dataset_rows_without_an_image_are_asked_as_text(tmp_path):
    made = scienceqa(tmp_path)
    hub = TASK.hub_data(str(save_hub(made, tmp_path / "hub", "test")))
    questions = TASK.questions(tmp_path, hub)
    assert [question.image is None for question in questions] == [False, True, False]
    assert [question.id for question in questions] == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("llava_test_CQM-A.json", {}, "a list that is not empty is due"),
        ("llava_test_CQM-A.json", [{"id": "5"}], "question 0 has no 'conversations'"),
        (
            "llava_test_CQM-A.json",
            [{"id": "5", "conversations": []}],
            "'conversations' is .*; a list that is not empty is due",
        ),
        ("llava_test_CQM-A.json", [{"id": "5", "conversations": [{"value": "?"}]}] * 2, "stands already before it"),
    ],
)
def test_broken_questions(tmp_path, name, content, message):
    scienceqa(tmp_path)
    write(tmp_path / "scienceqa" / name, content)
    with pytest.raises(ValueError, match=message):
        TASK.questions(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("problems.json", {"5": {}}, "has no '7', '11'"),
        (
            "problems.json",
            {name: {"choices": ["x"], "answer": 1} for name in ("5", "7", "11")},
            "answer 1 is none of 1",
        ),
        ("pid_splits.json", {"train": []}, "has no 'test'"),
        ("pid_splits.json", {"test": []}, "'test' is .*; a list that is not empty is due"),
    ],
)
def test_broken_labels(tmp_path, name, content, message):
    answers = scienceqa(tmp_path).answers(tmp_path)
    write(tmp_path / "scienceqa" / name, content)
    with pytest.raises(ValueError, match=message):
        TASK.score(answers, tmp_path)
