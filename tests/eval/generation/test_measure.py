"""LVIS-VQA and ShareGPT4V-VQA end to end: what lines hold, what the summary says, what is passed over or refused."""

import json
from dataclasses import replace

import pytest

from dynamic_llava.costs import LLAVA_7B, LLAVA_13B, decoder_shape
from dynamic_llava.eval import run as runner
from dynamic_llava.eval.answers import read_answers
from dynamic_llava.eval.generation.measure import Lengths
from dynamic_llava.eval.metrics import meteor
from dynamic_llava.eval.tasks import get_task
from tests.builders import TOKENS_PER_IMAGE, shared_model
from tests.eval.run_builders import lines_of, run, summary
from tests.eval.task_data import TASK_DATA
from tests.sft_builders import write_checkpoint

NAMES = ("lvis_single", "lvis_multi", "sharegpt4v")
LENGTHS = (
    "total_token_length", "instruct_token_length", "output_token_length", "output_cache_length",
    "max_prefill_memory", "max_decode_memory",
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(runner, "TIMED_TOKENS", 2)
    monkeypatch.setattr(runner, "TIMED_REPEATS", 1)


@pytest.fixture
def root(tmp_path):
    for name in NAMES:
        TASK_DATA[name](tmp_path)
    return tmp_path


def lines(out, name):
    return lines_of(out / "answers" / f"{name}.jsonl")


def test_lines_hold_numbers_and_the_summary_their_means(checkpoint, root):
    out = root / "out"
    assert run(checkpoint, ",".join(NAMES), root, out, "--batch-size", 3) == 0
    for name in NAMES:
        found, row = lines(out, name), summary(out)["tasks"][name]
        rounds = "mean_round_" if name == "lvis_multi" else ""
        for field, metric in (("ppl", "ppl"), ("meteor", "meteor")):
            mean = sum(line[rounds + field] for line in found) / len(found)
            assert row["metrics"][metric]["value"] == pytest.approx(mean)
        assert row["metric"] == "ppl" and row["value"] > 1 and row["unit"] == "perplexity"
        assert row["counts"] == {"questions": 4, "answered": 4, "skipped": 0, "missing": 0, "unreadable": 0}
        for line in found:
            for prefix in ("", "meteor_"):
                assert all(type(line[prefix + field]) is int for field in LENGTHS)
                fed, kept = line[f"{prefix}output_token_length"], line[f"{prefix}output_cache_length"]
                assert 0 <= kept <= fed
                text = line["instruct_token_length"] - (name == "lvis_multi")
                assert line[f"{prefix}total_token_length"] == TOKENS_PER_IMAGE + text + fed
            said = sum(map(len, line["metadata"]["tokens"])) - len(line["metadata"]["tokens"])
            assert said == line["meteor_output_token_length"]
            if name == "lvis_multi":
                number = len(line["rounds"])
                assert [len(line[field]) for field in ("ppl", "meteor", "answer")] == [number] * 3
                assert line["mean_round_ppl"] == pytest.approx(sum(line["ppl"]) / number)
                assert line["text"] == "\n".join(line["answer"])
        assert row["efficiency"]["kv_bytes"]["value"] > 0 and row["efficiency"]["prefill_ms"]["value"] > 0
    page = (out / "table.md").read_text()
    assert "LVIS-VQA (multi-round)" in page and "decode_tflop/meteor, TFLOP" in page


def test_the_batch_changes_no_line(checkpoint, root):
    """Sums in another order move a perplexity by a rounding error; everything else is the same."""
    for size in (1, 4):
        assert run(checkpoint, "lvis_multi", root, root / str(size), "--batch-size", size) == 0
    for one, four in zip(lines(root / "1", "lvis_multi"), lines(root / "4", "lvis_multi"), strict=True):
        for name, value in one.items():
            assert four[name] == (pytest.approx(value, rel=1e-4) if "ppl" in name else value), name


def test_the_separator_is_an_option_of_several_rounds(checkpoint, root, capsys):
    for given in ((), ("--round-separator", "official"), ("--round-separator", "template")):
        assert run(checkpoint, "lvis_multi", root, root / "-".join(("out", *given)), *given) == 0
    default, official, template = (
        lines(root / f"out{name}", "lvis_multi")
        for name in ("", "---round-separator-official", "---round-separator-template")
    )
    assert default == official
    for line, other in zip(official, template, strict=True):
        rounds = len(line["rounds"])
        assert other["instruct_token_length"] - line["instruct_token_length"] == 3 * (rounds - 1)  # </s> and two spaces
        assert other["ppl"][0] == pytest.approx(line["ppl"][0])
        assert rounds == 1 or other["ppl"][1] != pytest.approx(line["ppl"][1])
    assert run(checkpoint, "lvis_single", root, root / "x", "--round-separator", "template") == 2
    assert "names no task of several rounds (lvis_multi)" in capsys.readouterr().err
    assert run(checkpoint, "lvis_multi", root, root / "out", "--round-separator", "template") == 1
    assert (
        "task.round_separator was official and is template"
        in summary(root / "out")["tasks"]["lvis_multi"]["warnings"][-1]
    )


def test_an_unreadable_image_is_passed_over_reported_and_not_counted(checkpoint, root):
    assert run(checkpoint, "lvis_single", root, root / "whole") == 0
    images = sorted((root / "lvis_vqa" / "images" / "train2017").iterdir())
    images[1].write_bytes(b"no image")
    images[2].unlink()
    assert run(checkpoint, "lvis_single", root, root / "out") == 0
    row = summary(root / "out")["tasks"]["lvis_single"]
    assert row["counts"] == {"questions": 4, "answered": 2, "skipped": 2, "missing": 0, "unreadable": 0}
    assert "2 ('i_1', 'i_2')" in " ".join(row["warnings"])
    whole = lines(root / "whole", "lvis_single")
    assert row["value"] == pytest.approx((whole[0]["ppl"] + whole[3]["ppl"]) / 2, rel=1e-4)


def test_without_nltks_data_nothing_is_computed(checkpoint, root, monkeypatch):
    def refuse():
        raise ValueError(f"METEOR needs NLTK's data; {meteor.HOW}")

    monkeypatch.setattr("dynamic_llava.eval.generation.measure.nltk_meteor", refuse)
    monkeypatch.setattr("dynamic_llava.eval.generation.measure.score_dialogues", lambda *_: pytest.fail("computed"))
    assert run(checkpoint, "lvis_single", root, root / "out") == 1
    error = summary(root / "out")["tasks"]["lvis_single"]["error"]
    assert "python -m nltk.downloader punkt_tab wordnet" in error and "scripts/nltk_data.sh" in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": ""}, "item 1: a question or answer is blank"),
        ({"question": ["a"]}, "item 1: 'question' is .* text is due"),
        ({"answer": "See <image>."}, "item 1: <image> stands outside the first question"),
        ({"id": "i_0"}, "item 1: id 'i_0' stands already"),
    ],
)
def test_broken_items_are_named(root, change, message):
    path = root / "lvis_vqa" / "single_round.json"
    items = json.loads(path.read_text())
    items[1] |= change
    path.write_text(json.dumps(items))
    with pytest.raises(ValueError, match=message):
        get_task("lvis_single").questions(root)


