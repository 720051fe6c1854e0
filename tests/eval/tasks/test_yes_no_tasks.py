"""POPE and MME: how answers are read, how they meet their labels, and what is refused."""

import json

import pytest

from dynamic_llava.eval.answers import AnswerLine
from dynamic_llava.eval.tasks import get_task
from dynamic_llava.eval.tasks.base import SHORT
from dynamic_llava.eval.tasks.mme import read_mme
from tests.eval.task_data import mme, pope, write, write_lines

POPE, MME = get_task("pope"), get_task("mme")


def test_pope_matches_labels_by_order_within_the_category(tmp_path):
    made = pope(tmp_path)
    # categories may alternate; only the order within each counts
    answers = made.answers(tmp_path)
    mixed = [answers[place] for place in (0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11)]
    assert POPE.score(mixed, tmp_path).value == 100.0
    # labels meet answers by place, whatever ids and questions the label file names
    labels = tmp_path / "pope" / "coco" / "coco_pope_random.json"
    write_lines(labels, [{"question_id": 99, "label": label} for label in ("no", "yes", "no", "yes")])
    score = POPE.score(answers, tmp_path)
    assert score.metrics["accuracy/random"].value == 0.0
    assert score.value == pytest.approx(200 / 3)


def test_pope_reports_every_measure_of_every_category(tmp_path):
    made = pope(tmp_path)
    texts = ["Yes", "Yes", "no", "No, it is not."] + ["yes"] * 4 + ["No"] * 4
    score = POPE.score(made.answers(tmp_path, texts=texts), tmp_path)
    values = {name: metric.value for name, metric in score.metrics.items()}
    assert values["accuracy/adversarial"] == values["precision/adversarial"] == values["recall/adversarial"] == 0.5
    assert values["f1/random"] == pytest.approx(2 / 3) and values["yes_rate/random"] == 1.0
    assert values["f1/popular"] == 0.0 and values["accuracy/popular"] == 0.5
    assert values["mean_f1"] == pytest.approx(100 * (0.5 + 2 / 3 + 0) / 3)
    assert values["mean_accuracy"] == pytest.approx(50.0)
    assert {metric.unit for name, metric in score.metrics.items() if "/" in name} == {"fraction"}
    assert score.warnings == (
        "popular: precision is 0 because nothing was counted",
        "popular: f1 is 0 because nothing was counted",
    )


def test_pope_refuses_what_would_shift_the_labels(tmp_path):
    answers = pope(tmp_path).answers(tmp_path)
    with pytest.raises(ValueError, match=r"questions without an answer: 1 \('2'\)"):
        POPE.score(answers[:1] + answers[2:], tmp_path)
    with pytest.raises(ValueError, match="adversarial answers are not in the question file's order"):
        POPE.score([answers[1], answers[0], *answers[2:]], tmp_path)
    with pytest.raises(ValueError, match=r"no question for answers 1 \('5'\)"):
        POPE.score([*answers, AnswerLine(5, "yes")], tmp_path)
    with pytest.raises(ValueError, match="answered twice"):
        POPE.score([*answers, answers[0]], tmp_path)
    labels = tmp_path / "pope" / "coco" / "coco_pope_random.json"
    labels.write_text(labels.read_text() + '{"label": "yes"}\n')
    with pytest.raises(ValueError, match=r"4 random questions for 5 labels.*AoiDragon"):
        POPE.score(answers, tmp_path)
    labels.write_text('{"label": "yes"}\n{"text": 1}\n')
    with pytest.raises(ValueError, match=r"coco_pope_random\.json:2 has no 'label'"):
        POPE.score(answers, tmp_path)
    labels.unlink()
    with pytest.raises(FileNotFoundError, match=r"coco_pope_random\.json; get it from"):
        POPE.score(answers, tmp_path)


def test_pope_without_a_category_says_so(tmp_path):
    answers = pope(tmp_path).answers(tmp_path)
    path = tmp_path / "pope" / "llava_pope_test.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:8]))
    score = POPE.score(answers[:8], tmp_path)
    assert score.value == 100.0 and score.warnings == ("no popular questions: the mean is over the other categories",)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("Yes", "yes"), ("NO", "no"), ("Yes, it is.", "yes"), ("not sure", "no"), ("know", "no"), ("nothing", "no"),
        ("none", "no"), (" yes", "yes"), ("  yes", "other"), ("  no", "no"), ("y", "other"), ("I say yes", "other"),
        ("", "other"), ("The no", "other"), ("noyes", "no"), ("yesno", "yes"), ("\u00dcno", "no"),
    ],
)  # fmt: skip
def test_mme_reads_the_first_four_characters(text, read):
    assert read_mme(text) == read


