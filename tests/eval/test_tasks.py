"""Every registered benchmark behind the same protocol, on small made data in its real layout (task_data.py)."""

import json
import math
from itertools import product
from pathlib import Path

import openpyxl
import pytest

from dynamic_llava.eval.answers import AnswerLine, read_answers, write_answers
from dynamic_llava.eval.score import score_table
from dynamic_llava.eval.tasks import GROUPS, TASKS, get_task, get_tasks
from dynamic_llava.eval.tasks.base import GENERATION, LLAVA_EVAL, PAPER_TABLE1, SHORT, Metric, Score
from dynamic_llava.eval.tasks.questions import ImageData, ImageFile, Question
from tests.eval.task_data import TASK_DATA, save_hub
from tests.sft_builders import picture

SPARSITIES = {"none", "image", "both"}


@pytest.fixture(params=sorted(TASKS))
def name(request):
    return request.param


@pytest.fixture
def made(name, tmp_path):
    assert name in TASK_DATA, f"write a function that makes data for {name} in tests/eval/task_data.py"
    return TASK_DATA[name](tmp_path)


def test_a_task_says_what_it_is(name):
    task = get_task(name)
    assert task.title and task.files and task.max_new_tokens > 0
    assert set(task.groups) <= set(GROUPS)
    assert all(file.holds and file.get and file.split in (None, *task.splits) for file in task.files)
    for metric, sizes in task.paper.items():
        assert set(sizes) == {"7b", "13b"}, metric
        for numbers in sizes.values():
            assert set(numbers) <= SPARSITIES and all(number > 0 for number in numbers.values())
    assert task.table_metric in task.paper and task.paper_note


