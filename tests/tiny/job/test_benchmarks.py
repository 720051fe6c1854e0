"""The tiny world as benchmarks in their own layouts: what is asked, what is right, and methods compared on it."""

import json

import pytest

from dynamic_llava.eval.__main__ import main as eval_main
from dynamic_llava.eval.answers import AnswerLine
from dynamic_llava.eval.tasks import get_task, pope
from dynamic_llava.tiny.__main__ import main
from dynamic_llava.tiny.job.benchmarks import write_benchmarks
from dynamic_llava.tiny.job.testset import EXISTENCE, read_test_set
from dynamic_llava.tiny.world.dataset import build_world
from tests.tiny_pipeline import write_checkpoint


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("tiny") / "world", train=2, test=16)


@pytest.fixture(scope="module")
def root(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "root"
    given = ["--world", world, "--output-folder", folder, "--questions", 30, "--descriptions", 3]
    for _ in range(2):  # again: the same files, the links there already
        assert main(["benchmarks", *map(str, given)]) == 0
    return folder


def test_the_benchmarks_ask_what_the_world_asks(world, root):
    test = read_test_set(world, 30, 3)
    asked = {
        (question.text, question.image.name) for name in ("pope", "gqa") for question in get_task(name).questions(root)
    }
    assert asked == {(one.question.replace("<image>", "").strip(), one.image.name) for one in test.questions}
    for question, query in zip(get_task("lvis_single").questions(root), test.descriptions, strict=True):
        assert question.extra["rounds"] == [[question.text, query.answer]] and question.image.load()


def test_questions_of_one_kind_are_one_benchmark(world, tmp_path):
    test = read_test_set(world, 30, 3)
    first = next(number for number, query in enumerate(test.questions) if query.kind == EXISTENCE)
    assert first > 0, "the world's first question is of another kind"
    assert write_benchmarks(world, tmp_path / "few", first, 3) == ["gqa", "lvis_single"]
    assert get_task("gqa").questions(tmp_path / "few") and not (tmp_path / "few" / pope.QUESTIONS).exists()
    assert write_benchmarks(world, tmp_path / "more", first + 1, 3) == ["pope", "gqa", "lvis_single"]


@pytest.mark.parametrize("name", ["pope", "gqa"])
def test_the_worlds_answers_are_right(world, root, name):
    """And others are not, in either benchmark's own score."""
    test = read_test_set(world, 30, 3)
    right = {query.key: query.answer for query in test.questions if (query.kind == EXISTENCE) == (name == "pope")}
    task = get_task(name)
    for text, worth in ((lambda key: right[key], 100), (lambda key: "purple", 0)):
        answers = [AnswerLine(one.id, text(one.id), prompt=one.text) for one in task.questions(root)]
        assert len(answers) == len(right)
        score = task.score(answers, root)
        assert score.value == pytest.approx(worth, abs=1e-9) or (name == "pope" and worth == 0 and score.value < 100)


def test_methods_are_compared_on_it(root, tmp_path):
    model = write_checkpoint(tmp_path / "model", seed=0)
    given = ["--model", model, "--methods", "dense,divprune:keep=0.1", "--tasks", "pope,gqa", "--data-root", root]
    given += ["--output-folder", tmp_path / "out", "--limit", 3, "--max-new-tokens", 2, "--repeats", 2]
    assert eval_main(["compare", *map(str, given)]) == 0
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    for task in found["tasks"].values():
        assert [row["costs"]["image_tokens_per_layer"] for row in task["rows"]] == [64, 6]


def test_a_folder_of_something_else_is_left_alone(world, root, tmp_path, capsys):
    (tmp_path / "pope" / "val2014").mkdir(parents=True)
    assert main(["benchmarks", "--world", str(world), "--output-folder", str(tmp_path), "--questions", "30"]) == 2
    assert "holds 4" in capsys.readouterr().err  # fewer descriptions than asked for
    given = ["--world", world, "--output-folder", tmp_path, "--questions", 30, "--descriptions", 3]
    assert main(["benchmarks", *map(str, given)]) == 2
    assert "is there already and no link to" in capsys.readouterr().err
