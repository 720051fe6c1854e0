"""Item lists: thresholds, exclusion, reproducible drawing, the report beside Table 8, and what is refused."""

import json
import random

import pytest

from dynamic_llava.eval.__main__ import main
from dynamic_llava.eval.tasks import get_task
from tests.sft_builders import conversation, tiny_processor


def sample(name, image, *texts):
    return {"id": name, "image": image, "conversations": conversation(*texts)}


def words(count):
    return " ".join(["word"] * count)


def source(folder):
    """Write samples: single rounds of 100 + number words, dialogues of 7 and 8 rounds, and some that never fit."""
    samples = [
        sample(f"{number:03d}", f"coco/train2017/{number:03d}.jpg", "Describe.\n<image>", words(100 + number))
        for number in range(8)
    ]
    for number, rounds in ((20, 7), (21, 8), (22, 9)):
        turns = [text for place in range(rounds) for text in (f"Question {place}?", words(place + 1))]
        turns[0] = "<image>\nQuestion 0?"
        samples.append(sample(f"{number:03d}", f"coco/val2017/{number:03d}.jpg", *turns))
    samples.append({"id": "text", "conversations": conversation("Hello?", words(200))})
    samples.append(sample("late", "coco/late.jpg", "Look.", words(200), "<image>\nAnd now?", words(200)))
    path = folder / "source.json"
    path.write_text(json.dumps(samples))
    return path, samples


def build(command, path, out, *more):
    return main([command, "--source", str(path), "--output", str(out), *map(str, more)])


def test_single_rounds_have_more_than_100_words(tmp_path, capsys):
    path, _ = source(tmp_path)
    out = tmp_path / "lvis_vqa" / "single_round.json"
    assert build("build-lvis", path, out, "--kind", "single", "--n", 7) == 0
    items = json.loads(out.read_text())
    assert [item["source"] for item in items] == [f"{number:03d}" for number in range(1, 8)]
    assert items[0] == {
        "id": "lvis_1", "image": "coco/train2017/001.jpg", "question": "<image>\nDescribe.", "answer": words(101),
        "source": "001",
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert "13 samples, 7 fit; answers too short 1, no dialogue about one image 2, other number of rounds 3" in printed
    assert "104.0 words of answers" in printed and "text 56, output 159" in printed
    assert "no image was excluded" in printed and "not published" in printed
    assert [question.id for question in get_task("lvis_single").questions(*_with_images(tmp_path))] == [
        f"lvis_{number}" for number in range(1, 8)
    ]


def _with_images(root):
    (root / "lvis_vqa" / "images").mkdir(exist_ok=True)
    return (root,)


def test_dialogues_have_more_than_seven_rounds(tmp_path):
    path, _ = source(tmp_path)
    out = tmp_path / "multi.json"
    assert build("build-lvis", path, out, "--kind", "multi", "--n", 2) == 0
    items = json.loads(out.read_text())
    assert [(item["source"], len(item["question"]), len(item["answer"])) for item in items] == [
        ("021", 8, 8), ("022", 9, 9),
    ]  # fmt: skip
    assert items[0]["question"][:2] == ["<image>\nQuestion 0?", "Question 1?"]
    assert build("build-lvis", path, out, "--kind", "multi", "--n", 1, "--min-words", 37) == 0
    assert [item["source"] for item in json.loads(out.read_text())] == ["022"]
    assert build("build-lvis", path, out, "--kind", "multi", "--n", 3, "--min-rounds", 7) == 0


def test_captions_have_at_least_300_words_or_as_many_tokens_as_asked_for(tmp_path, capsys):
    captions = [sample(f"{n}", f"{n}.jpg", "<image>\nWhat?", words(n)) for n in (299, 300, 301)]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(captions))
    out = tmp_path / "items.json"
    assert build("build-sharegpt4v", path, out, "--n", 2) == 0
    assert [item["id"] for item in json.loads(out.read_text())] == ["sharegpt4v_1", "sharegpt4v_2"]
    tiny_processor().save_pretrained(tmp_path / "tokenizer")
    capsys.readouterr()
    given = ("--n", 1, "--tokenizer", tmp_path / "tokenizer", "--min-tokens")
    assert build("build-sharegpt4v", path, out, *given, 5 * 301 - 1) == 0  # a token a character
    assert [item["source"] for item in json.loads(out.read_text())] == ["301"]
    printed = capsys.readouterr().out
    assert "output   1504.0" in printed and "text     51.0   output   1555.0" in printed


def test_images_are_excluded_by_base_name(tmp_path):
    path, _ = source(tmp_path)
    training = tmp_path / "mix.json"
    training.write_text(
        json.dumps([sample("a", "elsewhere/003.jpg"), {"id": "b", "conversations": []}, {"image": ["x/005.jpg"]}])
    )
    out = tmp_path / "items.json"
    given = ("--kind", "single", "--exclude", training)
    assert build("build-lvis", path, out, *given, "--n", 5) == 0
    assert [item["source"] for item in json.loads(out.read_text())] == ["001", "002", "004", "006", "007"]
    assert build("build-lvis", path, out, *given, "--n", 6) == 2


def test_the_draw_depends_on_the_seed_and_not_on_the_order_of_the_source(tmp_path):
    path, samples = source(tmp_path)
    drawn = {}
    for seed in (0, 0, 1, 2):
        random.Random(len(drawn)).shuffle(samples)
        path.write_text(json.dumps(samples))
        out = tmp_path / "items.json"
        assert build("build-lvis", path, out, "--kind", "single", "--n", 3, "--seed", seed) == 0
        assert drawn.setdefault(seed, out.read_text()) == out.read_text()
    assert len(set(drawn.values())) > 1
    for text in drawn.values():
        assert [item["source"] for item in json.loads(text)] == sorted(item["source"] for item in json.loads(text))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--kind", "single"), "has 7 samples that fit, 1000 are wanted; lower --n or a threshold"),
        (("--kind", "single", "--n", "0"), "n=0 is not possible"),
        (("--kind", "single", "--min-tokens", "5"), "min_tokens needs a tokenizer"),
        (("--kind", "single", "--min-rounds", "2"), "min_rounds belongs to kind multi"),
        (("--kind", "multi", "--min-rounds", "1"), "min_rounds=1 is not possible for kind multi"),
        (("--kind", "single", "--exclude", "nowhere.json"), "nowhere.json"),
    ],
)
def test_what_cannot_be_built_is_refused(tmp_path, capsys, given, message):
    path, _ = source(tmp_path)
    assert build("build-lvis", path, tmp_path / "items.json", *given) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "items.json").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"id": 1}]', "sample 0 has no list of conversations"),
        ('[{"id": 1, "image": "a", "conversations": [{"from": "human"}]}]', "sample 0, message 0 has no text"),
        ('[{"id": 1', "is no valid JSON"),
        ('{"id": 1}', "does not begin with '\\['"),
    ],
)
def test_broken_sources_are_named(tmp_path, capsys, content, message):
    path = tmp_path / "source.json"
    path.write_text(content)
    assert build("build-lvis", path, tmp_path / "items.json", "--kind", "single", "--n", "1") == 2
    assert message.replace("\\", "") in capsys.readouterr().err
