"""The test split read back (queries, proportions, truth), its settings, and what answers are worth, by hand."""

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from dynamic_llava.processing import DynamicLlavaProcessor
from dynamic_llava.tiny import BASE_WEIGHTS
from dynamic_llava.tiny.job.config import TinyJobConfig
from dynamic_llava.tiny.job.evaluation import _stated
from dynamic_llava.tiny.job.testset import (
    Query,
    accuracy_by_kind,
    answer_batches,
    answer_nll,
    likelihood,
    normalise_answer,
    patch_overlap,
    perplexity,
    read_test_set,
)
from dynamic_llava.tiny.world.dataset import build_world
from dynamic_llava.tiny.world.long import STATEMENTS
from dynamic_llava.tiny.world.texts import KINDS, parse_attributes

LONG = (
    "The image shows objects on a plain background. First, there is a small red square at the bottom center. The red "
    "square is between the green cross and the cyan ring. Overall there is one object on the left, two objects in the "
    "center and zero objects on the right. To sum up, there are two small objects, zero medium objects and one large "
    "object."
)


def test_the_words_that_tell_statements_are_marked(tmp_path):
    path = tmp_path / "one.png"
    Image.new("RGB", (64, 64)).save(path)
    processor = DynamicLlavaProcessor.from_pretrained(BASE_WEIGHTS)
    plain = "The image shows one object on a plain background. Overall we see a red ring."
    request = "<image>\nTell me about every object in detail."
    queries = [Query(f"d{i}", i, path, request, answer, "description") for i, answer in enumerate((LONG, plain))]
    (batch,) = answer_batches(processor, queries, 2)
    ids, labels = batch.inputs["input_ids"], batch.inputs["labels"]
    told = {name: processor.decode(ids[0][mask[0]]).split() for name, mask in batch.stated.items()}
    assert told == {
        "count": ["one", "two", "zero", "two", "zero", "one"],
        "relation": ["green", "cross", "cyan", "ring"],
    }
    assert not any(mask[1].any() for mask in batch.stated.values())
    assert all((labels[mask] == ids[mask]).all() for mask in batch.stated.values())


def test_what_generated_statements_are_worth():
    count, relation = STATEMENTS["count"], STATEMENTS["relation"]
    assert _stated(count, LONG, LONG) == _stated(relation, LONG, LONG) == 1.0
    assert _stated(count, LONG.replace("two small", "four small"), LONG) == 5 / 6
    assert _stated(relation, LONG.replace("cyan ring", "cyan cross"), LONG) == 0.0
    assert _stated(relation, LONG.replace("The red square is", "The red circle is"), LONG) == 0.0
    assert _stated(count, "", LONG) == 0.0 and _stated(count, LONG, "A red ring.") is None


def test_marked_words_are_counted_where_the_model_says_them(tmp_path):
    """A model made to say each next token, and one that never does, by what its logits are."""
    path = tmp_path / "one.png"
    Image.new("RGB", (64, 64)).save(path)
    processor = DynamicLlavaProcessor.from_pretrained(BASE_WEIGHTS)
    query = Query("d", 0, path, "<image>\nTell me about every object in detail.", LONG, "description")
    batches = answer_batches(processor, [query], 1)
    wrong = processor.tokenizer.convert_tokens_to_ids("\u2581two")

    def oracle(input_ids, never, **_):
        following = torch.cat([input_ids[:, 1:], input_ids[:, :1]], 1)
        following = torch.where(following == never, 0, following)
        return SimpleNamespace(logits=torch.nn.functional.one_hot(following, 127).float() * 50, sparsity=None)

    model = type("Model", (), {"eval": lambda self: None, "device": "cpu", "__call__": staticmethod(oracle)})()
    assert likelihood(model, batches, switches={"never": -1}).stated == {"count": 1.0, "relation": 1.0}
    assert likelihood(model, batches, switches={"never": wrong}).stated == {"count": 4 / 6, "relation": 1.0}
    assert likelihood(model, batches, switches={"never": -1}).slots == 1.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("tiny") / "world", train=2, test=60)


def test_any_first_part_holds_the_kinds_evenly(folder):
    test = read_test_set(folder, questions=120, descriptions=10)
    for part in (30, 60, 120):
        counts = Counter(query.kind for query in test.questions[:part])
        assert set(counts) == set(KINDS)
        assert max(counts.values()) <= 1.5 * min(counts.values()) + 1
    exist = Counter((query.subset, query.answer) for query in test.questions if query.kind == "exist")
    subsets = ("random", "popular", "adversarial")
    assert set(exist) == {(subset, answer) for subset in subsets for answer in ("Yes", "No")}


