"""MMVP, RealWorldQA and CVBench-2D: pairs, labels, the mean of two sources, and broken files."""

import pytest

from dynamic_llava.eval.answers import AnswerLine
from dynamic_llava.eval.tasks import get_task
from dynamic_llava.eval.tasks.base import LETTER
from dynamic_llava.eval.tasks.realworldqa import is_right
from tests.eval.task_data import cvbench, mmvp, realworldqa, save_hub, write, write_lines, write_table

MMVP, REAL, CVBENCH = get_task("mmvp"), get_task("realworldqa"), get_task("cvbench")


def values(score):
    return {name: metric.value for name, metric in score.metrics.items()}


def test_a_pair_is_right_when_both_answers_are(tmp_path):
    made = mmvp(tmp_path)
    score = MMVP.score(made.answers(tmp_path, texts=["A", "A", "b", "1"]), tmp_path)
    assert values(score) == {"pair_accuracy": 50.0, "accuracy": 75.0}
    # rows 2k - 1 and 2k are a pair, rows 2k and 2k + 1 are none
    score = MMVP.score(made.answers(tmp_path, texts=["", "B", "B", "B"]), tmp_path)
    assert values(score) == {"pair_accuracy": 0.0, "accuracy": 50.0} and score.counts["unreadable"] == 1
    score = MMVP.score(made.answers(tmp_path)[:3], tmp_path)
    assert score.value == 50.0 and score.counts["missing"] == 1 and score.counts["pairs"] == 2


def test_mmvp_asks_in_llavas_form_and_says_so(tmp_path):
    mmvp(tmp_path)
    question = MMVP.questions(tmp_path)[0]
    assert question.text == "Are the wings open or closed?\nA. Open\nB. Closed" + LETTER
    assert question.id == 1 and question.image.name == "1.jpg"
    assert "a line an option" in MMVP.paper_note


def test_mmvp_takes_the_original_answers_of_dataset_rows(tmp_path):
    made = mmvp(tmp_path)
    row = made.rows[""][0]
    made.rows[""] = [row | {"Correct Answer": "(b)" if number % 2 else "(a)"} for number in range(1, 301)]
    hub = MMVP.hub_data(str(save_hub(made, tmp_path / "hub", "train")))
    corrected = [AnswerLine(number, "B" if number % 2 else "A") for number in range(1, 301)]
    assert MMVP.score(corrected, tmp_path, hub).value == pytest.approx(100 * 148 / 150)
    original = {99: "A", 100: "B", 279: "A", 280: "B"}
    restored = [AnswerLine(one.question_id, original.get(one.question_id, one.text)) for one in corrected]
    assert MMVP.score(restored, tmp_path, hub).value == 100.0


def test_the_first_column_of_mmvp_may_be_misspelt(tmp_path):
    made = mmvp(tmp_path)
    path = tmp_path / "mmvp" / "Questions.csv"
    path.write_text(path.read_text().replace("Index", "lndex", 1))
    assert MMVP.score(made.answers(tmp_path), tmp_path).value == 100.0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"Options": "Open or closed"}, "row 1: options are 'Open or closed'"),
        ({"Correct Answer": "(c)"}, r"row 1: the correct answer is '\(c\)'; it is one of A, B"),
        (None, "has 1 rows; they are pairs"),
    ],
)
def test_broken_mmvp_rows(tmp_path, row, message):
    mmvp(tmp_path)
    good = {"Index": 1, "Question": "?", "Options": "(a) Open (b) Closed", "Correct Answer": "(a)"}
    rows = [good] if row is None else [good | row, good]
    write_table(tmp_path / "mmvp" / "Questions.csv", list(good), rows, ",")
    with pytest.raises(ValueError, match=message):
        MMVP.score([AnswerLine(1, "A"), AnswerLine(2, "A")], tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Index,Question\n1,x\n", "the head line has no 'Options', 'Correct Answer'"),
        ("Index,Question,Options,Correct Answer\n1,x\n", "csv:2: the row has more or fewer cells"),
        ("Index,Question,Options,Correct Answer\n1,x,(a) y (b) z,(a),more\n", "csv:2: the row has more or fewer cells"),
        ("Index,Question,Options,Correct Answer\n", "holds no rows"),
    ],
)
def test_broken_mmvp_tables(tmp_path, content, message):
    mmvp(tmp_path)
    write(tmp_path / "mmvp" / "Questions.csv", content)
    with pytest.raises(ValueError, match=message):
        MMVP.questions(tmp_path)
    (tmp_path / "mmvp" / "Questions.csv").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="is no UTF-8"):
        MMVP.questions(tmp_path)