def mme_answers(category, image, texts, questions=("Is it so?", "Is it other?")):
    return [
        AnswerLine(f"{category}/{image}", text, prompt=question + SHORT)
        for text, question in zip(texts, questions, strict=True)
    ]


def test_mme_adds_accuracy_over_questions_and_over_images(tmp_path):
    home = tmp_path / "MME" / "MME_Benchmark_release_version"
    for name in ("1", "2", "3"):
        write(
            home / "count" / f"{name}.txt",
            "Is it so? Please answer yes or no.\tYes\nIs it other? Please answer yes or no.\tNo\n",
        )
    answers = [
        *mme_answers("count", "1.png", ("Yes", "No")),
        *mme_answers("count", "2.png", ("Yes", "yes")),
        *mme_answers("count", "3.png", ("perhaps", "no")),
    ]
    # the answers of one image belong together wherever they stand
    for order in ((0, 1, 2, 3, 4, 5), (0, 2, 4, 1, 3, 5)):
        score = MME.score([answers[place] for place in order], tmp_path)
        assert score.metrics["accuracy/count"].value == pytest.approx(4 / 6)
        assert score.metrics["accuracy_plus/count"].value == pytest.approx(1 / 3)
        assert score.metrics["score/count"].value == score.value == pytest.approx(100.0)
        assert score.metrics["score/count"].unit == "points"
    assert score.counts["unreadable"] == 1
    assert "perception lacks existence, position" in score.warnings[0]
    assert score.metrics["cognition"].value == 0.0


def test_mme_keeps_perception_and_cognition_apart(tmp_path):
    made = mme(tmp_path)
    texts = ["Yes", "No", "Yes", "Yes", "Yes", "No"]
    values = {
        name: metric.value for name, metric in MME.score(made.answers(tmp_path, texts=texts), tmp_path).metrics.items()
    }
    assert values["score/existence"] == values["score/artwork"] == 200.0
    assert values["score/code_reasoning"] == values["cognition"] == 50.0
    assert (values["perception"], values["total"]) == (400.0, 450.0)


def test_mme_finds_both_forms_of_a_question_and_ready_prompts(tmp_path):
    made = mme(tmp_path)
    answers = made.answers(tmp_path)
    ready = [
        AnswerLine(a.question_id, a.text, a.prompt.replace(SHORT, "  Please answer yes or no.")) for a in answers[2:4]
    ]
    assert MME.score([*answers[:2], *ready, *answers[4:]], tmp_path).value == 400.0


def test_mme_refuses_odd_groups_unknown_and_repeated_questions(tmp_path):
    answers = mme(tmp_path).answers(tmp_path)
    with pytest.raises(ValueError, match=r"existence images with an odd number of answers: 1 \('0020'\)"):
        MME.score(answers[1:], tmp_path)
    with pytest.raises(
        ValueError, match=r"no question 'Is it new\? Please answer yes or no\.' about 'existence/0020\.png'"
    ):
        MME.score([AnswerLine("existence/0020.png", "yes", "Is it new?" + SHORT)], tmp_path)
    with pytest.raises(ValueError, match="answered twice"):
        MME.score([*answers, answers[0], answers[1]], tmp_path)
    score = MME.score(answers[2:], tmp_path)
    assert score.counts["missing"] == 2 and score.value == 200.0
    assert any("without an answer, left out: 2" in warning for warning in score.warnings)


def test_mme_refuses_a_broken_release(tmp_path):
    answers = mme(tmp_path).answers(tmp_path)
    home = tmp_path / "MME" / "MME_Benchmark_release_version"
    text = home / "existence" / "0020.txt"
    text.write_text(text.read_text().replace("\tNo", " No"))
    with pytest.raises(ValueError, match=r"0020\.txt:2: the label is ''"):
        MME.score(answers, tmp_path)
    text.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"0020\.txt is no UTF-8"):
        MME.score(answers, tmp_path)


def test_the_two_mme_questions_of_an_image_share_its_id(tmp_path):
    mme(tmp_path)
    questions = MME.questions(tmp_path)
    assert [question.id for question in questions[:2]] == ["existence/0020.png"] * 2
    assert questions[0].text == "Is it so?" + SHORT and questions[4].image.path().parent.name == "images"
    assert json.loads((tmp_path / "MME" / "llava_mme.jsonl").read_text().split("\n")[0])["category"] == "existence"
