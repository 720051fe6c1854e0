"""The test split read back: queries, proportions, truth; and the settings of the job."""

from collections import Counter

import pytest

from dynamic_llava.tiny.job.config import TinyJobConfig
from dynamic_llava.tiny.job.testset import read_test_set
from dynamic_llava.tiny.world.dataset import build_world
from dynamic_llava.tiny.world.descriptions import parse_attributes
from dynamic_llava.tiny.world.questions import KINDS


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