def test_queries_are_whole_and_unique(folder):
    test = read_test_set(folder, questions=50, descriptions=8)
    queries = [*test.questions, *test.descriptions]
    assert len({query.id for query in queries}) == len({query.key for query in queries}) == 58
    for query in queries:
        assert query.image.is_file() and query.question.startswith("<image>\n") and query.answer


def test_the_truth_belongs_to_the_images(folder):
    test = read_test_set(folder, questions=20, descriptions=10)
    for query in test.descriptions:
        assert parse_attributes(query.answer) == test.attributes[query.image]
        patches = test.object_patches[query.image]
        assert len(patches) == len(test.attributes[query.image])
        flat = [patch for one in patches for patch in one]
        assert len(flat) == len(set(flat)) and set(flat) <= set(range(64))
    assert {query.image for query in test.questions} <= set(test.attributes)


def test_a_smaller_set_is_the_beginning_of_a_larger_one(folder):
    small, large = (read_test_set(folder, questions=n, descriptions=5) for n in (20, 80))
    assert list(small.questions) == list(large.questions[:20])
    assert small.descriptions == large.first(3, 5).descriptions


def test_too_many_questions_are_refused(folder):
    with pytest.raises(ValueError, match=r"9999 questions were asked for.*test_images"):
        read_test_set(folder, questions=9999, descriptions=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"questions": 0}, "tiny.questions=0 is not allowed"),
        ({"seeds": -1}, "tiny.seeds=-1"),
        ({"uncached_questions": 10, "questions": 5}, "exceeds tiny.questions=5"),
        ({"batch_size": 2.5}, "whole number"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        TinyJobConfig(**settings)


def test_answers_are_compared_without_case_stop_and_spaces():
    assert normalise_answer("  Blue .\n") == "blue"
    assert normalise_answer("dark  blue. And more") == "dark blue"


def test_accuracy_by_kind_weights_questions_not_kinds():
    scores = accuracy_by_kind(["red", "Two.", "blue", "one"], ["red", "two", "green", "two"], ["b", "a", "b", "b"])
    assert scores == {"a": 1.0, "b": pytest.approx(1 / 3), "all": 0.5}
    assert list(scores) == ["a", "b", "all"]


def test_accuracy_refuses_unequal_lengths_and_nothing():
    with pytest.raises(ValueError, match="1 answers, 2 truths"):
        accuracy_by_kind(["a"], ["a", "b"], ["k", "k"])
    with pytest.raises(ValueError, match="at least one"):
        accuracy_by_kind([], [], [])


def test_overlap_by_hand():
    # image 0: objects {0,1} and {5}; kept {1, 2, 3}. image 1: object {4}; kept {4}.
    scores = patch_overlap([[1, 2, 3], [4]], [[[0, 1], [5]], [[4]]], patches=8)
    assert scores["precision"] == pytest.approx(2 / 4)
    assert scores["recall"] == pytest.approx(2 / 4)
    assert scores["iou"] == pytest.approx(2 / 6)
    assert scores["objects_hit"] == pytest.approx(2 / 3)
    assert scores["object_share"] == pytest.approx(4 / 16)
    assert scores["kept_share"] == pytest.approx(4 / 16)


def test_overlap_refuses_worlds_without_objects():
    with pytest.raises(ValueError, match="no image has"):
        patch_overlap([[0]], [[]], patches=4)


def test_answer_nll_counts_labelled_tokens_only():
    logits = torch.zeros(2, 4, 3)
    logits[0, 1, 2] = math.log(2.0)  # p(2) = 2 / 4 at position 1
    labels = torch.tensor([[-100, -100, 2, 0], [-100, -100, -100, 1]])
    nll, count = answer_nll(logits, labels)
    assert count.tolist() == [2, 1]
    assert nll[0].item() == pytest.approx(math.log(2) + math.log(3), rel=1e-6)
    assert nll[1].item() == pytest.approx(math.log(3), rel=1e-6)
    assert perplexity(nll.sum().item(), 3) == pytest.approx((2 * 9) ** (1 / 3), rel=1e-6)


def test_perplexity_errors():
    with pytest.raises(ValueError, match="0 tokens"):
        perplexity(0.0, 0)
    with pytest.raises(ValueError, match="do not belong"):
        answer_nll(torch.zeros(1, 3, 2), torch.zeros(1, 4, dtype=torch.long))