def test_the_page_of_benchmarks_says_where_its_files_come_from(name):
    page = (Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    (row,) = [line for line in page.split("\n") if line.startswith(f"| `{name}` |")]
    task = get_task(name)
    assert f"`{task.table_metric}`" in row and all(split in row for split in task.splits)
    assert all(file.get.removesuffix(LLAVA_EVAL.removeprefix("LLaVA's eval.zip")) in row for file in task.files)
    assert task.hub is None or task.hub.dataset in row


def test_questions_of_every_split(name, made, tmp_path):
    for split in TASKS[name].splits or (None,):
        task = TASKS[name](split)
        questions = task.questions(tmp_path)
        assert questions
        for question in questions:
            assert isinstance(question, Question) and question.text and question.logged_prompt
            assert "<image>" not in question.text
            assert question.image is None or question.image.load().mode == "RGB"
        assert all((tmp_path / file.path).exists() for file in task.needed_files())


def test_the_right_answers_have_the_best_score(made, tmp_path):
    task = get_task(made.task)
    path = write_answers(tmp_path / "answers.jsonl", made.answers(tmp_path))
    score = task.score_file(path, tmp_path)
    if made.best is None:
        assert score is None
        return
    assert score.value == pytest.approx(made.best)
    assert score.counts["questions"] == score.counts["answered"] == len(made.right)
    assert all(math.isfinite(metric.value) for metric in score.metrics.values())
    assert json.loads(json.dumps(score.to_json()))["metrics"][score.table_metric]["value"] == score.value


def test_wrong_answers_have_a_worse_score(made, tmp_path):
    task = get_task(made.task)
    if made.best is None:
        pytest.skip("scored by a server or a judge")
    value = task.score(made.answers(tmp_path, texts=["?"] * len(made.right)), tmp_path).value
    assert value > made.best if made.lower_is_better else value < made.best


def test_an_answer_that_is_missing_is_an_error_or_counted(made, tmp_path):
    task = get_task(made.task)
    answers = made.answers(tmp_path)[1:]
    if made.best is None or not answers:
        pytest.skip("scored by a server or a judge")
    try:
        score = task.score(answers, tmp_path)
    except ValueError as error:
        assert "answer" in str(error)
    else:
        assert score.counts["missing"] >= 1 and score.warnings


def test_answers_that_cannot_be_read_are_counted_and_named(made, tmp_path):
    """One place for every scorer: `counts`, and a warning that says which they are and what they count as."""
    task = get_task(made.task)
    if made.best is None:
        assert "unreadable" in task.result({task.table_metric: (0.0, "points")}, {}, []).counts
        pytest.skip("scored by a server or a judge")
    assert task.score(made.answers(tmp_path), tmp_path).counts["unreadable"] == 0
    count = len(made.right)
    for texts, unreadable, empty in (
        ([""] * count, count, count),
        ([" \n"] * count, count, count),
        (["", *made.right[1:]], 1, 1),
    ):
        score = task.score(made.answers(tmp_path, texts=texts), tmp_path)
        assert score.counts["unreadable"] == unreadable
        (warning,) = [one for one in score.warnings if "unreadable" in one]
        assert f"counted as {task.unreadable_counts_as}: {unreadable} (" in warning
        assert f"{empty} of them are empty" in warning
        assert json.loads(json.dumps(score.to_json()))["counts"]["unreadable"] == unreadable
        assert f"unreadable {unreadable}" in score_table(task, score) and warning in score_table(task, score)


def test_a_part_of_the_questions_has_a_score_of_its_own(made, tmp_path):
    """Right answers to the first questions alone are worth the best score; what is left out is said."""
    task = get_task(made.task)
    answers = made.answers(tmp_path)
    if made.best is None:
        pytest.skip("scored by a server or a judge")
    for count in range(1, len(answers) + 1):
        try:
            score = task.score(answers[:count], tmp_path, part=True)
        except ValueError as error:
            assert count == 1 and "pair" in str(error)  # half a pair of MMVP
            continue
        best = made.best * score.counts["answered"] // len(answers) if task.name == "mme" else made.best
        assert score.value == pytest.approx(best) or task.name == "mme"
        assert score.counts["answered"] == count
        assert count == len(answers) or score.warnings
    whole = task.score(answers, tmp_path)
    assert task.score(answers, tmp_path, part=True) == whole


def test_a_byte_order_mark_is_passed_over(made, tmp_path):
    """In every text file that a task reads, and in the file of answers."""
    task = get_task(made.task)
    answers = made.answers(tmp_path)
    questions = task.questions(tmp_path)
    path = write_answers(tmp_path / "answers.jsonl", answers)
    before = task.score_file(path, tmp_path)
    for file in tmp_path.rglob("*"):
        if file.suffix in (".json", ".jsonl", ".tsv", ".csv", ".txt"):
            file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert task.questions(tmp_path) == questions
    assert task.score_file(path, tmp_path) == before and read_answers(path) == answers


HOSTILE_ANSWERS = (
    "a\uffffb", "a\ufffeb", "a\ud800b", "\udfff", "a\x00b\x0bc\x1f", "=1+1", "x\r\ny\rz", "_x0041_", "\U0001f600",
    "'quoted'", "<b>", "",
)  # fmt: skip
"""What a model may say, or a file of answers hold."""


def test_what_is_written_for_a_server_can_be_read(name, made, tmp_path):
    """Files of strict JSON in UTF-8, and workbooks; every answer is in them, whatever it says."""
    for split, text in product(TASKS[name].splits or (None,), HOSTILE_ANSWERS):
        task = TASKS[name](split)
        answers = [
            AnswerLine(question.id, text, prompt=question.logged_prompt, extra=question.extra, line=number)
            for number, question in enumerate(task.questions(tmp_path), 1)
        ]
        try:
            written = task.submission(answers, tmp_path, tmp_path / "out")
        except ValueError as error:
            assert "no question" in str(error) or "missing" in str(error)  # labels of a split that has no server
            continue
        for path in () if written is None else written.files:
            read = rows_of(path)
            assert len(read) >= len(answers)
            for row in read:
                "".join(map(str, row)).encode()


def rows_of(path):
    """Return what a written file holds, each row as a list of values, read as strictly as a server may."""
    if path.suffix == ".xlsx":
        return list(openpyxl.load_workbook(path).active.iter_rows(values_only=True))[1:]
    text = path.read_bytes().decode()
    content = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    rows = content.items() if isinstance(content, dict) else content
    return [list(row.values()) if isinstance(row, dict) else list(row) for row in rows]


def test_a_question_answered_twice_is_an_error(made, tmp_path):
    task = get_task(made.task)
    answers = made.answers(tmp_path)
    act = task.score if made.best is not None else lambda given, root: task.submission(given, root, tmp_path / "out")
    with pytest.raises(ValueError, match=r"twice|more than once"):
        act([*answers, answers[0]], tmp_path)


def test_a_missing_file_is_named_with_where_to_get_it(name, made, tmp_path):
    task = get_task(made.task)
    path = tmp_path / task.needed_files()[0].path
    path.rename(path.with_name("elsewhere"))
    with pytest.raises(FileNotFoundError, match="get it from"):
        task.questions(tmp_path)


def test_a_server_or_judge_gets_its_files(made, tmp_path):
    task = get_task(made.task)
    if not task.send_to:
        assert task.submission(made.answers(tmp_path), tmp_path, tmp_path / "out") is None
        assert task.can_score(made.answers(tmp_path), tmp_path)
    elif task.splits == ():
        written = task.submission(made.answers(tmp_path), tmp_path, tmp_path / "out")
        assert written.files and written.send_to
        assert all(path.is_file() and path.parent == tmp_path / "out" for path in written.files)


def test_rows_of_the_dataset_ask_and_score_the_same(made, tmp_path):
    task = get_task(made.task)
    if task.hub is None:
        assert not made.rows
        pytest.skip("there is no Hugging Face dataset of it")
    hub = task.hub_data(str(save_hub(made, tmp_path / "hub", task.hub_data().split)))
    layout, rows = task.questions(tmp_path), task.questions(tmp_path, hub)
    assert [question.text for question in rows] == [question.text for question in layout]
    assert {question.image.load().mode for question in rows if question.image is not None} <= {"RGB"}
    answers = made.answers(tmp_path, hub)
    if made.best is not None:
        assert task.can_score(answers, tmp_path, hub)
        assert task.score(answers, tmp_path, hub).value == pytest.approx(made.best)


def test_names_groups_and_splits():
    assert [task.name for task in get_tasks(" pope, vqav2:val,pope,")] == ["pope", "vqav2"]
    assert get_task("vqav2:val").used_split() == "val" and get_task("vqav2").used_split() == "test-dev"
    assert len(get_tasks("vqav2,vqav2:val,vqav2:test-dev")) == 2
    table = {task.name for task in get_tasks(PAPER_TABLE1)}
    assert {"vqav2", "gqa", "textvqa", "pope", "mme", "seed"} <= table and "vizwiz" not in table
    assert [task.name for task in get_tasks("all")] == list(TASKS)
    assert table.isdisjoint(task.name for task in TASKS.values() if GENERATION in task.groups)
    with pytest.raises(ValueError, match=r"'pop' is not known; choose from .*pope"):
        get_tasks("pop")
    with pytest.raises(ValueError, match=r"no split 'test'; give none"):
        get_task("pope:test")
    with pytest.raises(ValueError, match=r"no split 'x'; give one of test-dev, test, val"):
        get_task("vqav2:x")
    with pytest.raises(ValueError, match="no task is named"):
        get_tasks(" , ")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question_id": 2, "te', r"llava_pope_test\.jsonl:13 is no valid JSON"),
        ('{"question_id": 2}', r"llava_pope_test\.jsonl:13 has no 'text'"),
        ('{"question_id": [2], "text": "a"}', r":13: 'question_id' is \[2\]; a whole number or text is due"),
        (
            '{"question_id": 2, "text": "a", "image": 3}',
            r":13: 'image' is 3; a path inside the image folder, or nothing",
        ),
        ('{"question_id": "1", "text": "a", "image": "b.jpg"}', r":13: question '1' stands already in line 1"),
    ],
)
def test_a_broken_question_line_is_named(tmp_path, line, message):
    TASK_DATA["pope"](tmp_path)
    with (tmp_path / "pope" / "llava_pope_test.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=message):
        get_task("pope").questions(tmp_path)


def test_a_question_file_without_questions_is_refused(tmp_path):
    TASK_DATA["pope"](tmp_path)
    (tmp_path / "pope" / "llava_pope_test.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no questions"):
        get_task("pope").questions(tmp_path)


def test_an_image_may_not_leave_its_folder(tmp_path):
    (tmp_path / "images").mkdir()
    picture().save(tmp_path / "secret.png")
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    for name in ("../secret.png", str(tmp_path / "secret.png"), "link.png"):
        with pytest.raises(ValueError, match="leaves the image folder"):
            ImageFile(tmp_path / "images", name).load()
    with pytest.raises(FileNotFoundError, match=r"no image file .*none\.png"):
        ImageFile(tmp_path / "images", "none.png").load()


def test_images_that_stand_in_the_data(tmp_path):
    path = tmp_path / "a.png"
    picture().save(path)
    assert ImageData(path.read_bytes(), "row 3").load().tobytes() == picture().tobytes()
    with pytest.raises(ValueError, match="row 3 is no image"):
        ImageData(b"nothing", "row 3").load()
    with pytest.raises(ValueError, match="row 3 is broken"):
        ImageData(path.read_bytes()[:100], "row 3").load()


def test_a_score_names_units_and_holds_its_headline():
    with pytest.raises(ValueError, match="unit 'pct' is not known"):
        Metric(1.0, "pct")
    with pytest.raises(ValueError, match="accuracy is not among f1"):
        Score("x", "accuracy", {"f1": Metric(1.0, "percent")}, {})
    with pytest.raises(ValueError, match="how many answers were unreadable"):
        Score("x", "f1", {"f1": Metric(1.0, "percent")}, {"questions": 3})


def test_a_task_without_a_dataset_says_so():
    task = get_task("pope")
    assert task.hub_data("mine").dataset == "mine" and task.hub_data().dataset == "lmms-lab/POPE"
    type_without = type("Bare", (type(task),), {"hub": None})
    with pytest.raises(ValueError, match="no Hugging Face dataset; it reads pope/"):
        type_without().hub_data("mine")


def test_suffixes_are_llavas(tmp_path):
    TASK_DATA["gqa"](tmp_path)
    assert get_task("gqa").questions(tmp_path)[0].text == "Is it overcast?" + SHORT
    assert SHORT == "\nAnswer the question using a single word or phrase."


def test_answers_are_kept_in_the_questions_order(tmp_path):
    made = TASK_DATA["mme"](tmp_path)
    path = write_answers(tmp_path / "a.jsonl", made.answers(tmp_path))
    asked = [(question.id, question.text) for question in get_task("mme").questions(tmp_path)]
    assert [(answer.question_id, answer.prompt) for answer in read_answers(path)] == asked
