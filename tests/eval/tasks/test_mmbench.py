"""MMBench: prompts from the table's cells, circular groups, the server's workbook, and broken tables."""

import csv
import sys

import openpyxl
import pytest

from dynamic_llava.eval.answers import AnswerLine
from dynamic_llava.eval.tasks import get_task
from dynamic_llava.eval.tasks.base import LETTER
from dynamic_llava.eval.tasks.mmbench import options_of, read_table
from tests.eval.task_data import MMBENCH_COLUMNS, cell_of, mmbench, write, write_table
from tests.sft_builders import picture

TASK = get_task("mmbench")


def table(root):
    return root / "mmbench" / "mmbench_dev_20230712.tsv"


def rewrite(root, change):
    """Change every row of the table by `change(row)`."""
    rows = read_table(table(root))
    for row in rows:
        change(row)
    write_table(table(root), MMBENCH_COLUMNS, rows)


def made_rows(root, rows):
    """Write rows of two options, (index, answer, category, l2-category), and return nothing."""
    cells = {"question": "Which?", "A": "red", "B": "green", "image": "x"}
    write_table(table(root), MMBENCH_COLUMNS, [
        cells | dict(zip(("index", "answer", "category", "l2-category"), row, strict=True)) for row in rows
    ])  # fmt: skip


def values(score):
    return {name: metric.value for name, metric in score.metrics.items()}


def test_hint_question_and_options_make_the_prompt(tmp_path):
    mmbench(tmp_path)
    first, second, _ = TASK.questions(tmp_path)
    assert first.prompt == "Look\nwell.\nWhich?\nA. red\nB. green\nC. blue" and first.text == first.prompt + LETTER
    assert dict(first.extra) == {"round_id": 0, "options": ["red", "green", "blue"], "option_char": ["A", "B", "C"]}
    assert second.prompt == 'Is "it" so?\nA. yes\nB. no' and second.id == 8


@pytest.mark.parametrize("empty", [None, float("nan"), "nan", "None", "NONE", "", " "])
def test_options_stop_at_the_first_empty_one(empty):
    assert options_of({"A": "x", "B": "y", "C": empty, "D": "z"}) == {"A": "x", "B": "y"}


def test_a_group_is_right_when_all_its_rotations_are(tmp_path):
    made_rows(tmp_path, [
        (1, "A", "x", "k"), (1_000_001, "B", "x", "k"), (2_000_001, "A", "x", "k"),
        (2, "A", "x", "l"), (1_000_002, "B", "x", "l"),
        (3, "A", "y", "l"),
    ])  # fmt: skip
    texts = {1: "A", 1_000_001: "B.", 2_000_001: "green", 2: "(A)", 1_000_002: "B", 3: "A"}
    score = TASK.score([AnswerLine(index, text) for index, text in texts.items()], tmp_path)
    assert values(score) == pytest.approx({
        "circular_accuracy": 200 / 3, "vanilla_accuracy": 100.0, "row_accuracy": 500 / 6,
        "circular_accuracy/category/x": 50.0, "circular_accuracy/category/y": 100.0,
        "circular_accuracy/l2-category/k": 0.0, "circular_accuracy/l2-category/l": 100.0,
    })  # fmt: skip
    assert score.counts["groups"] == 3 and score.counts["unreadable"] == 0


def test_what_cannot_be_read_or_is_missing_is_wrong(tmp_path):
    made = mmbench(tmp_path)
    answers = made.answers(tmp_path, texts=["no idea", "B", "B"])
    score = TASK.score(answers, tmp_path)
    assert score.value == 50.0 and score.counts["unreadable"] == 1
    score = TASK.score([*answers[1:2], AnswerLine(77, "A")], tmp_path)
    assert score.value == 50.0 and score.counts["missing"] == 2 and score.counts["unknown"] == 1


