"""SEED-Bench: exact letters, ids of both kinds, images alone, and the leaderboard's file."""

import json

import pytest

from dynamic_llava.eval.answers import AnswerLine
from dynamic_llava.eval.tasks import get_task
from tests.eval.task_data import save_hub, seed

SEED = get_task("seed")
RIGHT = [AnswerLine(101669, "A"), AnswerLine("v1234", "B"), AnswerLine(101, "C")]


@pytest.mark.parametrize("text", ["a", "A.", " A", "A ", "(A)", "A\nB", ""])
def test_only_the_letter_itself_is_right(tmp_path, text):
    seed(tmp_path)
    assert SEED.score([AnswerLine(101669, text), RIGHT[1]], tmp_path).value == 50.0


def test_images_alone_unless_a_video_is_answered(tmp_path):
    seed(tmp_path)
    score = SEED.score(RIGHT[:2], tmp_path)
    assert {name: metric.value for name, metric in score.metrics.items()} == {
        "accuracy/image": 100.0, "accuracy/type/Instances Counting": 100.0,
    }  # fmt: skip
    score = SEED.score([*RIGHT[:2], AnswerLine("101", "A")], tmp_path)
    assert {name: metric.value for name, metric in score.metrics.items()} == pytest.approx({
        "accuracy/image": 100.0, "accuracy/video": 0.0, "accuracy/all": 200 / 3,
        "accuracy/type/Instances Counting": 100.0, "accuracy/type/Action Recognition": 0.0,
    })  # fmt: skip


def test_ids_meet_as_numbers_missing_is_wrong_and_unknown_is_counted(tmp_path):
    seed(tmp_path)
    score = SEED.score([AnswerLine("101669", "A"), AnswerLine("v9", "B")], tmp_path)
    assert score.value == 50.0
    assert score.counts == {"questions": 2, "answered": 1, "missing": 1, "unknown": 1, "unreadable": 0}
    assert "counted as wrong: 1 ('v1234')" in score.warnings[0] and "1 ('v9')" in score.warnings[1]
    with pytest.raises(ValueError, match="answered twice"):
        SEED.score([AnswerLine("101669", "A"), AnswerLine(101669, "A")], tmp_path)
    with pytest.raises(ValueError, match="no question for answers"):
        SEED.score([AnswerLine("v9", "B")], tmp_path)


def test_questions_of_a_split(tmp_path):
    made = seed(tmp_path)
    assert [question.id for question in SEED.questions(tmp_path)] == [101669, "v1234"]
    everything = get_task("seed:all").questions(tmp_path)
    assert [question.id for question in everything] == [101669, "v1234", 101]
    assert everything[2].image.load().mode == "RGB"
    hub = SEED.hub_data(str(save_hub(made, tmp_path / "hub", "test")))
    with pytest.raises(ValueError, match="whole videos"):
        get_task("seed:all").questions(tmp_path, hub)


def test_the_leaderboards_file_holds_every_question(tmp_path):
    seed(tmp_path)
    written = SEED.submission(RIGHT[::-1], tmp_path, tmp_path / "out")
    assert [json.loads(line) for line in written.files[0].read_text().splitlines()] == [
        {"question_id": "101669", "prediction": "A"},
        {"question_id": "v1234", "prediction": "B"},
        {"question_id": "101", "prediction": "C"},
    ]
    with pytest.raises(ValueError, match=r"missing are 1 \(101\).*seed:all"):
        SEED.submission(RIGHT[:2], tmp_path, tmp_path / "out")