def test_rounds_need_as_many_answers_as_questions(root):
    path = root / "lvis_vqa" / "multi_round.json"
    items = json.loads(path.read_text())
    items[3]["answer"].pop()
    path.write_text(json.dumps(items))
    with pytest.raises(ValueError, match="item 3: 4 questions have 3 answers"):
        get_task("lvis_multi").questions(root)
    path.write_text("{}")
    with pytest.raises(ValueError, match="a list that is not empty is due"):
        get_task("lvis_multi").questions(root)


def test_lines_without_numbers_have_no_score(checkpoint, root):
    task = get_task("lvis_single")
    made = TASK_DATA["lvis_single"](root)
    answers = made.answers(root)
    assert not task.can_score([replace(answer, extra={}) for answer in answers], root)
    broken = [replace(answers[0], extra={**answers[0].extra, "ppl": float("nan")}), *answers[1:]]
    with pytest.raises(ValueError, match="question 'i_0' has ppl nan"):
        task.score(broken, root)
    skipped = [replace(answer, metadata={"skipped": "why"}) for answer in answers]
    with pytest.raises(ValueError, match="no item has a perplexity; 4 were passed over"):
        task.score(skipped, root)
    assert run(checkpoint, "lvis_single", root, root / "out") == 0
    assert task.can_score(read_answers(root / "out" / "answers" / "lvis_single.jsonl"), root)


@pytest.mark.parametrize(
    ("shape", "fed", "kept", "tflop", "mebi"),
    [(LLAVA_7B, 159, 159, 2.745, 79.5), (LLAVA_7B, 159, 84, 1.528, 44.34), (LLAVA_13B, 159, 159, 5.356, 124.2)],
)
def test_columns_of_table_3(shape, fed, kept, tflop, mebi):
    """TFLOPs as printed (2.75, 1.52, 5.36); keys and values of the output tokens alone, in bfloat16."""

    def behind(every, left):
        return [every] * 2 + [left] * (shape.layers - 2)

    found = Lengths(576, behind(576, 115), 56, ([56] * shape.layers,) * 2, fed, behind(fed, kept)).fields(
        shape, 2, several=False
    )
    assert found["decode_flop"] / 1e12 == pytest.approx(tflop, abs=1e-3)
    assert found["decode_kv_bytes"] / 2**20 == pytest.approx(mebi, abs=0.05)
    assert found["max_decode_memory"] - found["max_prefill_memory"] == found["decode_kv_bytes"]
    assert found["total_token_length"] == 576 + 56 + 159


def test_memory_of_a_method_that_evicts_is_what_its_heads_hold():
    """Keys and values of a head, two bytes a value; the rest is as for any other method."""
    shape = decoder_shape(shared_model().config)
    lengths = Lengths(16, [16] * shape.layers, 4, ([4] * shape.layers,) * 2, 5, [5] * shape.layers)
    plain = lengths.fields(shape, 2, several=False)
    found = replace(lengths, heads_hold=(100, 130)).fields(shape, 2, several=False)
    token = 2 * 2 * shape.head_width
    memory = {"max_prefill_memory": 100, "max_decode_memory": 130, "decode_kv_bytes": 30}
    assert found == plain | {name: token * count for name, count in memory.items()}


def test_lines_of_a_method_that_evicts_say_what_its_heads_hold(checkpoint, root):
    """So that its key-value bytes are counted, and are those of the line."""
    out = root / "out"
    method = ("--method", "tova", "--method.keep-rate", "0.4")
    assert run(checkpoint, "lvis_single,lvis_multi", root, out, "--batch-size", 4, *method) == 0
    for name in ("lvis_single", "lvis_multi"):
        found, row = lines(out, name), summary(out)["tasks"][name]
        assert row["value"] > 1 and all(line["metadata"]["heads_hold"] > 0 for line in found)
        mean = sum(line["meteor_max_decode_memory"] for line in found) / len(found)
        assert row["efficiency"]["kv_bytes"]["value"] == pytest.approx(mean)
        assert all(line["max_decode_memory"] >= line["max_prefill_memory"] > 0 for line in found)
