"""The requests: four hundred different ones, and no subject in both parts."""

from dynamic_llava.smol.config import HELD_PROMPTS, TRAIN_PROMPTS
from dynamic_llava.smol.prompts import prompts


def test_four_hundred_requests_and_their_split():
    found = prompts()
    assert len(found) == len({one.id for one in found}) == len({one.text for one in found}) == 400
    subjects = {held: {one.id.rsplit("-", 1)[0] for one in found if one.held is held} for held in (False, True)}
    assert (len(subjects[False]), len(subjects[True])) == (90, 10) and not subjects[False] & subjects[True]
    assert (sum(one.held for one in found), sum(not one.held for one in found)) == (HELD_PROMPTS, TRAIN_PROMPTS)
    assert all("{" not in one.text and one.text[-1] in ".?" for one in found)
    assert found == prompts()


def test_the_first_of_each_part_are_of_every_kind():
    for held in (False, True):
        kinds = [one.id.split("-")[0] for one in prompts() if one.held is held][:5]
        assert sorted(kinds) == ["advise", "compare", "explain", "tell", "visit"]
