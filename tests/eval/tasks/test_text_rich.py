"""DocVQA, InfoVQA, ChartQA, OCRBench and MMStar: groups, files of a server, options in columns, and broken files."""

import json

import pytest

from dynamic_llava.eval.answers import AnswerLine
from dynamic_llava.eval.score import score_table
from dynamic_llava.eval.tasks import get_task
from dynamic_llava.eval.tasks.base import LETTER, SHORT
from tests.eval.task_data import (
    chartqa,
    docvqa,
    infovqa,
    mmstar,
    ocrbench,
    save_hub,
    write,
    write_table,
)
from tests.sft_builders import picture

MMSTAR_COLUMNS = ("index", "question", "image", "answer", "category", "l2_category")


def values(score):
    return {name: metric.value for name, metric in score.metrics.items()}


def test_docvqa_is_the_mean_similarity_and_that_of_each_kind(tmp_path):
    made, task = docvqa(tmp_path), get_task("docvqa")
    score = task.score(made.answers(tmp_path, texts=["1/8/95", "28.000"]), tmp_path)
    first, second = 100 * (1 - 1 / 6), 100 * (1 - 1 / 6)  # one letter of six is another
    assert values(score) == pytest.approx({
        "anls": (first + second) / 2, "anls/handwritten": first, "anls/form": (first + second) / 2,
    })  # fmt: skip
    missing = task.score(made.answers(tmp_path)[:1], tmp_path)
    assert missing.value == 50.0 and missing.counts["missing"] == 1
    assert task.questions(tmp_path)[0].text == "what is the date?" + SHORT


@pytest.mark.parametrize(("name", "make"), [("docvqa", docvqa), ("infovqa", infovqa)])
def test_the_reading_competition_gets_every_test_question(tmp_path, name, make):
    make(tmp_path)
    task = get_task(f"{name}:test")
    answers = [AnswerLine(901, "b é"), AnswerLine("900", "a")]
    assert not task.can_score(answers, tmp_path) and get_task(name).can_score(answers, tmp_path)
    written = task.submission(answers, tmp_path, tmp_path / "out")
    assert [path.name for path in written.files] == [f"{name}_test_upload.json"]
    expected = [{"questionId": 900, "answer": "a"}, {"questionId": 901, "answer": "b é"}]
    assert json.loads(written.files[0].read_text()) == expected and "rrc.cvc.uab.es" in written.send_to
    with pytest.raises(ValueError, match="no answer to questions 1"):
        task.submission(answers[:1], tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="test set has no question for answers"):
        task.submission([*answers, AnswerLine(100, "of val")], tmp_path, tmp_path / "out")


def test_the_reading_competition_from_rows_of_test(tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "DocVQA" / "data"
    folder.mkdir(parents=True)
    rows = [{"questionId": "7", "question": "what?", "answers": None, "image": picture(1)}]
    datasets.Dataset.from_list(rows).to_parquet(folder / "test-00000-of-00001.parquet")
    task = get_task("docvqa:test")
    hub = task.hub_data(str(tmp_path))
    assert [question.id for question in task.questions(tmp_path, hub)] == ["7"]
    written = task.submission([AnswerLine("7", "a")], tmp_path, tmp_path / "out", hub)
    assert json.loads(written.files[0].read_text()) == [{"questionId": 7, "answer": "a"}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": []}, r"question 0: 'answers' is \[\]; a list of texts"),
        ({"answers": None}, "question 0: 'answers' is None"),
        ({"image": "../x.png"}, "a path inside the image folder is due"),
        ({"questionId": 101}, "question 1: questionId 101 occurs twice"),
        ({"question_types": "form"}, "'question_types' is 'form'"),
    ],
)
def test_broken_docvqa(tmp_path, change, message):
    docvqa(tmp_path)
    path = tmp_path / "docvqa" / "val_v1.0_withQT.json"
    content = json.loads(path.read_text())
    content["data"][0] |= change
    write(path, content)
    with pytest.raises(ValueError, match=message):
        get_task("docvqa").score([AnswerLine(100, "a")], tmp_path)


def test_chartqa_by_halves(tmp_path):
    made, task = chartqa(tmp_path), get_task("chartqa")
    assert task.questions(tmp_path)[0].text == "How many bars?" + SHORT
    score = task.score(made.answers(tmp_path, texts=["14", "red", "34.125"]), tmp_path)
    assert values(score) == pytest.approx({
        "relaxed_accuracy": 200 / 3, "relaxed_accuracy/human": 50.0, "relaxed_accuracy/augmented": 100.0,
    })  # fmt: skip
    hub = task.hub_data(str(save_hub(made, tmp_path / "hub", "test")))
    assert values(task.score(made.answers(tmp_path, texts=["14", "red", "34.125"]), tmp_path, hub)) == values(score)
    assert task.score(made.answers(tmp_path)[:1], tmp_path).value == pytest.approx(100 / 3)