@pytest.mark.parametrize(
    ("text", "label", "right"),
    [
        ("B", "B", True), ("b", "B", True), ("(B)", "B", True), ("B. up", "B", True), ("The answer is B.", "B", True),
        ("A", "B", False), ("", "B", False), ("Right", "B", False), ("Yes", "Yes", True), ("yes.", "Yes", True),
        ("yes..", "Yes", False), ("two", "2", False), ("2.", "2", True), ("", "2", False), ("yes, it is", "Yes", False),
        ("E", "E", True), ("(E)", "E", False), ("The answer is yes", "Yes", False),
    ],
)  # fmt: skip
def test_realworldqa_wants_the_letter_or_the_word(text, label, right):
    assert is_right(text, label) is right


def test_realworldqa_asks_the_question_as_it_is(tmp_path):
    made = realworldqa(tmp_path)
    questions = REAL.questions(tmp_path)
    assert [question.id for question in questions] == [0, 1, 2]
    assert questions[1].text == "What colour?\nPlease answer directly with a single word or number."
    score = REAL.score(made.answers(tmp_path, texts=["A", "Red", "2"]), tmp_path)
    assert values(score) == pytest.approx({"accuracy": 200 / 3, "accuracy/letter": 0.0, "accuracy/other": 100.0})


def test_broken_realworldqa(tmp_path):
    realworldqa(tmp_path)
    for content, message in (
        ({}, "a list that is not empty is due"),
        ([{"question": "?"}], "question 0 has no 'image_path', 'answer'"),
    ):
        write(tmp_path / "realworldqa" / "data.json", content)
        with pytest.raises(ValueError, match=message):
            REAL.questions(tmp_path)


def test_cvbench_is_the_mean_of_its_sources(tmp_path):
    made = cvbench(tmp_path)
    score = CVBENCH.score(made.answers(tmp_path, texts=["C", "A", "(A)", "B", "B"]), tmp_path)
    assert score.value == pytest.approx((100 + 100 / 3) / 2)
    assert values(score) == pytest.approx({
        "mean_of_sources": 200 / 3, "accuracy": 60.0, "accuracy/ADE20K": 100.0, "accuracy/COCO": 100 / 3,
        "accuracy/ADE20K/Count": 100.0, "accuracy/ADE20K/Relation": 100.0, "accuracy/COCO/Count": 0.0,
        "accuracy/COCO/Relation": 100.0,
    })  # fmt: skip
    score = CVBENCH.score(made.answers(tmp_path)[:3], tmp_path)
    assert score.counts["missing"] == 2 and score.value == pytest.approx((100 + 100 / 3) / 2)


def test_cvbench_asks_its_own_prompt_with_the_suffix_for_letters(tmp_path):
    cvbench(tmp_path)
    questions = CVBENCH.questions(tmp_path)
    assert len(questions) == 5
    assert questions[0].text == (
        "How is it 0? Select from the following choices.\n(A) 0\n(B) 1\n(C) 2\n"
        "Answer with the option's letter from the given choices directly."
    )


def cvbench_row(**changes):
    row = {"idx": 0, "task": "Count", "answer": "(A)", "prompt": "?", "source": "COCO", "filename": "x.png"}
    return row | changes


def test_cvbench_without_a_source_says_so(tmp_path):
    cvbench(tmp_path)
    write_lines(tmp_path / "cvbench" / "test_2d.jsonl", [cvbench_row()])
    score = CVBENCH.score([AnswerLine(0, "A")], tmp_path)
    assert score.value == 100.0 and score.warnings == ("no questions of ADE20K: the mean is over the other source",)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([cvbench_row(source="Omni3D")], "jsonl:1: source is 'Omni3D'"),
        ([cvbench_row(answer="()")], r"answer '\(\)'"),
        ([cvbench_row(), cvbench_row()], "jsonl:2: question 0 occurs twice"),
        ([{"idx": 0}], "jsonl:1 has no 'task', 'answer', 'prompt', 'source'"),
        ([cvbench_row(type="3D")], "no questions of the 2D half"),
    ],
)
def test_broken_cvbench(tmp_path, rows, message):
    cvbench(tmp_path)
    write_lines(tmp_path / "cvbench" / "test_2d.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        CVBENCH.questions(tmp_path)
