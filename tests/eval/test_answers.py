"""Answer files: what is written is read back, and every broken line is named by file and line."""

import json

import pytest

from dynamic_llava.eval.answers import (
    AnswerLine,
    answer_line,
    append_answers,
    one_per_question,
    read_answers,
    write_answers,
)
from dynamic_llava.eval.reading import shown

LINE = '{"question_id": 1, "prompt": "Is it?", "text": "No"}\n'
ODD = AnswerLine(
    "a/1", "  Yes\n\u2028é\t", "What?\nShort.", "id7", "model", {"kept": [1, 2]}, {"round_id": 0, "options": ["A"]}
)


def test_what_is_written_is_read_back(tmp_path):
    path = write_answers(tmp_path / "deep" / "a.jsonl", [ODD, AnswerLine(7, "")])
    first, second = read_answers(path)
    assert (first.line, second.line) == (1, 2)
    for name in ("question_id", "text", "prompt", "answer_id", "model_id", "metadata", "extra", "key"):
        assert getattr(first, name) == getattr(ODD, name)
    assert (second.question_id, second.text, second.key) == (7, "", "7")


def test_a_line_is_what_llava_writes():
    line = answer_line(AnswerLine(1, "No", "Is it?", "abc", "m"))
    assert line == (
        '{"question_id": 1, "prompt": "Is it?", "text": "No", "answer_id": "abc", "model_id": "m", "metadata": {}}\n'
    )
    assert json.loads(answer_line(ODD))["options"] == ["A"]
    with pytest.raises(ValueError, match=r"\['text'\] of question 1"):
        answer_line(AnswerLine(1, "No", extra={"text": "Yes"}))


def test_answers_are_on_disk_after_each_batch(tmp_path):
    with (tmp_path / "a.jsonl").open("w") as file:
        append_answers(file, [AnswerLine(1, "a"), AnswerLine(2, "b")])
        assert [answer.text for answer in read_answers(tmp_path / "a.jsonl")] == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LINE + '{"question_id": 2, "te', r"a\.jsonl:2 is no valid JSON .*cut off"),
        (LINE + "\n[1]\n", r"a\.jsonl:3 holds a list"),
        ('{"text": "No"}', r"a\.jsonl:1: question_id is None"),
        ('{"question_id": true, "text": "No"}', r"question_id is True"),
        ('{"question_id": 1.5, "text": "No"}', r"question_id is 1\.5"),
        ('{"question_id": 1}', r"question 1 has no 'text'"),
        ('{"question_id": 1, "text": null}', r"'text' is None"),
        ('{"question_id": 1, "text": "a", "prompt": 3}', r"'prompt' is 3"),
        ('{"question_id": 1, "text": "a", "metadata": []}', r"'metadata' is \[\]"),
        (" \n", "holds no answers"),
        ("[" * 100_000, r"a\.jsonl:1 is no valid JSON"),
    ],
)
def test_broken_files_are_refused_with_file_and_line(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_answers(tmp_path / "a.jsonl")


def test_missing_and_binary_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.jsonl"):
        read_answers(tmp_path / "none.jsonl")
    (tmp_path / "a.jsonl").write_bytes(LINE.encode() + b'{"question_id": 2, "text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl.*no UTF-8"):
        read_answers(tmp_path / "a.jsonl")


def test_a_question_answered_twice_is_refused():
    answers = [AnswerLine(1, "a", line=3), AnswerLine("1", "a", line=9)]
    with pytest.raises(ValueError, match="'1' is answered twice, in lines 3 and 9"):
        one_per_question(answers)
    assert list(one_per_question(answers, lambda answer: answer.line)) == [3, 9]


def test_many_ids_are_counted_and_few_are_named():
    assert shown([1, "b"]) == "2 (1, 'b')"
    assert shown(range(100)) == "100 (0, 1, 2, 3, 4, ...)"