def test_the_servers_workbook(tmp_path):
    made = mmbench(tmp_path)
    rewrite(tmp_path, lambda row: row.update(question="=1+1" if row["index"] == 8 else row["question"]))
    answers = made.answers(tmp_path, texts=["A", "None", "=B\x07"])
    written = TASK.submission(answers[::-1], tmp_path, tmp_path / "out")
    rows = list(openpyxl.load_workbook(written.files[0]).active.iter_rows(values_only=True))
    assert rows[0] == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    assert rows[1] == (3, "Which?", "red", "green", "blue", None, "A", "A", "dev")
    assert rows[2] == (8, "=1+1", "yes", "no", None, None, "None", "B", "dev")
    assert rows[3][6] == "=B" and len(rows) == 4
    types = [cell.data_type for cell in openpyxl.load_workbook(written.files[0]).active["B"]]
    assert types == ["s"] * 4
    with pytest.raises(ValueError, match=r"no answer to rows 1 \('3'\)"):
        TASK.submission(answers[1:], tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="no question for answers"):
        TASK.submission([*answers, AnswerLine(77, "A")], tmp_path, tmp_path / "out")


def test_without_openpyxl_the_error_says_what_to_install(tmp_path, monkeypatch):
    answers = mmbench(tmp_path).answers(tmp_path)
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(ValueError, match=r"pip install dynamic-llava\[eval\]"):
        TASK.submission(answers, tmp_path, tmp_path / "out")


def test_long_cells_are_read_and_the_limit_is_put_back(tmp_path):
    mmbench(tmp_path)
    before = csv.field_size_limit()
    rewrite(tmp_path, lambda row: row.update(image="A" * (before + 1)))
    assert len(read_table(table(tmp_path))[0]["image"]) == before + 1
    assert csv.field_size_limit() == before


def test_a_cell_may_name_the_row_whose_image_it_shares(tmp_path):
    """As newer tables write it, also with spaces around; the row named must hold an image itself."""
    mmbench(tmp_path)
    rewrite(tmp_path, lambda row: row.update(image=cell_of(picture(row["index"] % 7))))
    first, second, _ = (question.image.load() for question in TASK.questions(tmp_path))
    rewrite(tmp_path, lambda row: row.update(image=row["image"] if row["index"] == 3 else "3 "))
    assert [one.image.load().tobytes() for one in TASK.questions(tmp_path)] == [first.tobytes()] * 3
    assert first.tobytes() != second.tobytes()
    for cell in ("8", "77"):
        rewrite(tmp_path, lambda row, cell=cell: row.update(image=cell if row["index"] != 3 else row["image"]))
        with pytest.raises(ValueError, match=rf"tsv, image of index .* the cell holds {cell}, but no row"):
            TASK.questions(tmp_path)


@pytest.mark.parametrize(("cell", "message"), [("not base64!", "is no base64"), ("QUJD", "index 3")])
def test_a_broken_image_is_named_when_it_is_read(tmp_path, cell, message):
    mmbench(tmp_path)
    rewrite(tmp_path, lambda row: row.update(image=cell))
    question = TASK.questions(tmp_path)[0]
    with pytest.raises(ValueError, match=message):
        question.image.load()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["1\tx"], r"tsv:2: the row has more or fewer cells"),
        (["x" + "\tq" * 6], r"tsv:2: index is 'x'"),
        (["1" + "\tq" * 6, "1" + "\tq" * 6], r"tsv:3: index 1 occurs twice"),
        ([], "holds no rows"),
    ],
)
def test_broken_rows(tmp_path, lines, message):
    path = tmp_path / "table.tsv"
    write(path, "\n".join(["index\tquestion\tA\tB\tC\tD\tanswer", *lines]) + "\n")
    with pytest.raises(ValueError, match=message):
        read_table(path)


def test_broken_tables(tmp_path):
    path = tmp_path / "table.tsv"
    write(path, "index\tquestion\tA\n1\tx\ty\n")
    with pytest.raises(ValueError, match="the head line has no 'B', 'C', 'D', 'answer'"):
        read_table(path)
    path.write_bytes(b"index\tquestion\tA\tB\tC\tD\tanswer\n1\t\xff\n")
    with pytest.raises(ValueError, match="is no UTF-8"):
        read_table(path)


def test_rows_without_labels_have_no_score(tmp_path):
    answers = mmbench(tmp_path).answers(tmp_path)
    rewrite(tmp_path, lambda row: row.update(answer=""))
    with pytest.raises(ValueError, match=r"rows 3 \(3, 8, 1000003\) are no letters; only dev"):
        TASK.score(answers, tmp_path)
    assert TASK.submission(answers, tmp_path, tmp_path / "out").files