def test_a_chart_without_a_label_is_named(tmp_path):
    chartqa(tmp_path)
    write(tmp_path / "chartqa" / "test_augmented.json", [{"imgname": "a.png", "query": "?"}])
    with pytest.raises(ValueError, match=r"test_augmented\.json, question 0 has no 'label'"):
        get_task("chartqa").questions(tmp_path)


def test_ocrbench_by_components_and_its_final_score(tmp_path):
    made, task = ocrbench(tmp_path), get_task("ocrbench")
    score = task.score(made.answers(tmp_path, texts=["centre", "of it", "1/8/93", r"\frac{a}{2}"]), tmp_path)
    formulas = "Handwritten Mathematical Expression Recognition"
    assert values(score) == pytest.approx({
        "accuracy": 50.0, "final_score": 2, "accuracy/Text Recognition": 50.0,
        "accuracy/Regular Text Recognition": 100.0, "accuracy/Handwriting Recognition": 0.0,
        "accuracy/Doc-oriented VQA": 100.0, f"accuracy/{formulas}": 0.0,
    })  # fmt: skip
    assert [question.id for question in task.questions(tmp_path)] == [0, 1, 2, 3]
    assert task.questions(tmp_path)[0].text == "what is written in the image?"


@pytest.mark.parametrize("label", ["", " \n", [], [""], ["a", " "], 7, None, [["a"]]])
def test_a_label_that_every_answer_would_hold_is_refused(tmp_path, label):
    made = ocrbench(tmp_path)
    answers = made.answers(tmp_path)
    path = tmp_path / "ocrbench" / "OCRBench.json"
    rows = json.loads(path.read_text())
    rows[1]["answers"] = label
    write(path, rows)
    with pytest.raises(ValueError, match=r"OCRBench\.json, question 1: 'answers' is .* none of them blank"):
        get_task("ocrbench").score(answers, tmp_path)


def test_mmstar_by_categories(tmp_path):
    made, task = mmstar(tmp_path), get_task("mmstar")
    score = task.score(made.answers(tmp_path, texts=["option b", "d", "Yes"]), tmp_path)
    assert values(score) == pytest.approx({
        "accuracy": 200 / 3, "accuracy/coarse perception": 100.0, "accuracy/coarse perception/image emotion": 100.0,
        "accuracy/math": 50.0, "accuracy/math/geometry": 100.0, "accuracy/math/statistical reasoning": 0.0,
    })  # fmt: skip
    assert score.counts["unreadable"] == 1
    assert task.questions(tmp_path)[0].text == "Which is it?\nOptions: A: red, B: green" + LETTER


def test_mmstar_lists_options_that_have_columns(tmp_path):
    made = mmstar(tmp_path)
    cells = [question.image.cell for question in get_task("mmstar").questions(tmp_path)]
    row = {"index": 3, "question": "Which?", "answer": "B", "category": "math", "l2_category": "geometry"}
    rows = [
        row | {"image": cells[0], "A": "red", "B": "green", "C": "", "D": ""},
        row | {"index": 4, "image": "3", "A": "1", "B": "2", "C": "3", "D": "4"},
    ]
    write_table(tmp_path / "mmstar" / "MMStar.tsv", (*MMSTAR_COLUMNS, *"ABCD"), rows)
    questions = get_task("mmstar").questions(tmp_path)
    assert questions[0].text == "Which?\nA. red\nB. green" + LETTER
    assert questions[1].text == "Which?\nA. 1\nB. 2\nC. 3\nD. 4" + LETTER
    assert questions[0].image.load().tobytes() == questions[1].image.load().tobytes()
    assert made.right


@pytest.mark.parametrize(
    ("change", "message"),
    [({"answer": "E"}, r"rows 1 \(0\) are none of A, B, C, D"), ({"index": "x"}, "index is 'x'; it is a number")],
)
def test_broken_mmstar(tmp_path, change, message):
    mmstar(tmp_path)
    row = {"index": 0, "question": "?", "image": "x", "answer": "A", "category": "math", "l2_category": "geometry"}
    write_table(tmp_path / "mmstar" / "MMStar.tsv", MMSTAR_COLUMNS, [row | change])
    with pytest.raises(ValueError, match=message):
        get_task("mmstar").score([AnswerLine(0, "A")], tmp_path)


def test_a_task_that_the_paper_does_not_have_shows_no_numbers_of_it(tmp_path):
    made, task = mmstar(tmp_path), get_task("mmstar")
    table = score_table(task, task.score(made.answers(tmp_path), tmp_path))
    assert "paper: not in the paper" in table and "paper, 7b" not in table and "the paper's" not in table
