"""METEOR against NLTK's own figures on its real data, and against the formula by hand with a stub in their place."""

import os

import pytest

from dynamic_llava.eval.metrics import meteor
from dynamic_llava.eval.metrics.meteor import missing_data, nltk_meteor
from tests.eval.meteor_stub import stub_meteor

REFERENCE = "It is a guide to action that ensures that the military will forever heed Party commands"
CLOSE = "It is a guide to action which ensures that the military always obeys the commands of the party"
FAR = "It is to insure the troops forever hearing the activity guidebook that party direct"


@pytest.mark.parametrize(
    ("reference", "hypothesis", "matches", "chunks"),
    [
        ("It is a dog here now.", "it is a dog here now.", 7, 1),
        ("  THE cats sit ", "the cat sits", 3, 1),  # stripped, lower case, stems
        ("a b c d", "c d a b", 4, 2),
        ("a b c d e", "a x c", 2, 2),
        ("a b", "x y", 0, 0),
        ("a b", "", 0, 0),
    ],
)
def test_equals_the_formula(reference, hypothesis, matches, chunks):
    """10PR / (R + 9P) less 0.5 (chunks / matches)^3: alpha 0.9, beta 3, gamma 0.5."""
    score = stub_meteor()
    expected = 0.0
    if matches:
        words = score.words
        precision, recall = matches / len(words(hypothesis)), matches / len(words(reference.strip()))
        mean = precision * recall / (0.9 * precision + 0.1 * recall)
        expected = mean * (1 - 0.5 * (chunks / matches) ** 3)
    assert score(reference, hypothesis) == pytest.approx(expected)


def test_the_reference_alone_is_lower_cased_before_it_is_cut_into_words():
    seen = []
    stub = stub_meteor()
    meteor.Meteor(lambda text: seen.append(text) or stub.words(text), stub.wordnet)("  The Cat. ", " The Cat. ")
    assert seen == ["the cat.", " The Cat. "]


def test_missing_data_are_downloaded_once_and_then_asked_for(monkeypatch):
    import nltk

    tried = []
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(nltk, "download", lambda names, quiet: tried.append(names))
    nltk_meteor.cache_clear()
    with pytest.raises(
        ValueError, match=r"data punkt_tab, wordnet, .*run `python -m nltk.downloader punkt_tab wordnet`"
    ):
        nltk_meteor()
    assert tried == [["punkt_tab", "wordnet"]]


@pytest.mark.slow
def test_real_data_give_nltks_own_figures():
    """0.6944 is NLTK's documented value; a synonym, and a sentence end that Punkt finds, count."""
    if missing_data() and not os.environ.get("NLTK_DATA"):
        pytest.skip("NLTK's data are not there: bash scripts/nltk_data.sh DIR, then set NLTK_DATA to DIR")
    nltk_meteor.cache_clear()
    score = nltk_meteor()
    assert score(REFERENCE, CLOSE) == pytest.approx(0.6944444, abs=1e-6)
    assert score(REFERENCE, FAR) == pytest.approx(0.3035391, abs=1e-6)
    assert score("It is a dog here now.", "It is a dog here now.") == pytest.approx(1 - 0.5 / 7**3)
    assert score("an auto", "an car") > stub_meteor()("an auto", "an car")
    # NLTK looks up what the stemmer left: "automobil" is no word.
    assert score("an automobile", "an car") == stub_meteor()("an automobile", "an car")
    assert score("anything", "") == 0
    assert score.words("It ends. So does this.") == ["It", "ends", ".", "So", "does", "this", "."]
