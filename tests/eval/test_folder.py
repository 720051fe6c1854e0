"""Answers on disk: what a killed process leaves behind, what is refused, and the whole file."""

import json

import pytest

from dynamic_llava.eval.answers import AnswerLine, read_answers
from dynamic_llava.eval.folder import AnswerStore, differences
from dynamic_llava.files import WriteError

SETTINGS = {"model": {"config": {"layers": 2, "names": ["a"]}, "dtype": "float32"}, "tokens": 8}


def store(folder, settings=SETTINGS, count=4, rank=0):
    return AnswerStore(folder, "toy", settings, count, rank)


def line(place, text="said"):
    return AnswerLine(f"q{place}", text, metadata={"place": place})


def begun(folder, *places, rank=0):
    """Write answers to some places and close, as a process that ends early."""
    one = store(folder, rank=rank)
    one.append([line(place) for place in places])
    one.close()
    return folder / f"toy.part{rank}.jsonl"


def test_parts_of_all_processes_make_one_file_in_question_order(tmp_path):
    begun(tmp_path, 3, 0)
    begun(tmp_path, 2, rank=1)
    last = store(tmp_path, rank=5)
    assert sorted(last.done) == [0, 2, 3] and last.done[2].text == "said"
    with pytest.raises(ValueError, match=r"toy: questions without an answer, by place: 1 \(1\)"):
        last.merge()
    last.append([line(1)])
    last.close()
    assert last.merge() == tmp_path / "toy.jsonl"
    assert [answer.question_id for answer in read_answers(tmp_path / "toy.jsonl")] == ["q0", "q1", "q2", "q3"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy.jsonl", "toy.run.json"]
    assert sorted(store(tmp_path).done) == [0, 1, 2, 3]


def test_a_merge_that_was_killed_after_the_file_was_written_is_done_again(tmp_path):
    part = begun(tmp_path, 0, 1, 2, 3)
    copy = part.read_bytes()
    whole = store(tmp_path).merge()
    once = whole.read_bytes()
    part.write_bytes(copy)  # the parts were not yet removed
    assert store(tmp_path).merge().read_bytes() == once and not part.exists()


@pytest.mark.parametrize("torn", [b"{", b'{"question_id": "q2", "text": "half', b"\x00" * 40, "{\u00e4".encode()[:2]])
def test_a_line_that_was_cut_off_is_dropped(tmp_path, torn):
    part = begun(tmp_path, 0, 1)
    whole = part.read_bytes()
    part.write_bytes(whole + torn)
    assert sorted(store(tmp_path, rank=1).done) == [0, 1]  # another process reads, and leaves it
    assert part.read_bytes() == whole + torn
    again = store(tmp_path)
    again.append([line(2)])
    again.close()
    assert sorted(store(tmp_path).done) == [0, 1, 2] and part.read_bytes().startswith(whole)


def test_a_whole_line_without_its_end_is_answered_anew(tmp_path):
    part = begun(tmp_path, 0, 1)
    part.write_bytes(part.read_bytes()[:-1])
    assert sorted(store(tmp_path).done) == [0]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("{", r"toy\.part0\.jsonl:2 is no valid JSON"),
        ("[1]", r"part0\.jsonl:2 holds a list"),
        ('{"text": "a"}', r"part0\.jsonl:2: question_id is None"),
        ('{"question_id": 1, "text": "a"}', r"part0\.jsonl:2 has place None in its metadata"),
        ('{"question_id": 1, "text": "a", "metadata": {"place": 4}}', r"has place 4 .* there are 4 questions"),
    ],
)
def test_a_broken_line_in_the_middle_is_named(tmp_path, broken, message):
    part = begun(tmp_path, 0)
    part.write_text(part.read_text() + broken + "\n" + part.read_text())
    with pytest.raises(ValueError, match=message):
        store(tmp_path)


def test_answers_of_unknown_origin_are_not_taken_over(tmp_path):
    (tmp_path / "toy.jsonl").write_text(json.dumps({"question_id": 1, "text": "No"}) + "\n")
    with pytest.raises(ValueError, match=r"toy\.jsonl is there without toy\.run\.json"):
        store(tmp_path)


def test_a_file_that_another_run_writes_is_left_alone(tmp_path):
    first = store(tmp_path)
    with pytest.raises(ValueError, match="another process is writing"):
        store(tmp_path)
    first.close()
    store(tmp_path)


def test_other_settings_are_refused_with_both_values(tmp_path):
    begun(tmp_path, 0)
    changed = {"model": {"config": {"layers": 3, "names": ["a"]}, "dtype": "float32"}, "sparsity": "both"}
    with pytest.raises(ValueError, match=r"layers was 2 and is 3, sparsity was absent and is both, tokens was 8"):
        store(tmp_path, changed)


def test_differences_are_counted_beyond_the_first(tmp_path):
    before, now = ({f"k{number:02}": value for number in range(20)} for value in (1, 2))
    assert differences(before, now).endswith("k07 was 1 and is 2, and 12 more")
    assert differences({"a": {}}, {"a": {"b": 1}}) == "a was {} and is absent, a.b was absent and is 1"
    assert differences(before, before) == ""


def test_ids_follow_from_settings_and_place(tmp_path):
    one, two = store(tmp_path / "a"), store(tmp_path / "b")
    other = store(tmp_path / "c", {**SETTINGS, "tokens": 9})
    ids = [one.answer_id(place) for place in range(4)]
    assert ids == [two.answer_id(place) for place in range(4)]
    assert len({*ids, *(other.answer_id(place) for place in range(4))}) == 8


def test_nothing_is_left_of_a_record_that_could_not_be_written(tmp_path, monkeypatch):
    """Neither by the process itself, nor by one that was killed while it wrote."""
    with monkeypatch.context() as patch:
        patch.setattr("dynamic_llava.eval.folder.os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(WriteError, match="full"):
            AnswerStore(tmp_path, "toy", {}, 1)
    assert not list(tmp_path.iterdir())
    (tmp_path / "toy.run.4711").write_text("{")
    whole = AnswerStore(tmp_path, "toy", {}, 1)
    whole.append([AnswerLine("q", "said", metadata={"place": 0})])
    whole.close()
    whole.merge()
    assert {path.name for path in tmp_path.iterdir()} == {"toy.jsonl", "toy.run.json"}
